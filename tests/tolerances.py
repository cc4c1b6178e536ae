"""How far a float32 kernel may be from float64: the one table of tolerances, and the reasoning behind it.

A tolerance is a share of a *scale*, not of the result. The scale is the sum of the magnitudes of all terms that the
result is made of (sum |x| |w| + |bias| + |residual| for a product): a result near zero made of large terms that
cancel is allowed what its terms are allowed, and no more. Each element has its own scale, so one large element does
not excuse the others, as it would in a norm over the whole tensor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

UNIT: dict[str, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff: the largest relative error of rounding to the type."""

DEVIATIONS = 6.0
"""A sum of n rounding errors is about sqrt(n) units wide, not n, as rounding is unbiased (Higham and Mary 2019). At six
deviations one of a billion elements may fail; the worst case, n units, is so much wider that for long reductions it
would hide a lost term."""

ROUNDINGS = 6.0
"""Units for the few operations around a reduction: the product, bias, residual, scale, the final rounding."""

ACTIVATION = 3e-7
"""Absolute error of an activation function for |x| <= 1, and relative to |x| above: the widest in `vectormath`."""

SLOPE = 1.13
"""The largest slope of the activations (silu 1.10, gelu 1.13, relu 1): what an error before them becomes behind."""

EXP = 4 * UNIT["float32"]
"""Relative error of a softmax weight where the score is exact: `exp` within 2 ULP."""

TABLE = 3e-7
"""Absolute error of a cosine or sine of an angle that is exact: libm's float32 functions, and one product."""


def reduction(dtype: str, length: int) -> float:
    """Allowed error of a sum of products, as a share of the sum of their magnitudes.

    Args:
        dtype: The type that is summed in.
        length: Terms of the sum.
    """
    return UNIT[dtype] * (DEVIATIONS * math.sqrt(length) + ROUNDINGS)


def assert_within(ours: Array, reference: Array, allowed: Array, what: str) -> None:
    """Fail unless shapes agree, ours has no NaN that the reference lacks, and every element is within its bound.

    Args:
        ours: What the kernel gave.
        reference: float64, the same shape.
        allowed: The largest difference, for each element or for all.
        what: The case, for the message.
    """
    assert ours.shape == reference.shape, f"{what}: shape {ours.shape} instead of {reference.shape}"
    assert np.isfinite(reference).all(), f"{what}: the reference itself is not finite"
    finite = np.isfinite(ours)
    assert finite.all(), (
        f"{what}: {np.count_nonzero(~finite)} of {ours.size} values are not finite, first at {_first(~finite)}"
    )
    difference = np.abs(ours.astype(np.float64) - reference)
    wrong = difference > allowed
    if wrong.any():
        at = _first(wrong)
        bound = np.broadcast_to(allowed, ours.shape)[at]
        raise AssertionError(
            f"{what}: {np.count_nonzero(wrong)} of {ours.size} values are off, first at {at}: "
            f"{ours[at]!r} instead of {reference[at]!r}, {difference[at] / bound:.1f} times what is allowed"
        )


def _first(where: Array) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])
