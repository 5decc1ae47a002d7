# SPDX-License-Identifier: Apache-2.0
"""What tells about calls and machines: explain, tune, debug, doctor.

They stand above the layers and ask what a call asks, by the same functions: what they say is what happens.
"""

from gpu_rnn.diagnostics.debugging import Difference, debug
from gpu_rnn.diagnostics.explanation import Explanation, explain
from gpu_rnn.diagnostics.tuning import Pass, Tuned, tune
from gpu_rnn.dispatch import Row

__all__ = ["Difference", "Explanation", "Pass", "Row", "Tuned", "debug", "explain", "tune"]
