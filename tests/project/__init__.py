# SPDX-License-Identifier: Apache-2.0
"""Of the repository: its rules, documents, packages, the files of earlier versions, and the suite itself."""
