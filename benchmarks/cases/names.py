# SPDX-License-Identifier: Apache-2.0
"""What the variants are called that are not ours. Reading results needs these, and no torch."""

TORCH = "torch.nn"
FLASHRNN, TORCHRL = ON_A_GPU = ("flashrnn", "torchrl")  # other libraries' kernels, which run.py measures beside ours
BY_HAND, COMPILED, ONNXRUNTIME = ON_A_CPU = ("by-hand", "torch.compile", "onnxruntime")
PEERS = ON_A_GPU + ON_A_CPU
LIBRARIES = (FLASHRNN, TORCHRL, ONNXRUNTIME)  # of these a row names the version
