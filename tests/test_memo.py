# SPDX-License-Identifier: Apache-2.0
"""What a process keeps in memory: all of it is registered, bounded, and freed by `gpu_rnn.clear_caches`."""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn import memo
from gpu_rnn.backends.group import launch as group
from gpu_rnn.dispatch import choice

PACKAGE = Path(gpu_rnn.__file__).parent
REMEMBER = {"lru_cache", "cache", "cached_property"}  # of functools
CHANGES = {"add", "append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


def modules() -> Iterator[ModuleType]:
    """All of the package, but for device code and those that want Keras, matplotlib or onnxscript."""
    others = tuple(f"gpu_rnn.{name}" for name in ("keras", "onnx", "kernels", "demo", "__main__"))
    for module in pkgutil.walk_packages(gpu_rnn.__path__, "gpu_rnn."):
        if not module.name.startswith(others):
            yield importlib.import_module(module.name)


def named(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """A module's values, those of its own classes, and those that its own objects hold."""
    for name, value in vars(module).items():
        yield name, value
        owner = value if inspect.isclass(value) else type(value)
        if owner.__module__ == module.__name__ and not isinstance(value, tuple):
            yield from ((f"{name}.{key}", each) for key, each in getattr(value, "__dict__", {}).items())


def answers() -> dict[str, Any]:
    """Every function of the package that remembers its answers, wherever it stands: in a class, in a closure."""
    found = [each for each in gc.get_objects() if type(each) is functools._lru_cache_wrapper]
    return {
        f"{each.__module__}.{each.__qualname__}": each for each in found if each.__module__.split(".")[0] == "gpu_rnn"
    }


def containers() -> dict[str, Any]:
    """Every list, dict and set of the package that is no table, whose name is in capitals, and of no dunder or
    NamedTuple."""
    kept = {}
    for module in modules():
        for name, value in named(module):
            last = name.split(".")[-1]
            if isinstance(value, (list, dict, set)) and not last.isupper() and not name.startswith("__"):
                kept |= {} if last.startswith(("__", "_field")) else {f"{module.__name__}.{name}": value}
    return kept


def test_everything_that_is_kept_is_registered() -> None:
    kept = containers() | answers()
    assert len(answers()) > 35 and "gpu_rnn.backends.step.cuda_graphs.Chunks.kept" in kept
    registered = {id(store.holder) for store in memo.stores()} | {id(memo._stores)}
    assert not [name for name, holder in kept.items() if id(holder) not in registered]


def test_functools_is_asked_by_the_register_alone() -> None:
    """Also in modules that are not imported here, and in functions that have not run."""
    asking = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            taken = node.module == "functools" if isinstance(node, ast.ImportFrom) else False
            whole = isinstance(node, ast.Import) and any(alias.name == "functools" for alias in node.names)
            if whole or (taken and REMEMBER & {alias.name for alias in node.names}):
                asking.append(path.relative_to(PACKAGE).as_posix())
    assert asking == ["memo.py"]


def test_tables_are_never_changed() -> None:
    """What is in capitals and kept nowhere: otherwise it would be a cache."""
    changed = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                table: ast.expr = node.value
            elif isinstance(node, ast.Attribute) and node.attr in CHANGES:
                table = node.value
            elif isinstance(node, ast.AugAssign):
                table = node.target
            else:
                continue
            name = table.id if isinstance(table, ast.Name) else table.attr if isinstance(table, ast.Attribute) else ""
            changed += [f"{path.name}:{node.lineno} {name}"] * name.isupper()
    assert not changed


def test_every_store_is_bounded() -> None:
    """Or of a function without arguments, or it says what bounds it."""
    for store in memo.stores():
        counted = store.bound is not None or store.stays
        assert counted or not inspect.signature(store.holder).parameters, store.name


def size(store: memo.Store) -> int:
    return store.holder.cache_info().currsize if hasattr(store.holder, "cache_info") else len(store.holder)


LAYERS = {
    "default": lambda: gpu_rnn.GRU(4, 8),
    "activation": lambda: gpu_rnn.LSTM(4, 8, activation="softsign", bidirectional=True),
    "options": lambda: gpu_rnn.GRU(4, 8, 2, layer_norm=True, backend="step"),
    "reference": lambda: gpu_rnn.RNN(4, 8, backend="reference"),
}


def call(layer: Any, x: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    layer.zero_grad()
    y = layer(x)[0]
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters())]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", LAYERS)
def test_after_clearing_nothing_is_kept_and_the_bits_are_the_same(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(5, 3, 4)
    expected = call(layer, x)
    assert any(size(store) for store in memo.stores() if not store.stays)
    gpu_rnn.clear_caches()
    assert not [store.name for store in memo.stores() if not store.stays and size(store)]
    assert same(call(layer, x), expected)
    assert gpu_rnn.cells.lstm() is gpu_rnn.cells.lstm() and layer.recurrence == LAYERS[name]().recurrence


def test_what_a_cell_left_goes() -> None:
    """Its program, and all that follows from it, hangs on the caches alone once its layer is gone."""

    def step(x: Any, r: Any, s: Any) -> Any:
        return torch.tanh(x.a + r.a) * 1.25 + 0.5 * s.h

    def programs() -> int:
        gc.collect()
        return sum("1.25" in each.text for each in gc.get_objects() if type(each).__name__ == "Program")

    call(gpu_rnn.Recurrent(gpu_rnn.Recurrence(step, gates=("a",), states=("h",)), 4, 8), torch.randn(5, 3, 4))
    assert programs()
    gpu_rnn.clear_caches()
    assert not programs()


def test_other_threads_go_on() -> None:
    layers, x = [make() for make in LAYERS.values()], torch.randn(5, 3, 4)
    expected = [call(layer, x) for layer in layers]

    def work(number: int) -> bool:
        if number == len(layers):
            for _ in range(200):
                gpu_rnn.clear_caches()
            return True
        return all(same(call(layers[number], x), expected[number]) for _ in range(20))

    with ThreadPoolExecutor(len(layers) + 1) as pool:
        assert all(pool.map(work, range(len(layers) + 1)))


def test_what_stays_stays() -> None:
    """Above all what was said, and which kernel a number names."""
    for store in memo.stores():
        assert not store.stays or len(store.stays) > 20, store.name
    word = group.error_word(torch.device("cpu"))
    gpu_rnn.clear_caches()
    assert group.error_word(torch.device("cpu")) is word


def test_one_room_s_answers_can_be_cleared_alone() -> None:
    call(gpu_rnn.LSTM(4, 8, activation="softsign"), torch.randn(5, 3, 4))
    assert choice._select.cache_info().currsize
    programs = {store.name: size(store) for store in memo.stores() if "compiler" in store.name}
    memo.clear("gpu_rnn.dispatch")
    assert not choice._select.cache_info().currsize
    assert any(programs.values()) and programs == {
        store.name: size(store) for store in memo.stores() if store.name in programs
    }
