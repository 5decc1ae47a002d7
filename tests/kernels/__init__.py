# SPDX-License-Identifier: Apache-2.0
"""Of kernels, and of the runtime that runs them on the CPU."""
