# SPDX-License-Identifier: Apache-2.0
"""What is measured, how, and what is made of it; README.md beside this says how to run it."""
