# SPDX-License-Identifier: Apache-2.0
"""What `gpu_rnn.convert` would do with a file: a model that torch.save wrote, or a Python source, which is not run."""

from __future__ import annotations

import ast
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from gpu_rnn.layers import convert
from gpu_rnn.layers.conversion import TWINS

BECOMES = {f"torch.nn.{theirs.__name__}": f"gpu_rnn.{ours.__name__}" for theirs, ours in TWINS.items()}
BEGINNINGS = (b"PK", b"\x80")  # of what torch.save writes: a zip, and a pickle as PyTorch 1.5 and older wrote
LONGEST = 60  # characters of a call that are shown


def report(path: Path, trust: bool = False) -> str:
    """A table for people.

    Args:
        path: a model that torch.save wrote, or a Python source (.py).
        trust: a whole model may be loaded, which runs the code that the file names.

    Raises:
        ValueError: there is no such file, or it holds no model; a whole model that is not trusted.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix == ".py":
        return "\n".join(_of_source(path)) or f"{path} makes none of torch.nn's recurrent layers"
    model = _loaded(path, trust)
    if isinstance(model, nn.Module):
        return repr(convert(model)).replace("are gpu_rnn's now", "would be gpu_rnn's")
    if isinstance(model, dict):
        return f"{path} holds weights and no modules: load them into a converted model, their names are the same"
    raise ValueError(f"{path} holds a {type(model).__name__}, which is no model")


def _loaded(path: Path, trust: bool) -> object:
    with path.open("rb") as file:
        if not file.read(2).startswith(BEGINNINGS):  # a pickle machine fails at any text in a way of its own
            raise ValueError(f"{path} is nothing that torch.save wrote: it is no zip file, and no pickle")
    if kind := _program_kind(path):
        raise ValueError(f"{path} is {kind}, whose layers are operations: convert the model that it was made from")
    try:
        return torch.load(path, map_location="meta", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise ValueError(f"{path} is nothing that torch.save wrote: {error}") from error
        raise ValueError(
            f"{path} holds more than weights, and loading it runs the code that it names: if you trust it, add --trust"
        ) from error
    except (RuntimeError, EOFError) as error:
        reason, *_ = str(error).split(". ")  # what follows is about torch's own state
        raise ValueError(f"{path} is nothing that torch.save wrote, or was cut off: {reason}") from error


def _program_kind(path: Path) -> str:
    """What else torch writes into a zip file, "" where it is none."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        parts = {part for name in archive.namelist() for part in Path(name).parts}
    if "archive_format" in parts:
        return "an exported program"
    return "a TorchScript program" if "code" in parts else ""


def _of_source(path: Path) -> Iterator[str]:
    """A line for each place that makes a layer, or derives a class from one."""
    try:
        tree = ast.parse(path.read_text())
    except SyntaxError as error:
        raise ValueError(f"{path} is no Python source: {error}") from error
    imports = dict(_imports(tree))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call | ast.ClassDef)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.Call) and (ours := BECOMES.get(_full_name(node.func, imports))):
            call = ast.unparse(node)
            yield f"{path}:{node.lineno}: {call if len(call) <= LONGEST else call[:LONGEST] + '…'} becomes {ours}"
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if _full_name(base, imports) in BECOMES:
                    yield f"{path}:{node.lineno}: class {node.name} is left: a subclass, change its base class"


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Of each import the name that the file gives it, and its full one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                (a.asname or a.name.split(".")[0], a.name if a.asname else a.name.split(".")[0]) for a in node.names
            )
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _full_name(node: ast.AST, imports: dict[str, str]) -> str:
    """The dotted name that an expression is, with what its first part was imported as; "" if it is none."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join((imports.get(node.id, node.id), *reversed(parts))) if isinstance(node, ast.Name) else ""
