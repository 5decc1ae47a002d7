# SPDX-License-Identifier: Apache-2.0
"""The functions that generated C calls: to 2 units in the last place, as every compiler and target has them."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from tests.support import native
from tests.support.paths import ROOT
from tests.support.waiting import PATIENCE

ULPS = 2
STEP = 100_003  # of all float32's 2³² one in so many, 42,949 in all


def sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, 1) / (1 + small)


EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "floor": np.floor,
    "abs": np.abs,
}
ALL = (*EXACT, "sign", "relu")
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    math.inf,
    -math.inf,
    math.nan,
    88.7,
    88.73,
    -87.4,
    -103.9,
    -104.1,
    709.7,
    -745.1,
    1e-45,
]


def entry(name: str) -> str:
    """C that applies a function to n numbers, a multiple of LANES."""
    return f"""
void apply_{name}(long n, const scalar *in, scalar *out) {{
  for (long k = 0; k < n; k += LANES) {{
    real x;
    __builtin_memcpy(&x, in + k, sizeof x);
    x = {name}_(x);
    __builtin_memcpy(out + k, &x, sizeof x);
  }}
}}"""


@cache
def library(scalar: str, compiler: str, target: str, *options: str) -> ctypes.CDLL:
    return native.build("".join(map(entry, ALL)), scalar, compiler, target, *options)


def apply(name: str, x: np.ndarray, compiler: str, target: str, *options: str) -> np.ndarray:
    scalar = {4: "float", 8: "double"}[x.itemsize]
    padded = np.concatenate([x, np.zeros(-len(x) % 16, x.dtype)])
    out = np.empty_like(padded)
    call = getattr(library(scalar, compiler, target, *options), f"apply_{name}")
    call(ctypes.c_long(len(padded)), padded.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p))
    return out[: len(x)]


def grid(dtype: type) -> np.ndarray:
    """Numbers of every size and sign, denormal ones too, more of them between 2^-12 and 2^10, and special ones."""
    sizes = np.arange(0, 2**31, STEP, dtype=np.uint32).view(np.float32)
    sizes = sizes[np.isfinite(sizes)].astype(np.float64)
    if dtype is np.float64:  # its further bits, and its further exponents
        sizes = np.concatenate([sizes * (1 + np.arange(len(sizes)) * 2.0**-50), sizes**7.9])
    dense = np.exp2(np.linspace(-12, 10, 20_000))
    values = np.concatenate([sizes, dense])
    with np.errstate(over="ignore", under="ignore"):
        return np.concatenate([values, -values, SPECIAL]).astype(dtype)


def ulps(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The error in units in the last place of the exact result; 0 where both are the same special value."""
    with np.errstate(all="ignore"):
        nearest = exact.astype(actual.dtype)
        same = (nearest == actual) | (np.isnan(nearest) & np.isnan(actual))
        spacing = np.spacing(np.abs(nearest)).astype(exact.dtype)
        error = np.abs(actual.astype(exact.dtype) - exact) / spacing
    return np.where(same, 0, np.where(np.isfinite(error), error, np.inf)).astype(float)


@pytest.mark.parametrize("target", native.TARGETS)
@pytest.mark.parametrize("compiler", native.COMPILERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float", "double"])
@pytest.mark.parametrize("name", EXACT)
def test_accuracy(name: str, dtype: type, compiler: str, target: str) -> None:
    native.needs(compiler, target)
    x = grid(dtype)
    wide = np.float64 if dtype is np.float32 or name == "erf" else np.longdouble
    with np.errstate(all="ignore"):
        exact = EXACT[name](x.astype(wide))
    error = ulps(apply(name, x, compiler, target), exact)
    worst = int(error.argmax())
    assert error[worst] <= ULPS, f"{name}({x[worst]!r}): {error[worst]:.3g} ulp"


@pytest.mark.parametrize("target", native.TARGETS)
@pytest.mark.parametrize("compiler", native.COMPILERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float", "double"])
@pytest.mark.parametrize("name", ALL)
def test_builds_agree(name: str, dtype: type, compiler: str, target: str) -> None:
    """Within what each may be off: with fused products and without, whichever compiler chose where."""
    native.needs("gcc", "plain")
    native.needs(compiler, target)
    x = grid(dtype)
    error = ulps(apply(name, x, compiler, target), apply(name, x, "gcc", "plain"))
    assert error.max() <= ULPS, x[error.argmax()]


@pytest.mark.parametrize("compiler", native.COMPILERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float", "double"])
@pytest.mark.parametrize("name", ALL)
def test_special_values_are_torchs(name: str, dtype: type, compiler: str) -> None:
    native.needs(compiler, "plain")
    x = np.array(SPECIAL, dtype)
    actual = torch.from_numpy(apply(name, x, compiler, "plain"))
    expected = getattr(torch, name)(torch.from_numpy(x))
    tolerance = 8 * torch.finfo(expected.dtype).eps  # torch's own functions are less exact
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-38, equal_nan=True)
    if name in ("expm1", "log1p", "tanh", "sin", "erf", "floor", "sqrt"):
        assert actual[1].signbit()


UNDEFINED = """
from tests.kernels import test_native_functions as functions
for dtype in ("float32", "float64"):
    x = functions.grid(getattr(functions.np, dtype))
    for name in functions.ALL:
        print(name, flush=True)  # the last one, where the processor stops it
        functions.apply(name, x, "gcc", "plain", "-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
print("done")
"""


@pytest.mark.slow
def test_nothing_is_undefined() -> None:
    native.needs("gcc", "plain")
    command = [sys.executable, "-c", UNDEFINED]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.stdout.split()[-1] == "done", run.stderr
