# SPDX-License-Identifier: Apache-2.0
"""CUDA sources on the CPU; README.md beside this says what that shows."""
