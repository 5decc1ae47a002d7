# SPDX-License-Identifier: Apache-2.0
"""The backends: their limits, their costs, their launches."""
