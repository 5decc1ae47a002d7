# SPDX-License-Identifier: Apache-2.0
"""From the rows of results to pages and pictures."""
