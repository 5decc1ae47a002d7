# SPDX-License-Identifier: Apache-2.0
"""What tests share: calls and their truths, layers beside torch.nn's and Keras's, stand-ins for a GPU."""
