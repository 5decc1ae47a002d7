# SPDX-License-Identifier: Apache-2.0
"""What the variants are called that are not ours. Reading results needs these, and no torch."""

TORCH = "torch.nn"
FLASHRNN, TORCHRL = PEERS = ("flashrnn", "torchrl")  # other libraries' kernels, which run.py measures beside ours
