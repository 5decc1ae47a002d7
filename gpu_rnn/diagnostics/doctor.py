# SPDX-License-Identifier: Apache-2.0
"""What ``gpu-rnn doctor`` prints: the device, the versions, and which backends can run here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from gpu_rnn import cache, devices, environment
from gpu_rnn._version import __version__
from gpu_rnn.backends import building
from gpu_rnn.backends.group import nvrtc
from gpu_rnn.backends.native import building as native
from gpu_rnn.diagnostics.explanation import explain
from gpu_rnn.dispatch import measured
from gpu_rnn.layers import LSTM

__all__ = ["device_name", "report"]

PACKAGES = ("torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "keras", "numpy")


def device_name(device: torch.device) -> str:
    """A name a person would use, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return devices.cpu_name()


def report(device: torch.device) -> str:
    """The whole report as text."""
    lines = [
        f"gpu-rnn {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"device   {device_name(device)}",
        *_device_details(device),
        *_packages(),
        *_cache(device),
        *_environment(),
        *_compilers(device),
        "",
        *_backends(device),
    ]
    return "\n".join(lines)


def _device_details(device: torch.device) -> list[str]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return [
            f"         compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB",
            f"driver   {_driver()}, torch built for CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        ]
    if torch.cuda.is_available():
        return [f"         a GPU is here too: {torch.cuda.get_device_name()}"]
    why = "no NVIDIA GPU was found" if torch.version.cuda else "this build of torch is for the CPU only"
    return [f"         {why}"]


def _backends(device: torch.device) -> list[str]:
    """One line a backend: can it run a standard layer, can it run one with another activation, and if not, why."""
    x = torch.zeros(20, 16, 12, device=device)
    layers = {
        "LSTM": LSTM(12, 100, device=device),
        "LSTM, hard_sigmoid gates": LSTM(12, 100, device=device, recurrent_activation="hard_sigmoid"),
    }
    tables = [explain(layer, x).rows for layer in layers.values()]
    lines = ["backend".ljust(12) + "".join(name.ljust(26) for name in layers) + "why not"]
    for rows in zip(*tables, strict=True):
        verdicts = ["chosen" if row.chosen else "can run" if row.runs else "no" for row in rows]
        first, *further = dict.fromkeys(reason for row in rows for reason in row.reasons) or [""]
        lines.append((rows[0].backend.ljust(12) + "".join(v.ljust(26) for v in verdicts) + first).rstrip())
        lines += [" " * 64 + reason for reason in further]
    return lines


def _packages() -> list[str]:
    """Versions from the packages' metadata: importing CuPy or Keras only to ask them would take seconds."""
    versions = {name: [package.version for package in metadata.distributions(name=name)] for name in PACKAGES}
    versions["torch"] = [torch.__version__]  # names the build too, as +cu130
    present = ", ".join(f"{name} {installed[0]}" for name, installed in versions.items() if installed)
    absent = ", ".join(name for name, installed in versions.items() if not installed)
    return [f"packages {present}"] + [f"absent   {absent}"] * bool(absent)


def _cache(device: torch.device) -> list[str]:
    """Where compiled kernels and tuned choices are kept, and what is wrong there."""
    held = measured.held(devices.of(device))
    elsewhere = f", {held.others} for other devices or versions" if held.others else ""
    lines = [f"cache    {cache.wanted()}: tuned choices: {held.here} for this device and these versions{elsewhere}"]
    refused = cache.distrust(cache.wanted())
    if refused:
        lines.append(f"         is not used, and nothing is kept: {refused}")
    elif cache.folder() != cache.wanted() or not cache.outlives_the_process(cache.wanted() / "any"):
        lines.append("         cannot be written to, so nothing is kept: set GPU_RNN_CACHE to a folder that can be")
    return lines + [
        f"         {path.name} is damaged or cannot be read: tune again, or delete it" for path in held.broken
    ]


def _environment() -> list[str]:
    """What is wrong with the variables that only some calls read."""
    wrong = []
    for ask in (environment.deadline, environment.approximated):
        try:
            ask()
        except ValueError as error:
            wrong.append(f"settings {error}")
    return wrong


def _compilers(device: torch.device) -> list[str]:
    """What Triton and CuPy build kernels with, and what is missing there."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    said = [f"NVRTC    {_nvrtc(capability)}", f"C        {_native()}"]
    if find_spec("triton") is not None:
        said.append(f"Triton   {_c_compiler()}; {_triton_cache()}{_ptxas(capability)}")
    return said


def _nvrtc(capability: tuple[int, int] | None) -> str:
    if nvrtc.unavailable():
        return f"not found: {nvrtc.unavailable()}"
    if capability is None:
        return nvrtc.version()
    arch = nvrtc.architecture(capability)
    try:
        nvrtc.compile_cubin('extern "C" __global__ void nothing() {}', arch)
    except nvrtc.CompileError as error:
        return str(error).replace("\n", " ")
    return f"{nvrtc.version()}, builds for {arch}"


def _native() -> str:
    """What the time loop in C is built with, and for which instruction sets; the first is taken."""
    try:
        version = native.version()
    except native.CompilerError as error:
        return f"{error}"
    return f"{native.compiler()[0]}: {version}, builds for {', '.join(each.name for each in native.instruction_sets())}"


def _c_compiler() -> str:
    """As Triton looks for one."""
    named = os.environ.get("CC")
    compiler = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    if compiler:
        return f"C compiler {compiler}"
    return f"C compiler not found: CC is {named!r}" if named else "C compiler not found: install gcc, or name one in CC"


def _triton_cache() -> str:
    from triton import knobs

    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        return f"its cache cannot be written ({error}): set TRITON_CACHE_DIR"
    return f"its cache {folder}"


def _ptxas(capability: tuple[int, int] | None) -> str:
    if capability is None:
        return ""
    major, minor = capability
    refusal = building.ptxas_refusal(10 * major + minor)
    return f"; {refusal}" if refusal else f"; its ptxas knows sm_{major}{minor}"


def _driver() -> str:
    """The driver's version from its own tool, which need not be in a container."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "of unknown version (no nvidia-smi)"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.splitlines()[0] if done.returncode == 0 else "of unknown version (nvidia-smi failed)"
