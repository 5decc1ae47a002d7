# SPDX-License-Identifier: Apache-2.0
"""The GPU's kernels on a CPU; README.md beside this says what that shows."""
