# SPDX-License-Identifier: Apache-2.0
"""For the documentation site: an example of a docstring, "Example::" and an indented block, as highlighted Python."""

import re
from textwrap import dedent
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(\S.*)::\n\n((?: {4}.*\n|\n)+)", re.M)


def fenced(match: re.Match[str]) -> str:
    title = f"**{match[1]}**" if match[1].startswith("Example") else f"{match[1]}:"
    return f"{title}\n\n```python\n{dedent(match[2]).strip()}\n```\n\n"


class Examples(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and "::\n" in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value + "\n").strip()
