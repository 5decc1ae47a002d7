# SPDX-License-Identifier: Apache-2.0
"""How variants are compared: checked, timed and written down."""
