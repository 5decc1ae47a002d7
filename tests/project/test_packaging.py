# SPDX-License-Identifier: Apache-2.0
"""What a user installs holds every file that the checkout has."""

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.waiting import PATIENCE

BUILT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")  # an old manifest hides omissions

READ_RESOURCES = """
import hashlib, importlib.resources, json, sys
import gpu_rnn, gpu_rnn.kernels
digests = {}
for name in json.load(sys.stdin):
    package, _, path = name.partition("/")
    resource = importlib.resources.files({"kernels": "gpu_rnn.kernels"}.get(package, package)).joinpath(path)
    digests[name] = hashlib.sha256(resource.read_bytes()).hexdigest()
print(json.dumps([gpu_rnn.__file__, gpu_rnn.kernels.__file__, digests]))
"""


def run(*command: str | Path, cwd: Path, stdin: str = "") -> str:
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment outside the checkout with the wheel that the sdist gives, and the torch of this one."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "source", ignore=BUILT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    shutil.rmtree(folder / "source")
    (wheel,) = (folder / "dist").glob("*.whl")

    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A path in a .pth file is added last and its own .pth files are not read, so an editable gpu_rnn stays unseen.
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    return environment


def sources(package: str) -> list[str]:
    """Every file of a package, relative to the checkout."""
    files = (path for path in (ROOT / package).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def test_an_installed_package_has_every_file(installed: Path) -> None:
    names = sources("kernels") + sources("gpu_rnn")
    answer = run(installed / "bin" / "python", "-c", READ_RESOURCES, cwd=installed, stdin=json.dumps(names))
    package, kernels, digests = json.loads(answer)
    assert Path(package).is_relative_to(installed) and Path(kernels).is_relative_to(installed)
    assert digests == {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in names}


def test_the_command_is_installed(installed: Path) -> None:
    assert "doctor" in run(installed / "bin" / "gpu-rnn", "--help", cwd=installed)
