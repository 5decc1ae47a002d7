# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers for PyTorch that run the whole time loop on the GPU, with every option at the speed of the default."""

from gpu_rnn.recurrence import Recurrence

__version__ = "0.1.0"

__all__ = ["Recurrence", "__version__"]
