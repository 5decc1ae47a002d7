# SPDX-License-Identifier: Apache-2.0
"""What tells about calls and machines: explain, tune, debug, doctor."""
