# SPDX-License-Identifier: Apache-2.0
"""Cycles of a kernel's time loop from its machine code: no GPU runs it, so nothing here is a measurement."""
