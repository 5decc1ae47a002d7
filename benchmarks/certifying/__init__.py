# SPDX-License-Identifier: Apache-2.0
"""What the certificate, its steps and the soak are made of."""
