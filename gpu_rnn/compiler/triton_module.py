# SPDX-License-Identifier: Apache-2.0
"""Generated Triton code as importable modules.

Triton reads the source of what it compiles through `inspect`, so text that was merely exec'd does not compile. A loader
that hands out the text is enough for `inspect`: no file is written, and no other user can put one in its place.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import sys
from types import CodeType, ModuleType

from gpu_rnn.compiler import codegen
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize


class _Loader(importlib.abc.InspectLoader):
    def __init__(self, text: str) -> None:
        self.text = text

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text, f"{fullname}.py")


def triton_module(program: Program, functions: str = codegen.EXACT_FUNCTIONS) -> ModuleType:
    """The module with a program's functions `step_<k>` and `step_<k>_backward`; see `gpu_rnn.compiler.codegen`."""
    return _triton_module(program.text, functions)


@memoize(None, stays="Triton keeps the kernels compiled from them, as many as there are cells, anyway")
def _triton_module(text: str, functions: str) -> ModuleType:
    program = Program.parse(text)
    source = codegen.module_text(program, functions)
    # The digest keeps two cells of one name apart, and a cell from an earlier version of itself.
    name = f"gpu_rnn_generated_{program.name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(name, _Loader(source))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where inspect looks for the loader
    spec.loader.exec_module(module)
    return module
