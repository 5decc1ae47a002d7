# SPDX-License-Identifier: Apache-2.0
"""W_hh on chip between the blocks of a group: CUDA C++ through CuPy."""
