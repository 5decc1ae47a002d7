# SPDX-License-Identifier: Apache-2.0
"""From a step function to a program, its derivative and its kernels."""
