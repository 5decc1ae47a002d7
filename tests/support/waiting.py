# SPDX-License-Identifier: Apache-2.0
"""How long a test waits for a process or a thread."""

PATIENCE = 1800.0
"""Seconds: the end of what hangs, and of nothing that is slow. What Ray Train computes in less than a minute took more
than 5 where ten processes shared each core."""
