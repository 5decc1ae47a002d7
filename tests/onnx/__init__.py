# SPDX-License-Identifier: Apache-2.0
"""Of gpu_rnn/call."""
