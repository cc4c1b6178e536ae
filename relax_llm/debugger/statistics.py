"""What is in a tensor, at a glance: extremes, mean, numbers that are none, and a histogram as text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_CHUNK = 1 << 22  # numbers that are widened at a time


@dataclass(frozen=True)
class Statistics:
    """Of the finite numbers of a tensor.

    Attributes:
        size: How many numbers it has.
        minimum: The smallest; NaN where none is finite, and so the others.
        maximum: The largest.
        mean: Of all.
        nans: How many are NaN.
        infinities: How many are infinite.
    """

    size: int
    minimum: float
    maximum: float
    mean: float
    nans: int
    infinities: int


def statistics(array: Array) -> Statistics:
    """Look at every number of a tensor."""
    low, high, total, count, nans = np.inf, -np.inf, 0.0, 0, 0
    for chunk in _chunks(array):
        if not np.isfinite([chunk.min(), chunk.max()]).all():
            nans += int(np.isnan(chunk).sum())
            chunk = chunk[np.isfinite(chunk)]
        if chunk.size:
            low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
            total += float(chunk.sum(dtype=np.float64))
            count += chunk.size
    if not count:
        low = high = np.nan
    return Statistics(
        array.size, low, high, total / count if count else np.nan, nans, array.size - count - nans
    )


def histogram(array: Array, rows: int = 10, width: int = 40) -> list[str]:
    """How often numbers fall into equal parts of their range: one line for each part, with a bar.

    Args:
        array: Any numbers; those that are not finite are left out.
        rows: How many parts.
        width: Characters of the longest bar.
    """
    known = statistics(array)
    if np.isnan(known.minimum):
        return ["no finite numbers"]
    if known.minimum == known.maximum:
        return [f"all are {known.minimum:.4g}"]
    edges = np.linspace(known.minimum, known.maximum, rows + 1)
    counts = np.zeros(rows, np.int64)
    for chunk in _chunks(array):
        counts += np.histogram(chunk[np.isfinite(chunk)], edges)[0]
    most = counts.max()
    lines = []
    for i, count in enumerate(counts.tolist()):
        bar = "#" * max(round(width * count / most), int(count > 0))
        lines.append(f"{edges[i]:>10.3g} to {edges[i + 1]:>10.3g} {count:>{len(str(most))}} {bar}".rstrip())
    return lines


def _chunks(array: Array) -> Iterator[Array]:
    """The numbers of a tensor, some at a time, in a type that NumPy computes with."""
    flat = array.reshape(-1)
    known = array.dtype in (np.float32, np.float64)
    for at in range(0, flat.size, _CHUNK):
        chunk = flat[at : at + _CHUNK]
        yield chunk if known else chunk.astype(np.float64)
