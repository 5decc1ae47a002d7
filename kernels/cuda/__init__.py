# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels, read as text and compiled at run time with NVRTC."""
