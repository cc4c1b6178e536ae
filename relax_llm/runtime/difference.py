"""What is wrong with the outputs of a launch, in words: NaNs, infinities, differences from what is expected."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def not_finite(outputs: Sequence[Array]) -> str | None:
    """How many NaNs and infinities outputs have, and where the first is; None: none."""
    for index, output in enumerate(outputs):
        wrong = ~np.isfinite(output)
        if wrong.any():
            nans = int(np.isnan(output).sum())
            return (
                f"{_named(index, outputs)} has {nans} NaN and {int(wrong.sum()) - nans} infinite of {output.size} "
                f"numbers, the first at {_place(int(wrong.argmax()), output)}"
            )
    return None


def difference(outputs: Sequence[Array], expected: Sequence[Array], bound: float) -> str | None:
    """How outputs differ from what is expected; None: they do not.

    Args:
        outputs: What a launch left.
        expected: Of the same shapes and types.
        bound: The largest difference that is none, as a share of the largest number expected; 0: every bit, but any
            NaN is like any other.
    """
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        a, b = output.astype(np.float64), wanted.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        apart = np.where(np.isnan(apart), np.inf, apart)
        finite = np.abs(b[np.isfinite(b)])
        limit = bound * (float(finite.max()) if finite.size else 0.0)
        if apart.size and float(apart.max()) > limit:
            worst = int(apart.argmax())
            place = _place(worst, output)
            return (
                f"{_named(index, outputs)} differs in {int((apart > limit).sum())} of {output.size} numbers, most at "
                f"{place}: {a.flat[worst]:.6g}, expected {b.flat[worst]:.6g}"
            )
    return None


def _named(index: int, outputs: Sequence[Array]) -> str:
    return "the output" if len(outputs) == 1 else f"output {index}"


def _place(flat: int, array: Array) -> str:
    return str([int(i) for i in np.unravel_index(flat, array.shape)])
