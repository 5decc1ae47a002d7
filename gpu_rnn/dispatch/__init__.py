# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend: by cost models, or by what was measured."""

from gpu_rnn.backends import BACKENDS
from gpu_rnn.dispatch.choice import Row, forget

__all__ = ["BACKENDS", "Row", "forget"]
