# SPDX-License-Identifier: Apache-2.0
"""The demonstration behind ``gpu-rnn demo``: real recordings, real training, beside torch.nn on the same data."""
