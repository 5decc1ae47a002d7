# SPDX-License-Identifier: Apache-2.0
"""The tests' own CUDA sources, where they run, and what shows that each synchronisation is needed."""
