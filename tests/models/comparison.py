"""What it means that two sets of logits agree. The one place that holds the bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

BOUND = 2e-4
"""Largest difference allowed at a position, as a share of the reference's largest magnitude there."""


def distance(ours: Array, reference: Array) -> float:
    """Return the worst position's largest difference, relative to the reference's largest magnitude there.

    Args:
        ours: Any floating type, shape [..., vocab] (or [..., hidden]).
        reference: The same shape.

    Returns:
        max over positions of (max |ours - reference| / max |reference|); NaN when either side has one.
    """
    difference = np.abs(ours.astype(np.float64) - reference.astype(np.float64)).max(axis=-1)
    return float((difference / np.abs(reference).astype(np.float64).max(axis=-1)).max())


def assert_close(ours: Array, reference: Array, what: str) -> None:
    """Fail unless shape and dtype are right, all values finite, and every position within the bound."""
    assert isinstance(ours, np.ndarray), f"{what}: expected a NumPy array, got {type(ours).__name__}"
    assert ours.dtype == np.float32, f"{what}: expected float32, got {ours.dtype}"
    assert ours.shape == reference.shape, f"{what}: expected shape {reference.shape}, got {ours.shape}"
    assert np.isfinite(ours).all(), f"{what}: {np.count_nonzero(~np.isfinite(ours))} values are not finite"
    difference = np.abs(ours.astype(np.float64) - reference.astype(np.float64)).max(axis=-1)
    relative = difference / np.abs(reference).astype(np.float64).max(axis=-1)
    wrong = np.argwhere(np.atleast_1d(relative) > BOUND)
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {relative.size} positions differ by more than {BOUND:.0e} of the largest "
        f"value; the first is {tuple(int(i) for i in wrong[0])}, the worst differs by {relative.max():.2e}"
    )


def assert_logits_agree(ours: Array, reference: Array, what: str) -> None:
    """Fail unless `assert_close` holds and the argmax is the same wherever the reference is decided.

    Args:
        ours: float32 logits of shape [..., vocab].
        reference: The same shape.
        what: Where these logits come from, for the message.
    """
    assert_close(ours, reference, what)
    runner_up, top = np.moveaxis(np.partition(reference, -2, axis=-1)[..., -2:], -1, 0)
    decided = top - runner_up > BOUND * np.abs(reference).max(axis=-1)
    wrong = np.argwhere(np.atleast_1d(decided & (ours.argmax(axis=-1) != reference.argmax(axis=-1))))
    assert not len(wrong), f"{what}: another argmax at {[tuple(map(int, index)) for index in wrong]}"
