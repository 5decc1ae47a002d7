# SPDX-License-Identifier: Apache-2.0
"""Which groups are clusters of blocks, how the driver is asked for them, and what is done where it refuses.

test_kernels.py runs their kernels on a CPU, test_builds.py builds them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpu_rnn
from benchmarks.stub_driver.process import run
from gpu_rnn import devices
from gpu_rnn.backends.group import choice, clusters, nvrtc
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice as dispatch
from tests.backends.group.test_builds import Case
from tests.support.stub_driver import NEEDS_STUB

SHORTER = [(256, 64), (512, 16)]  # H, B, in training; kernels/simulated.md has them
ARCHITECTURES = {"sm_80": False, "sm_86": False, "sm_89": False, "sm_90a": True, "sm_100": True, "sm_120": False}


def problem(architecture: str, hidden: int, batch: int, direction: str = "training") -> Problem:
    return replace(Case(architecture, direction, "fp16", "lstm", hidden).problem, B=batch)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[devices.Device]:
    """A device that is no described one, as one that is here, and forgets what it refused."""
    device = replace(devices.describe("H100"), name="one that refuses")
    monkeypatch.setattr(clusters, "_refused", {})
    monkeypatch.setattr(devices, "at_hand", lambda device: [torch.device("cuda", 0)])
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "")
    monkeypatch.setattr(nvrtc, "no_driver", lambda: "")
    monkeypatch.setattr(group, "_failures", {})
    yield device


@pytest.mark.parametrize("shape", SHORTER, ids=str)
@pytest.mark.parametrize(("architecture", "has_them"), ARCHITECTURES.items())
def test_groups_are_clusters_where_that_is_predicted_to_be_shorter(
    architecture: str, has_them: bool, shape: tuple[int, int]
) -> None:
    each = problem(architecture, *shape)
    assert any(found.layout.cluster for found in choice.fitting(each)) == has_them
    chosen = group.choose(each)
    assert chosen is not None and chosen.layout.cluster == has_them
    if has_them:
        assert chosen.layout.members == 16 and chosen.groups * chosen.layout.rows >= shape[1]


def test_no_cluster_has_more_blocks_than_there_may_be() -> None:
    each = problem("sm_90a", 512, 16)
    members = [found.layout.members for found in choice.fitting(each) if found.layout.cluster]
    assert members and max(members) <= clusters.LARGEST
    assert clusters.at_once(each.device, 17) == 0


@pytest.mark.parametrize(("device", "of_16", "of_8"), [("H100", 8, 16), ("B200", 8, 16), ("A100", 0, 0)])
def test_a_part_of_the_chip_has_a_cluster_of_16(device: str, of_16: int, of_8: int) -> None:
    found = devices.describe(device)
    assert (clusters.at_once(found, 16), clusters.at_once(found, 8)) == (of_16, of_8)


def test_words_of_a_cluster_lie_in_shared_memory_and_nowhere_else() -> None:
    chosen = group.choose(problem("sm_90a", 256, 64))
    assert chosen is not None
    layout, through_l2 = chosen.layout, replace(chosen.layout, cluster=False)
    assert layout.ring == 0 and through_l2.ring > 0
    assert layout.shared_bytes - through_l2.shared_bytes == 2 * (layout.slot * layout.word + 8 * layout.tiles)
    assert layout.defines["CLUSTER"] == 1 and through_l2.defines["CLUSTER"] == 0


def test_a_device_that_refuses_gets_another_exchange(refused: devices.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And `explain` says why; the backend takes the problem all the same."""
    each = replace(problem("sm_90a", 256, 64), device=refused)
    monkeypatch.setattr(group, "fit", lambda layout, arch: layout)
    monkeypatch.setattr(group, "_refusal", lambda layout, blocks, device: "no room\nfor it" * layout.cluster)
    chosen = group.choose(each)
    assert chosen is not None and chosen.layout.cluster
    group.prepare(each)
    chosen = group.choose(each)
    assert chosen is not None and not chosen.layout.cluster and not group.unsupported(each)
    monkeypatch.setattr(dispatch, "device_of", lambda device: refused)
    layer = gpu_rnn.LSTM(8, 8, dtype=torch.bfloat16, device="meta")
    said = str(gpu_rnn.explain(layer, torch.empty(3, 2, 8, dtype=torch.bfloat16, device="meta")))
    assert "group exchanges through L2, not in clusters: no room\n" in said


def test_a_device_that_refuses_both_has_a_reason(refused: devices.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    each = replace(problem("sm_90a", 256, 64), device=refused)
    monkeypatch.setattr(group, "fit", lambda layout, arch: layout)
    monkeypatch.setattr(group, "_refusal", lambda layout, blocks, device: "no room")
    group.prepare(each)
    assert group.unsupported(each) == ["no room"]


NEEDS_CUPY = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="CuPy is not installed (gpu-rnn[cuda12] or [cuda13])"
)


@NEEDS_CUPY
@pytest.mark.parametrize(("cluster", "allowed"), [(1, []), (8, []), (16, [(7, clusters.NON_PORTABLE_ALLOWED, 1)])])
def test_more_than_8_blocks_are_asked_for(
    cluster: int, allowed: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the driver counts clusters, not blocks, of which all run at once; their launch is a plain one."""
    import cupy

    said: list[tuple[int, int, int]] = []
    launched: list[Any] = []

    class Kernel:
        ptr = 7

        def __call__(self, *arguments: Any) -> None:
            launched.append(arguments)

    class Module:
        def load(self, code: bytes) -> None: ...

        def get_function(self, name: str) -> Kernel:
            return Kernel()

    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, arch: b"")
    monkeypatch.setattr(nvrtc, "_current", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(cupy.cuda, "Module", Module)
    driver = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        CUDADriverError=cupy.cuda.driver.CUDADriverError,
        funcSetAttribute=lambda *arguments: said.append(arguments),
        occupancyMaxActiveBlocksPerMultiprocessor=lambda *arguments: 1,
    )
    monkeypatch.setattr(cupy.cuda, "driver", driver)
    monkeypatch.setattr(clusters, "resident", lambda function, blocks, threads, shared: 128 // blocks)
    function = nvrtc.Function("", "kernel", "sm_90a", 1024, cluster=cluster)
    assert function.resident(torch.device("cuda", 0), 256) == (132 if cluster == 1 else 128)
    assert said == [(7, 8, 1024), *allowed]
    function(16, 256, [3], torch.device("cuda", 0))
    assert launched[0][-1] is False


@NEEDS_CUPY
def test_groups_that_are_clusters_are_no_cooperative_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which waits until all groups are on the device."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(nvrtc, "Function", lambda *arguments: made.append(arguments[-2:]))
    monkeypatch.setattr(group, "fit", lambda layout, arch: layout)
    chosen = group.choose(problem("sm_90a", 256, 64))
    assert chosen is not None
    for layout in (
        chosen.layout,
        replace(chosen.layout, cluster=False),
        replace(chosen.layout, cluster=False, members=1),
    ):
        group._function.__wrapped__(layout, "sm_90a")
    assert made == [(False, 16), (True, 1), (False, 1)]


def test_without_a_driver_nobody_counts_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_driver", lambda: SimpleNamespace())
    with pytest.raises(OSError, match="older than clusters"):
        clusters.resident(0, 16, 256, 1024)


ASKING = """
from gpu_rnn.backends.group import clusters
assert [clusters.resident(0, blocks, 256, 1024) for blocks in (2, 8, 16)] == [64, 16, 8]
driver.fail(launches=912)
try:
    clusters.resident(0, 16, 256, 1024)
except OSError as error:
    assert "no clusters of 16 blocks: status 912" in str(error)
else:
    raise AssertionError
"""


@NEEDS_STUB
def test_the_driver_is_asked_for_clusters_of_that_many_blocks() -> None:
    run(ASKING)
