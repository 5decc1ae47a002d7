# SPDX-License-Identifier: Apache-2.0
"""One small file per backend: its limits, its cost, and how it is launched."""
