# SPDX-License-Identifier: Apache-2.0
"""C for the CPU, read as text and compiled at run time."""
