"""Codes, scales and minimums of groups of weights, by weighted least squares.

The scale that just covers a group is not the best one: a slightly smaller or larger one may put more of the weights
near a code. Several are tried; for each, weights are rounded to codes and the sum of w (x - s q - m)^2 is minimised
over the scale s and the minimum m, which is a linear problem of two unknowns. The best is refined once more from its
own s and m, after these are rounded to the f16 that is stored. The weights w grow with x, as in llama.cpp's
quantizers: what `python -m benchmarks.quality` says is best.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
Fitted = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.float16] | None]

_AT_ONCE = 1 << 16  # weights; what is computed of them stays in a second-level cache
_TRIED = {
    (8, False): (127.0,),  # 256 codes: the error is that of rounding, wherever they begin
    (6, False): (-32.0, -31.5, 31.5),
    (4, False): tuple(-8.0 + 0.15 * i for i in range(-5, 8)),
    (4, True): tuple(15.0 + 0.25 * i for i in range(-7, 5)),
}
"""Into how many steps the range of a group is divided, in turn; for symmetric codes the largest weight's code."""


def fit(matrix: F32, code_bits: int, *, minimum: bool, group: int) -> Fitted:
    """Fit a matrix.

    Args:
        matrix: [N, K]. A group with a weight that is not finite gets a scale that is NaN.
        code_bits: Bits of a code.
        minimum: Whether groups have a minimum.
        group: Weights of a group.

    Returns:
        Unsigned codes [N, groups, group], scales f16 [N, groups], and minimums likewise or None. Where K ends inside a
        group, the rest of it has the code of zero.
    """
    n, k = matrix.shape
    groups = -(-k // group)
    codes = np.empty((n, groups, group), np.uint8)
    scales = np.empty((n, groups), np.float16)
    minimums = np.empty((n, groups), np.float16) if minimum else None
    zero = 0 if minimum else 1 << (code_bits - 1)

    def work(rows: slice) -> None:
        x = matrix[rows].astype(np.float32, copy=False)
        if k % group:
            x = np.pad(x, ((0, 0), (0, groups * group - k)), mode="edge")  # no new extremes
        x = x.reshape(-1, group)
        with np.errstate(all="ignore"):
            found, s, m = (_with_minimum if minimum else _symmetric)(x, code_bits)
        codes[rows] = found.reshape(-1, groups, group)
        scales[rows] = s.reshape(-1, groups)
        if minimums is not None:
            minimums[rows] = m.reshape(-1, groups)

    parts = list(_parts(n, max(1, _AT_ONCE // (groups * group))))
    with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
        list(pool.map(work, parts))
    if k % group:
        codes[:, -1, k % group :] = zero
    return codes, scales, minimums


def _parts(n: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _total(a: F32, b: F32) -> F32:
    """Sums of products over each group."""
    sums: F32 = np.einsum("gk,gk->g", a, b)
    return sums


def _half(values: F32) -> F32:
    """Values as they are after storage in f16."""
    return values.astype(np.float16).astype(np.float32)


def _inverse(values: F32) -> F32:
    """1 / x, and 0 for 0."""
    inverse: F32 = np.divide(np.float32(1), values, out=np.zeros_like(values), where=values != 0)
    return inverse


def _rounded(x: F32, scale: F32, low: int, high: int, offset: F32 | None = None) -> F32:
    """The codes of weights at a scale and a minimum."""
    q = x * _inverse(scale)[:, None] if offset is None else (x - offset[:, None]) * _inverse(scale)[:, None]
    np.rint(q, out=q)
    return np.clip(q, low, high, out=q)


def _symmetric(x: F32, code_bits: int) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    low, high = -(1 << (code_bits - 1)), (1 << (code_bits - 1)) - 1
    weight = _importance(x)
    weighted = weight * x
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    best, scale = np.full(len(x), -1, np.float32), np.zeros(len(x), np.float32)
    for steps in _TRIED[code_bits, False]:
        q = _rounded(x, largest / np.float32(steps), low, high)
        product, square = _total(weighted, q), _total(weight * q, q)
        ratio = product * _inverse(square)
        explained = product * ratio  # what is left is the sum of w x^2 less this
        better = explained > best
        best[better], scale[better] = explained[better], ratio[better]
    q = _rounded(x, _half(scale), low, high)
    scale = _total(weighted, q) * _inverse(_total(weight * q, q))
    return _unsigned(q, -low), _lost(x, scale), scale


def _with_minimum(x: F32, code_bits: int) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    high = (1 << code_bits) - 1
    weight = np.sqrt(_importance(x))
    weighted = weight * x
    total, first = weight.sum(axis=1), weighted.sum(axis=1)
    lowest, width = x.min(axis=1), np.ptp(x, axis=1)
    best = np.full(len(x), np.inf, np.float32)
    scale, offset = np.zeros(len(x), np.float32), lowest.copy()

    def solved(q: F32) -> tuple[F32, F32, F32]:
        """The scale and minimum for these codes, and the error less the sum of w x^2."""
        linear, cross = _total(weight, q), _total(weighted, q)
        square = _total(weight * q, q)
        determinant = total * square - linear * linear
        s = (total * cross - linear * first) * _inverse(determinant)
        m = (first - s * linear) * _inverse(total)
        return s, m, -(s * cross + m * first)

    for steps in _TRIED[code_bits, True]:
        s, m, error = solved(_rounded(x, width / np.float32(steps), 0, high, lowest))
        better = error < best
        best[better], scale[better], offset[better] = error[better], s[better], m[better]
    q = _rounded(x, _half(scale), 0, high, _half(offset))
    scale, offset, _ = solved(q)
    return _unsigned(q, 0), _lost(x, scale), offset


def _importance(x: F32) -> F32:
    """How much the square of an error counts for each weight: its own square and the mean one of its group."""
    square = x * x
    weight: F32 = square + square.mean(axis=1, keepdims=True)
    return weight


def _unsigned(q: F32, zero: int) -> npt.NDArray[np.uint8]:
    codes: npt.NDArray[np.uint8] = (np.nan_to_num(q) + np.float32(zero)).astype(np.uint8)
    return codes


def _lost(x: F32, scale: F32) -> F32:
    """Scales, NaN for groups that hold what is not finite."""
    return np.where(np.isfinite(x).all(axis=1), scale, np.float32(np.nan))
