# SPDX-License-Identifier: Apache-2.0
"""Random calls of every backend beside loops by hand: ``python tests/fuzzing --seconds 600``.

`formulas` draws cells, `cases` draws calls and compares them, `__main__` is the command.
"""
