# SPDX-License-Identifier: Apache-2.0
"""Keras on its PyTorch backend, for the tests that compare with it."""

import os

os.environ["KERAS_BACKEND"] = "torch"  # Keras reads it when it is imported
import keras

__all__ = ["keras"]
