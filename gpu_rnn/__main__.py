# SPDX-License-Identifier: Apache-2.0
"""``python -m gpu_rnn`` is ``gpu-rnn``."""

import sys

from gpu_rnn.cli import main

sys.exit(main())
