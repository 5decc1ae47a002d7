# SPDX-License-Identifier: Apache-2.0
"""Prints the polynomials of kernels/native/functions.h: what is fitted, where, to which degree, and how near it comes.

Each interpolates at Chebyshev nodes, in 60 digits (mpmath comes with torch), and is rounded to the type that it is for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from mpmath import chebyfit, chop, exp, linspace, log, mp, mpf, polyval, sqrt, tanh

mp.dps = 60

HALF_LN_2 = log(2) / 2


def beyond_first_order(r: mpf) -> mpf:
    """(e^r - 1 - r) / r²."""
    return (exp(r) - 1 - r) / r**2 if abs(r) > mpf(10) ** -20 else mpf(1) / 2 + r / 6


def beyond_argument(z: mpf) -> mpf:
    """(log((1 + s) / (1 - s)) - 2s) / s³, of z = s²."""
    s = sqrt(z)
    return (log((1 + s) / (1 - s)) - 2 * s) / s**3 if s > mpf(10) ** -15 else mpf(2) / 3 + 2 * z / 5


def beyond_slope(z: mpf) -> mpf:
    """(tanh(x) - x) / x³, of z = x²."""
    x = sqrt(z)
    return (tanh(x) - x) / x**3 if x > mpf(10) ** -15 else -mpf(1) / 3 + 2 * z / 15


LARGEST_Z = ((sqrt(2) - 1) / (sqrt(2) + 1)) ** 2
# Name, function, where it is fitted (a little further than it is used), its degree for float and for double.
FITS: list[tuple[str, Callable[[mpf], mpf], mpf, mpf, tuple[int, int]]] = [
    ("EXP", beyond_first_order, -HALF_LN_2 * mpf("1.01"), HALF_LN_2 * mpf("1.01"), (5, 10)),
    ("LOG", beyond_argument, mpf(0), LARGEST_Z * mpf("1.01"), (3, 7)),
    ("TANH", beyond_slope, mpf(0), mpf("0.3") ** 2 * mpf("1.01"), (3, 7)),
]


def rounded(value: mpf, digits: int) -> str:
    return f"{float(value):.{digits}g}"


def main() -> None:
    for name, function, low, high, degrees in FITS:
        for kind, degree, digits in zip(("float", "double"), degrees, (9, 17), strict=True):
            coefficients = [chop(c) for c in chebyfit(function, [low, high], degree + 1)]
            points = linspace(low, high, 1001)
            error = max(abs(polyval(coefficients, x) / function(x) - 1) for x in points)
            sys.stdout.write(f"// {name}, {kind}: relative error 2^{math.log2(float(error)):.1f}\n")
            sys.stdout.write(", ".join(rounded(c, digits) for c in coefficients) + "\n")
    low_bits = log(2) - mpf("0.693145751953125")
    sys.stdout.write(f"LN_2 - 0.693145751953125 = {rounded(low_bits, 17)}\n")
    high = mpf(float.fromhex("0x1.62e42fee00000p-1"))
    sys.stdout.write(f"LN_2 - 0x1.62e42fee00000p-1 = {rounded(log(2) - high, 17)}\n")


if __name__ == "__main__":
    main()
