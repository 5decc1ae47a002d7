# SPDX-License-Identifier: Apache-2.0
"""Every example in the README, the site and the docstrings runs; every link leads somewhere; the site builds."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

import gpu_rnn
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.dispatch import choice
from gpu_rnn.layers import options as layer_options
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
SOURCES = sorted((ROOT / "gpu_rnn").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")
LAYERS = (gpu_rnn.LSTM, gpu_rnn.GRU, gpu_rnn.RNN, gpu_rnn.Recurrent)


def needs(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def program(page: Path) -> str:
    """The examples of a page, one after the other, each on the line where the page has it."""
    text, parts, lines = page.read_text(), [], 0
    for example in EXAMPLE.finditer(text):
        begin = text.count("\n", 0, example.start(1))
        parts.append("\n" * (begin - lines) + example[1])
        lines = begin + example[1].count("\n")
    return "".join(parts)


def page_or_slow(page: Path) -> Path | ParameterSet:
    """AOTInductor compiles C++ for half a minute."""
    return pytest.param(page, marks=pytest.mark.slow) if "aoti_compile" in program(page) else page


# What torch's exporter to ONNX and AOTInductor warn of, whatever they are given.
of_torch = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning",
    "ignore:# The axis name. .* will not be used",
    "ignore:.torch.jit.script:DeprecationWarning",
)


@of_torch
@pytest.mark.parametrize("page", [page_or_slow(page) for page in PAGES], ids=name_of)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = program(page)
    if "gpu_rnn.onnx" in code:
        needs("onnxscript", "onnxruntime")
    if "aoti_compile" in code and shutil.which("g++") is None:
        pytest.skip("no g++ is installed, with which AOTInductor compiles")
    script = tmp_path / "example.py"  # a file, so that a traced step can be shown beside its source
    script.write_text(code)
    if "keras" not in code:
        monkeypatch.chdir(tmp_path)
        precision = torch.backends.cudnn.rnn.fp32_precision  # an example sets it, for the whole process
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
        runpy.run_path(str(script), run_name="__main__")
        return
    needs("keras")  # whose backend is chosen before it is imported: in a process of its own
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_page_but_the_reference_has_examples() -> None:
    assert {page.name for page in PAGES if not program(page)} == {"reference.md"}


class Shown(doctest.OutputChecker):
    """An example need not show what it prints."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@of_torch
@pytest.mark.parametrize("path", [path for path in SOURCES if ">>> " in path.read_text()], ids=module_of)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
def test_the_examples_of_the_docstrings_of_a_module_run(path: Path, tmp_path: Path) -> None:
    """As they are pasted: with what they import, and a folder."""
    if "keras" in path.parts:
        needs("keras")
        importlib.import_module("tests.support.keras_layers")  # on which of its backends
    if path.parent.name == "onnx":
        needs("onnxscript")
    if path.stem == "nvrtc" and nvrtc.unavailable():
        pytest.skip(nvrtc.unavailable())
    module, known = importlib.import_module(module_of(path)), {"folder": tmp_path}
    known |= {name: it for name, it in vars(module).items() if getattr(it, "__module__", "") == module.__name__}
    runner, report = doctest.DocTestRunner(Shown(), optionflags=doctest.ELLIPSIS), []
    for example in doctest.DocTestFinder().find(module, globs=known):
        runner.run(example, out=report.append)
    assert runner.tries and not report, "".join(report)


def test_examples_import_what_the_package_does_not() -> None:
    """A submodule that `import gpu_rnn` leaves out is there in a test all the same, once another has imported it."""
    ask = "import gpu_rnn, types; print(*[n for n, m in vars(gpu_rnn).items() if isinstance(m, types.ModuleType)])"
    there = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    left_out = {path.stem for path in (ROOT / "gpu_rnn").iterdir()} - set(there.split())
    for path in SOURCES:
        for name in set(re.findall(r"^ +>>> .*\bgpu_rnn\.([a-z]+)\.", path.read_text(), re.M)) & left_out:
            assert re.search(rf">>> (import .*|from )gpu_rnn\.{name}", path.read_text()), f"{path}: gpu_rnn.{name}"


def anchors(page: Path) -> set[str]:
    """What a link may name in a page: its headings as Markdown's toc spells them, and the objects of the reference."""
    text = EXAMPLE.sub("", page.read_text())
    headings = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.*)$", text, re.M))
    return {re.sub(r"[-\s]+", "-", heading) for heading in headings} | set(re.findall(r"^::: (\S+)$", text, re.M))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target, anchor in LINK.findall(EXAMPLE.sub("", page.read_text())):
        if "://" in target:
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(f"{target}#{anchor}")
    assert not broken


def test_every_page_is_in_the_navigation() -> None:
    entries = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(entries) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    needs("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in DOCS.glob("*.md"):
        html = (tmp_path / f"{page.stem}.html").read_text()
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=\"?(https?:[^\s\">]+)", html)
        assert not [url for url in loaded if not url.endswith(".html")]


def documented(page: str) -> set[str]:
    """What stands between single backticks in a page."""
    return set(re.findall(r"`([^`\n]+)`", EXAMPLE.sub("", (DOCS / page).read_text())))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_every_option_is_documented(layer: type) -> None:
    parameters = inspect.signature(layer).parameters | inspect.signature(layer.forward).parameters
    named = {name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    options = named | set(layer_options.DEFAULTS)
    assert options - {"proj_size"} <= documented("options.md")  # RNN and GRU take it to refuse it, as torch.nn's do


def test_every_backend_is_documented() -> None:
    assert set(choice.BACKENDS) <= documented("backends.md")


def test_every_environment_variable_is_documented() -> None:
    sources = "".join(path.read_text() for path in SOURCES)
    read = set(re.findall(r"_given\(\"(GPU_RNN_\w+)\"\)", sources))
    elsewhere = [path for path in SOURCES if path.name != "environment.py"]
    assert not [path for path in elsewhere if re.search(r"environ\b[^\n]*?\"GPU_RNN_", path.read_text())]
    assert read and read == {name for name in documented("backends.md") if name.startswith("GPU_RNN_")}


def test_every_public_name_is_in_the_reference() -> None:
    reference = (DOCS / "reference.md").read_text()
    for name in gpu_rnn.__all__:
        assert name == "__version__" or f"::: gpu_rnn.{name}\n" in reference, name


def test_the_reference_goes_by_public_paths() -> None:
    """Names of `gpu_rnn`, or of a module right below it: what stands deeper moves without a change to the docs."""
    paths = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.M)
    deep = {module_of(path) for path in SOURCES if path.parent != ROOT / "gpu_rnn" and path.stem != "__init__"}
    assert paths and not [path for path in paths if ".".join(path.split(".")[:3]) in deep]


def test_every_name_of_an_activation_is_documented() -> None:
    assert set(gpu_rnn.activations.ACTIVATIONS) <= documented("options.md")


def test_every_name_of_an_initializer_is_documented() -> None:
    assert set(gpu_rnn.initializers.INITIALIZERS) <= documented("options.md")
