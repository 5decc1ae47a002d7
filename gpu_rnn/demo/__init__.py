# SPDX-License-Identifier: Apache-2.0
"""The demonstration behind ``gpu-rnn demo``: real recordings, real training, beside torch.nn on the same data.

One set of recordings is in the package, so that it runs without a network. It trains both sides on the same batches
from the same weights, since a faster layer that learns worse would be none.
"""
