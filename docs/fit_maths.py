"""Computes the coefficients of `minifuse/codegen/c_maths.py`: `python docs/fit_maths.py` prints the table.

Least squares at Chebyshev points, weighted anew until the largest error is as small as it gets (Lawson,
Contributions to the Theory of Linear Least Maximum Approximations, 1961); then rounded to float.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special

Function = Callable[[np.ndarray], np.ndarray]
POINTS, ROUNDS = 800, 200


def minimax(f: Function, weight: Function, low: float, high: float, terms: int) -> list[float]:
    """c for which the largest weight(x) * |sum of c[k] x^k - f(x)| over low <= x <= high is least."""
    x = (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    powers, target, scale = np.vander(x, terms, increasing=True), f(x), weight(x)
    share, best, least = np.full(POINTS, 1 / POINTS), np.zeros(terms), np.inf
    for _ in range(ROUNDS):
        row = np.sqrt(share) * scale
        found = np.linalg.lstsq(powers * row[:, None], target * row, rcond=None)[0]
        error = np.abs(powers @ found - target) * scale
        if error.max() < least:
            best, least = found, error.max()
        share *= error / error.max() + 1e-9
        share /= share.sum()
    return [float(np.float32(c)) for c in best]


def table() -> dict[str, list[float]]:
    """Name -> coefficients, lowest power first."""

    def sine(s: np.ndarray) -> np.ndarray:
        r = np.sqrt(s)
        # Below 0.1 the difference loses digits that its series keeps.
        series = -1 / 6 + s / 120 - s**2 / 5040 + s**3 / 362880
        return np.where(r < 0.1, series, (np.sin(r) - r) / np.maximum(r, 1e-3) ** 3)

    def error_function(s: np.ndarray) -> np.ndarray:
        return special.erf(np.sqrt(s)) / np.sqrt(s) - 1

    return {
        "sin": minimax(sine, lambda s: s, 1e-6, (np.pi / 2 + 0.01) ** 2, 4),
        "exp2": minimax(lambda r: np.expm1(r * np.log(2)) / r, np.abs, -0.5, 0.5, 6),
        "erf": minimax(error_function, lambda s: 1 / (1 + error_function(s)), 1e-7, 0.81, 6),
        "erfc": minimax(
            lambda x: np.log2(special.erfc(x)), lambda x: np.log(2) * special.erfc(x) / special.erf(x), 0.9, 4, 7
        ),
    }


if __name__ == "__main__":
    for name, coefficients in table().items():
        print(f'    "{name}": ({", ".join(f"{c:.9g}" for c in coefficients)}),')
