# SPDX-License-Identifier: Apache-2.0
"""Other libraries' models, exporters and tests, with our layers."""
