# SPDX-License-Identifier: Apache-2.0
"""The tests, in the package's folders; `support` holds what they share, `project` what is of the repository."""

import sys
from pathlib import Path

# Where Python starts in this folder, tests/keras would stand before Keras.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
