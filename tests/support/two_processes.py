# SPDX-License-Identifier: Apache-2.0
"""One of two processes that run examples/distributed.py, data parallel and then sharded; run by test_distributed.py."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.paths import ROOT

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
example = runpy.run_path(str(ROOT / "examples" / "distributed.py"))
dist.init_process_group("gloo", init_method=f"file://{FOLDER / 'store'}", rank=RANK, world_size=2)
try:
    for name, options in (("parallel", []), ("sharded", ["--shard"])):
        given = ["--epochs", "2", "--dropout", "0", "--checkpoint", str(FOLDER / name), *options]
        print(name, example["main"](given))
finally:
    dist.destroy_process_group()
# Threads of gloo outlive the group, which torch keeps; one that frees a tensor while Python ends calls std::terminate.
sys.stdout.flush()
os._exit(0)
