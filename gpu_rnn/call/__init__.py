# SPDX-License-Identifier: Apache-2.0
"""A layer's call, from its arguments to the two passes on a backend, under every transform and recorder."""
