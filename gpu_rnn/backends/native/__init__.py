# SPDX-License-Identifier: Apache-2.0
"""The time loop in C on a CPU: limits and launch (`launch`), what is compiled (`text`), what it is given (`arguments`),
and the compiler (`building`)."""
