# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend: by cost models, or by what was measured.

A name is all that comes out. A choice may depend on what a `Problem` holds and on nothing else: so it can be made for
a GPU that is not there, remembered, tested without a device, and explained by the very code that made it.
"""

from gpu_rnn.backends import BACKENDS
from gpu_rnn.dispatch.choice import Row, forget

__all__ = ["BACKENDS", "Row", "forget"]
