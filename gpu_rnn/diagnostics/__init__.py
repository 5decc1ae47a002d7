# SPDX-License-Identifier: Apache-2.0
"""What tells about calls and machines: explain, tune, debug, doctor."""

from gpu_rnn.diagnostics.debugging import Difference, debug
from gpu_rnn.diagnostics.explanation import Explanation, explain
from gpu_rnn.diagnostics.tuning import Pass, Tuned, tune
from gpu_rnn.dispatch import Row

__all__ = ["Difference", "Explanation", "Pass", "Row", "Tuned", "debug", "explain", "tune"]
