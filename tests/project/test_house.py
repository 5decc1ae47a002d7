# SPDX-License-Identifier: Apache-2.0
"""Rules of the repository that no linter checks."""

import ast
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "gpu_rnn"
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h", ".toml", ".sh"}
SOURCE_NAMES = {"Makefile", "Dockerfile", "constraints.txt", "run", "venv"}
# A path of one person's machine works nowhere else; a registry's host is for pip's configuration to name.
UNPORTABLE = re.compile(
    r"(?<![\w.])/(?:root|home|work|Users)/|(?:pypi|pythonhosted|npmjs|pytorch|debian)\.(?:org|com)/\w"
)


def tracked() -> list[Path]:
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the files of the repository are known to git only, and this is no git checkout")
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_every_source_names_its_licence() -> None:
    sources = [path for path in tracked() if path.suffix in SOURCES or path.name in SOURCE_NAMES]
    assert sources
    heads = {path: path.read_text().split("\n", 2)[:2] for path in sources}
    bare = [
        path.relative_to(ROOT)
        for path, head in heads.items()
        if "SPDX-License-Identifier: Apache-2.0" not in head[head[0].startswith("#!")]
    ]
    assert not bare


def test_no_file_names_a_machine() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in UNPORTABLE.finditer(text)]
    assert not found


def test_make_help_lists_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony
    command = ["make", "--no-print-directory", "help"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == phony[1].split()


def test_what_is_installed_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert all("==" in requirement for requirement in extras["dev"])
    asked = [*project["dependencies"], *extras["demo"], *extras["test"], *extras["dev"]]
    asked += [r for extra in ("cuda12", "cuda13", "docs", "keras") for r in extras[extra]]
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in asked} <= set(pinned)


CODE = ("gpu_rnn", "kernels", "tests", "benchmarks", "tools", "examples")
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def python_files() -> list[Path]:
    return [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_long() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in python_files()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def length_of_body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines after its arguments and its docstring, which are as long as what they describe."""
    begin = function.body[ast.get_docstring(function) is not None :] or function.body
    return (function.end_lineno or 0) - begin[0].lineno + 1


def test_no_function_is_long() -> None:
    lengths = {
        f"{path.relative_to(ROOT)} {node.name}": length_of_body(node)
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}


BESIDE = {"benchmarks", "clients", "kernels", "project"}  # folders of tests that are of no folder of the package


def test_every_folder_of_tests_is_one_of_the_package() -> None:
    """A test of gpu_rnn/x/y.py is in tests/x, one of gpu_rnn/x.py is tests/test_x.py or, of a part, test_x_part.py."""
    tests = sorted(path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py"))
    folders = {path.parent for path in tests} - {Path()}
    assert {str(folder) for folder in folders if not (PACKAGE / folder).is_dir()} == BESIDE
    modules = {path.stem.split("_")[1] for path in tests if path.parent == Path()}
    assert {name for name in modules if not (PACKAGE / f"{name}.py").exists()} == {"import"}


def test_benchmarks_run_without_the_tests_and_without_pytest() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {match[1]}"
        for path in sorted((ROOT / "benchmarks").rglob("*.py"))
        for match in re.finditer(r"^\s*(?:from|import) (tests|pytest)\b", path.read_text(), re.M)
    ]
    assert found == ["benchmarks/certifying/pytest_record.py imports pytest"]


# From the door down. A file imports from its own room and from the floors below.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("demo", "keras"),
    ("__init__",),
    ("diagnostics", "export", "interop", "onnx", "streams"),
    ("layers",),
    ("functional",),
    ("call",),
    ("dispatch",),
    ("backends",),
    ("cells", "initializers"),
    ("recurrence",),
    ("compiler",),
    ("activations", "cache", "devices", "kernels"),
    ("_version", "environment", "forking", "memo", "once", "spelling"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> set[str]:
    """The rooms that a file of the package imports from, in functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gpu_rnn":
            _, *room = node.module.split(".")
            rooms |= {room[0]} if room else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            rooms |= {[*name, "__init__"][1] for name in names if name[0] == "gpu_rnn"}
    return {room if room in FLOOR else "__init__" for room in rooms}


def test_every_room_has_a_floor() -> None:
    """A new file at the top of the package is a decision: it is entered here and in CONTRIBUTING.md."""
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms - {"kernels"} == set(FLOOR) - {"kernels"}


def test_imports_run_downwards() -> None:
    up = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        up += [
            f"{path.relative_to(ROOT)} imports {other}"
            for other in sorted(imported(path) - {room})
            if FLOOR[other] <= FLOOR[room]
        ]
    assert not up


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def running(node: ast.AST) -> Iterator[ast.AST]:
    """A syntax tree's nodes without what only type checkers read."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not is_for_type_checkers(child):
            yield from running(child)


def neighbours(path: Path) -> set[str]:
    """The files of its own package that a file imports, in functions too."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    modules = set()
    for node in running(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    beside = {file.stem for file in path.parent.glob("*.py")} | {folder.name for folder in path.parent.glob("*/")}
    inside = {module.removeprefix(f"{package}.") for module in modules if module.startswith(f"{package}.")}
    return {module.split(".")[0] for module in inside} & beside - {path.stem}


PACKAGES = sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE})


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: str(package.relative_to(PACKAGE)))
def test_no_package_imports_in_circles(package: Path) -> None:
    graph = {path.stem: neighbours(path) for path in package.glob("*.py")}
    list(TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_the_compiler_is_read_in_the_order_of_its_imports() -> None:
    """Its docstring lists every file; each imports only from those above it, and from nothing that knows a device."""
    folder = PACKAGE / "compiler"
    doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    listed = re.findall(r"^(\w+) {2,}\S", doc or "", re.M)
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    for place, name in enumerate(listed):
        assert neighbours(folder / f"{name}.py") <= set(listed[:place]), name
        assert imported(folder / f"{name}.py") <= {"compiler", "activations", "memo", "once"}, name


def test_backends_are_asked_by_their_protocols() -> None:
    """Nothing looks whether a backend has a function: the type checker knows it has (`gpu_rnn.backends.Backend`)."""
    files = [path for room in ("backends", "dispatch") for path in (PACKAGE / room).rglob("*.py")]
    files += [PACKAGE / "call" / name for name in ("passes.py", "wavefront.py", "run.py", "loops.py")]
    asking = [
        path.relative_to(PACKAGE).as_posix() for path in files if re.search(r"hasattr|ModuleType", path.read_text())
    ]
    assert not asking


# What stands in several files under one name although it is not one thing.
SAME_NAMES = {
    "LSTM, GRU": "the layers of each library whose name they have: torch.nn's and Keras's",
    "LONGEST_PATTERN, MOST_WARPS": "the same of each kernel that runs the whole loop, by its own limits",
}


def defined(path: Path) -> set[str]:
    """Classes and constants of a file, and names of types."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {node.name} if isinstance(node, ast.ClassDef) else {t.id for t in targets if isinstance(t, ast.Name)}
    return {name for name in names if name.lstrip("_")[:1].isupper() and len(name) > 1}


def test_a_name_means_one_thing() -> None:
    """Classes, constants and types: who meets one finds one definition. Functions are called by their module's name."""
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in defined(path):
            places.setdefault(name, []).append(path.relative_to(PACKAGE).as_posix())
    allowed = {name for names in SAME_NAMES for name in names.split(", ")}
    several = {name: files for name, files in places.items() if len(files) > 1}
    assert several.keys() == allowed, several


def test_an_option_stands_in_few_files() -> None:
    """CONTRIBUTING lists the places; zoneout, which changes steps, stands for all others."""
    places = [
        path for top in (PACKAGE, ROOT / "kernels") for path in top.rglob("*") if path.suffix in {*SOURCES, ".md"}
    ]
    naming = [path.relative_to(ROOT).as_posix() for path in places if "zone" in path.read_text().lower()]
    assert len(naming) <= 17, naming
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    missing = [path for path in naming if path not in listed]
    assert not missing, f"add these to the steps of 'Add an option' in CONTRIBUTING.md: {missing}"
