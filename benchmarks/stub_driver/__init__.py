# SPDX-License-Identifier: Apache-2.0
"""Triton's launcher over a driver that does nothing; README.md beside this says what that shows."""
