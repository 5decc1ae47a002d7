# SPDX-License-Identifier: Apache-2.0
"""The pages for those who change the library name what exists, and the rules that torch forces are still forced."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.paths import ROOT

PAGES = ("docs/architecture.md", "CONTRIBUTING.md", "kernels/README.md")
FOLDERS = (ROOT, ROOT / "gpu_rnn", ROOT / "kernels")  # that paths of these pages start from
SOURCES = ("gpu_rnn", "kernels", "tests", "benchmarks", "examples", "tools")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
PATH = re.compile(r"(?<![\w.*/-])(?:[\w.*-]+/)+[\w.*-]*|(?<![\w./*])[\w*]+\.(?:py|cuh?|md|toml|json|txt)\b")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?:\(\))?")


@cache
def sources() -> dict[Path, str]:
    files = [*(ROOT / name for name in ("Makefile", "pyproject.toml", "Dockerfile"))]
    for folder in SOURCES:
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}]
    return {file: file.read_text() for file in files}


@cache
def words() -> frozenset[str]:
    return frozenset(word for text in sources().values() for word in re.findall(r"[A-Za-z_]\w*", text))


def exists(path: str, page: str) -> bool:
    if "/" not in path and any(file.name == path for file in sources()):
        return True
    places = (*FOLDERS, (ROOT / page).parent)
    return any(any(place.glob(path.rstrip("/"))) for place in places)


def defined(name: str) -> bool:
    """Whether a dotted name is what one of our files, or a class in one, calls something; or a word of a source."""
    first, *inner = name.removesuffix("()").removeprefix("gpu_rnn.").split(".")
    if not inner:
        return first in words()
    files = [text for file, text in sources().items() if first in (file.stem, file.parent.name)]
    files += [text for text in sources().values() if re.search(rf"^class {first}\b", text, re.M)]
    if not files:  # another library's: torch.where
        return name in "\n".join(sources().values())
    return any(re.search(rf"\b{word}\b", text) for word in inner[-1:] for text in files)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    text = re.sub(r"<\w+>", "*", (ROOT / page).read_text())  # a placeholder is any
    prose = FENCE.sub("", text)
    shown = [*FENCE.findall(text), *re.findall(r"^    .*$", prose, re.M)]
    missing = [path for path in PATH.findall("\n".join(shown)) if not exists(path, page)]
    for code in re.findall(r"`([^`\n]+)`", prose):
        paths = PATH.findall(code)
        missing += [path for path in paths if not exists(path, page)]
        if not paths and NAME.fullmatch(code) and not defined(code):
            missing.append(code)
    assert not missing


def named(module: str) -> bool:
    """Whether a name like gpu_rnn.call.run.sequence leads to a file that has the next word."""
    place, inner = ROOT, module.replace("gpu_rnn.kernels", "kernels").split(".")
    while inner and (place / inner[0]).is_dir():
        place /= inner.pop(0)
    if inner and (place / f"{inner[0]}.py").exists():
        place /= f"{inner.pop(0)}.py"
    text = (place / "__init__.py" if place.is_dir() else place).read_text()
    return all(re.search(rf"\b{word}\b", text) for word in inner[:1])


def test_what_comments_name_exists() -> None:
    missing = []
    for file, text in sources().items():
        modules = re.findall(r"`(gpu_rnn(?:\.\w+)+)", text) if file.suffix == ".py" else []
        paths = re.findall(r"`((?:[\w-]+/)+\w+\.(?:py|cuh?|md))`", text)
        missing += [f"{file.relative_to(ROOT)}: {name}" for name in modules if not named(name)]
        ours = [path for path in paths if path != "keras/engine/saving.py"]  # of Keras 2
        missing += [f"{file.relative_to(ROOT)}: {path}" for path in ours if not exists(path, str(file))]
    assert not missing


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("*/*.md")), ids=lambda page: page.parent.name
)
def test_what_a_page_has_run_exists(page: Path) -> None:
    text = re.sub(r"<\w+>", "*", page.read_text())
    modules = re.findall(r"python -m ((?:tests|benchmarks|tools)[\w.]*)", text)
    scripts = re.findall(r"\b(?:tests|benchmarks|examples|tools)/[\w/*]+\.py\b", text)
    asked = [*scripts, *(f"{module.replace('.', '/')}*" for module in modules)]
    assert not [path for path in asked if not any(ROOT.glob(path))]


# What torch does, and what follows from it: the rules of docs/architecture.md that are marked. Where one of these
# fails, torch has changed, and the rule may go.


@torch.library.custom_op("gpu_rnn_tests::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    return x.sin()


sine.register_fake(torch.empty_like)
sine.register_autograd(
    lambda ctx, d: d * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Sine(torch.autograd.Function):
    """The same with a rule for forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[no-untyped-def]
        return tangent * ctx.saved_tensors[0].cos()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own jvp
def test_a_custom_op_has_no_tangent_and_torch_func_refuses_it() -> None:
    x = torch.ones(2)
    _, tangent = torch.func.jvp(sine, (x,), (x,))
    assert (tangent == 0).all()  # without a word; it is cos(1)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform(lambda x: sine(x).sum())(x)


def test_dynamo_refuses_a_function_with_a_jvp() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="jvp"):
        torch.compile(Sine.apply, fullgraph=True, backend="eager")(torch.ones(2, requires_grad=True))


def test_an_op_that_writes_to_its_arguments_has_no_derivative() -> None:
    writes = torch.library.custom_op(
        "gpu_rnn_tests::writes", lambda x: None, mutates_args=("x",), schema="(Tensor(a!) x) -> ()"
    )
    with pytest.raises(RuntimeError, match="non-functional"):
        writes.register_autograd(lambda ctx, d: d)


def test_an_op_returns_neither_an_input_nor_a_view_of_another_output() -> None:
    same = torch.library.custom_op("gpu_rnn_tests::same", lambda x: x, mutates_args=(), schema="(Tensor x) -> Tensor")
    view = torch.library.custom_op(
        "gpu_rnn_tests::view", lambda x: (y := x.sin(), y[-1]), mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)"
    )
    for op in (same, view):
        with pytest.raises(RuntimeError, match="alias"):
            op(torch.ones(2))


def test_a_structure_cannot_be_an_argument_of_an_op() -> None:
    def takes(x: Tensor, page: Path) -> Tensor:
        return x.sin()

    takes.__annotations__ = {"x": Tensor, "page": Path, "return": Tensor}
    with pytest.raises(ValueError, match="unsupported type"):
        torch.library.custom_op("gpu_rnn_tests::takes", takes, mutates_args=())


def test_hardsigmoid_of_aten_has_no_second_derivative() -> None:
    x = torch.zeros(1, requires_grad=True)
    (d,) = torch.autograd.grad(torch.nn.functional.hardsigmoid(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(d, x)


def test_the_dtype_of_torchs_layers_under_autocast_depends_on_the_layer() -> None:
    x = torch.randn(2, 1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [layer(3, 4)(x)[0].dtype for layer in (torch.nn.LSTM, torch.nn.GRU)]
    assert dtypes == [torch.bfloat16, torch.float32]
