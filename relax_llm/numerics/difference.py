"""How far two tensors are apart, and two distributions of the next token."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from a reference.

    A value that is not finite on one side only, or another one on the other, makes every measure infinite.

    Attributes:
        max_abs: The largest difference.
        relative: The largest difference as a share of its scale. That is the largest magnitude in the row: in one
            token's hidden state, in one head's key. Of what was added to a residual, it is the largest of the summands
            in the row, and this element's residual.
        ulp: The largest number of float32 numbers between two values; infinite for other types that differ.
        cosine: Of the angle between the whole tensors.
        index: The element that is farthest off for its scale.
        value: What is there.
        reference: What the reference has there.
    """

    max_abs: float
    relative: float
    ulp: float
    cosine: float
    index: tuple[int, ...]
    value: float
    reference: float


def difference(ours: Array, reference: Array, residual: Array | None = None) -> Difference:
    """Measure.

    Args:
        ours: Any shape and numeric type.
        reference: The same shape.
        residual: What both were added to, if they were.
    """
    if not ours.size:
        return Difference(0.0, 0.0, 0.0, 1.0, (), 0.0, 0.0)
    shape = ours.shape or (1,)
    a = ours.astype(np.float64).reshape(shape)
    b = reference.astype(np.float64).reshape(shape)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        off = np.abs(a - b)
        off[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
        off[np.isnan(off)] = np.inf
        if residual is None:
            scale = _largest(b)
        else:
            kept = residual.astype(np.float64).reshape(shape)
            scale = _largest(b - kept) + np.abs(kept)
        shares = np.where(off == 0, 0.0, off / scale)
        shares[np.isnan(shares)] = np.inf
    at = np.unravel_index(int(shares.argmax()), shape)
    return Difference(
        float(off.max()),
        float(shares[at]),
        _ulps(ours, reference) if off.any() else 0.0,
        _cosine(a, b),
        tuple(int(i) for i in at),
        float(a[at]),
        float(b[at]),
    )


def _largest(values: Array) -> Array:
    """The largest finite magnitude in each row."""
    found: Array = np.abs(np.where(np.isfinite(values), values, 0.0)).max(axis=-1, keepdims=True)
    return found


def _ulps(a: Array, b: Array) -> float:
    if a.dtype != np.float32 or b.dtype != np.float32 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.abs(_ordered(a) - _ordered(b)).max())


def _ordered(values: Array) -> npt.NDArray[np.int64]:
    """The bits of float32 as whole numbers in the order of the values, zero at zero."""
    bits = np.ascontiguousarray(values).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _cosine(a: Array, b: Array) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        lengths = math.sqrt(float((a * a).sum())) * math.sqrt(float((b * b).sum()))
        dot = float((a * b).sum())
    if not math.isfinite(lengths) or not math.isfinite(dot):
        return 0.0
    if lengths == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return min(1.0, dot / lengths)


def divergence(ours: Array, reference: Array) -> float:
    """Kullback-Leibler divergence in nats of the next token's distribution from the reference's; the worst row.

    Args:
        ours: Logits [..., vocab].
        reference: The same shape.
    """
    p, q = _log_softmax(reference), _log_softmax(ours)
    with np.errstate(invalid="ignore"):
        each = (np.exp(p) * (p - q)).sum(axis=-1)
    return float(np.where(np.isnan(each), np.inf, np.maximum(each, 0.0)).max())


def _log_softmax(logits: Array) -> Array:
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted = values - values.max(axis=-1, keepdims=True)
        normalized: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalized
