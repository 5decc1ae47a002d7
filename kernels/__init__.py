# SPDX-License-Identifier: Apache-2.0
"""Kernel sources, importable as ``gpu_rnn.kernels``; nothing in here imports torch."""
