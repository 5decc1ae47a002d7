# SPDX-License-Identifier: Apache-2.0
"""One product and one pointwise pass a step: every recurrence, every option, any device."""
