# SPDX-License-Identifier: Apache-2.0
"""What is compared: named problems, and each of their variants on the same weights and input."""
