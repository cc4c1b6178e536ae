"""A kernel's time as a function of M: a law fitted to measurements, and what the measurements say beyond it.

A launch streams the weight from memory whatever M is (the floor), and works through M rows in tiles of some height:
`max(floor, fixed + per_tile * ceil(M / tile) + per_row * M)`. Between measured sizes a curve follows the law's shape
and is scaled to pass through what was measured.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Sizes = npt.NDArray[np.int64]

TILES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 96, 128)
"""Heights of tiles that a fit considers."""

_PREFIXES = (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 35)
"""How many of the smallest sizes a fit takes to be bound by the floor."""

_USES = np.array([[bool(mask & bit) for bit in (1, 2, 4)] for mask in range(1, 8)])
"""Which of the three terms a solution has, [7, 3]: least squares with no negative term is the best of these."""


@dataclass(frozen=True)
class Law:
    """A kernel's time by M, in seconds.

    Attributes:
        floor: The least a launch takes: reading the weight.
        fixed: What a launch costs beside its rows.
        per_tile: What each tile of rows costs, full or not.
        per_row: What each row costs.
        tile: Rows of a tile.
    """

    floor: float
    fixed: float
    per_tile: float
    per_row: float
    tile: int

    def seconds(self, sizes: Sizes) -> Vector:
        """The time at each of some sizes, [S]."""
        tiles = -(-sizes // self.tile)
        return np.maximum(self.floor, self.fixed + self.per_tile * tiles + self.per_row * sizes)


def fit(points: Mapping[int, float]) -> Law:
    """The law that misses measurements by the least sum of squared relative errors.

    Args:
        points: Seconds by M; at least one.
    """
    sizes = np.array(sorted(points), np.int64)
    seconds = np.array([points[int(size)] for size in sizes])
    if len(sizes) == 1:
        return Law(float(seconds[0]), 0.0, 0.0, float(seconds[0] / sizes[0]), 1)
    prefixes = [prefix for prefix in _PREFIXES if len(sizes) - prefix >= 2]
    coarse = min((_bound(sizes, seconds, prefix) for prefix in prefixes), key=_merit)
    at = prefixes.index(coarse.prefix)
    between = range(prefixes[max(0, at - 1)] + 1, [*prefixes, len(sizes) - 1][at + 1])
    found = [_bound(sizes, seconds, prefix) for prefix in between if prefix != coarse.prefix]
    return min([coarse, *found], key=_merit).law


@dataclass(frozen=True)
class _Fit:
    """A law, and how well it explains measurements of which some of the first show the floor."""

    prefix: int
    law: Law
    error: float


def _merit(fit: _Fit) -> tuple[float, int]:
    """What orders fits; of those that explain as much, the one with fewer points at the floor is the simpler."""
    return round(math.log(fit.error + 1e-12), 1), fit.prefix


def _bound(sizes: Sizes, seconds: Vector, prefix: int) -> _Fit:
    """The best law whose floor is what the first sizes show."""
    floor = float(np.median(seconds[:prefix])) if prefix else 0.0
    terms = _solve(sizes[prefix:], seconds[prefix:])
    tiles = -(-sizes // np.array(TILES)[:, None])  # [tiles, S]
    predicted = np.maximum(floor, terms[:, :1] + terms[:, 1:2] * tiles + terms[:, 2:] * sizes)
    errors = np.sum((predicted / seconds - 1) ** 2, axis=1)
    best = int(np.argmin(np.round(np.log(errors + 1e-12), 1)))
    fixed, per_tile, per_row = map(float, terms[best])
    return _Fit(prefix, Law(floor, fixed, per_tile, per_row, TILES[best]), float(errors[best]))


def _solve(sizes: Sizes, seconds: Vector) -> Vector:
    """For each tile height, the terms (fixed, per tile, per row), none negative, of least squared relative error."""
    tiles = -(-sizes[None, :] // np.array(TILES)[:, None])
    terms = np.stack([np.ones_like(tiles), tiles, np.broadcast_to(sizes, tiles.shape)], axis=2)
    scaled = terms / seconds[None, :, None]  # [tiles, S, 3]
    unit = np.sqrt(np.sum(scaled**2, axis=1))  # [tiles, 3]: columns of length 1 keep the small systems sound
    columns = scaled / unit[:, None, :]
    gram = np.einsum("tsi,tsj->tij", columns, columns)
    right = columns.sum(axis=1)  # the target is 1 everywhere: relative errors
    # Terms that a solution does without are fixed at 0; a trace of the identity tells apart terms that are the same.
    masked = gram[:, None] * (_USES[:, :, None] & _USES[:, None, :]) + np.eye(3) * (~_USES[:, None] + 1e-10)
    answers = np.linalg.solve(masked, (right[:, None] * _USES)[..., None])[..., 0]
    errors = np.sum((np.einsum("tsi,tui->tus", columns, answers) - 1) ** 2, axis=2)
    errors[np.any(answers < -1e-9, axis=2)] = np.inf
    chosen = np.maximum(answers[np.arange(len(TILES)), np.argmin(errors, axis=1)], 0)
    return np.asarray(chosen / unit)


@dataclass(frozen=True)
class Curve:
    """What a kernel's time is taken to be at every size: as measured where it was, and between as the law goes.

    Attributes:
        law: Fitted to the points.
        points: Measured seconds by M.
    """

    law: Law
    points: Mapping[int, float]

    @staticmethod
    def through(points: Mapping[int, float]) -> "Curve":
        """The curve through measurements, at least one."""
        return Curve(fit(points), dict(points))

    def seconds(self, sizes: Iterable[int] | Sizes) -> Vector:
        """The time at each of some sizes, [S]."""
        wanted = np.asarray(sizes, np.int64)
        known = np.array(sorted(self.points), np.int64)
        measured = np.array([self.points[int(size)] for size in known])
        beside = np.log(measured / self.law.seconds(known))
        return np.asarray(self.law.seconds(wanted) * np.exp(np.interp(np.log(wanted), np.log(known), beside)))

    def at(self, size: int) -> float:
        """The time at one size."""
        return float(self.seconds([size])[0])
