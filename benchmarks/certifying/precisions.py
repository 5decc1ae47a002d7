# SPDX-License-Identifier: Apache-2.0
"""The precisions that kernels compute in, and how far off a result in each may be."""

import torch

PRECISIONS = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
}

# Largest errors relative to the largest value. fp32: sums in another order. The floors under twice plain PyTorch's
# error are some units in the last place of the dtype: 2^-8 for bf16, 2^-11 for fp16 and tf32.
TIGHT, FLOORS = 3e-6, {"tf32": 5e-4, "bf16": 4e-3, "fp16": 5e-4}
