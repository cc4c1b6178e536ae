"""A contest: the kernels that can serve one problem, how to run them, and what was found out about them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from relax_llm.tuning.distribution import Distribution
from relax_llm.tuning.law import Curve
from relax_llm.tuning.ranges import divide
from relax_llm.tuning.rounds import Care, Deadline, Run, contend, estimate
from relax_llm.tuning.store import Store

Sizes = npt.NDArray[np.int64]

PRICE = 1e-3
"""What a further range must save at least, as a part of the expected time."""

_TRUSTED = 4
"""Points from which on a curve may say that a kernel is not worth measuring."""

_WORTH = 2.0
"""A kernel said to take so many times the fastest one's time is not measured."""


@dataclass(frozen=True)
class Rival:
    """A kernel in a contest.

    Attributes:
        name: The kernel's.
        rows: The M it is valid for.
        digest: Of its code and of all that its time depends on.
    """

    name: str
    rows: tuple[int, int | None]
    digest: str

    def serves(self, size: int) -> bool:
        """Whether it is valid for M."""
        first, last = self.rows
        return first <= size and (last is None or size <= last)


@dataclass(frozen=True)
class Contest:
    """What competes for one problem.

    Attributes:
        name: The problem, its layout and where its weights are read from: what measurements are kept under.
        rivals: The kernels.
        prepare: Makes the arguments for some M, with the weight from memory as in the model, or with the same weight
            each time; what it gives launches a kernel.
        largest: The largest M whose arguments fit memory.
    """

    name: str
    rivals: tuple[Rival, ...]
    prepare: Callable[[int, bool], Run]
    largest: int = 2**24


class Findings:
    """What is known of the kernels in a contest.

    Attributes:
        contest: Which.
        samples: Seconds by (M, whether the weight came from memory), then by kernel and round.
        misses: How far predictions were off where they were put to the test: measured / predicted - 1.
    """

    def __init__(self, contest: Contest, store: Store) -> None:
        self.contest = contest
        self.samples: dict[tuple[int, bool], dict[str, list[float]]] = {}
        self.misses: list[float] = []
        self._store = store
        self._seconds: dict[tuple[int, bool], dict[str, float]] = {}
        self._curves: dict[str, Curve] = {}

    def rivals_at(self, size: int) -> list[Rival]:
        """The kernels worth measuring at M: valid there, and not known to be far behind."""
        valid = [rival for rival in self.contest.rivals if rival.serves(size)]
        guess = {rival.name: self.curve(rival.name) for rival in valid}
        known = {name: curve.at(size) for name, curve in guess.items() if curve is not None}
        if not known:
            return valid
        limit = _WORTH * min(known.values())
        return [
            rival
            for rival in valid
            if len(self.points(rival.name)) < _TRUSTED or known.get(rival.name, 0.0) <= limit
        ]

    def measure(self, size: int, care: Care, deadline: Deadline, *, cold: bool = True) -> bool:
        """Measure at M, unless that was done before, here or in an earlier process.

        Returns:
            Whether kernels were launched.
        """
        if (size, cold) in self.samples:
            return False
        rivals = {rival.name: rival.digest for rival in self.rivals_at(size)}
        point = f"M={size} {'cold' if cold else 'warm'}"
        found = self._store.find(point, rivals)
        launched = found is None
        if found is None:
            found = contend(list(rivals), self.contest.prepare(size, cold), care, deadline)
            self._store.keep(point, rivals, found)
        self.samples[size, cold] = found
        self._seconds[size, cold] = {name: estimate(taken) for name, taken in found.items()}
        if cold:
            for name in found:
                self._curves.pop(name, None)
        return launched

    def measured(self) -> list[int]:
        """The M that were measured with the weight from memory, ascending."""
        return sorted(size for size, cold in self.samples if cold)

    def points(self, name: str, *, cold: bool = True) -> dict[int, float]:
        """A kernel's seconds by M, ascending."""
        return {
            size: seconds[name]
            for (size, from_memory), seconds in sorted(self._seconds.items())
            if from_memory == cold and name in seconds
        }

    def curve(self, name: str) -> Curve | None:
        """A kernel's seconds at every M, or None before it was measured at all."""
        if name not in self._curves:
            points = self.points(name)
            if not points:
                return None
            self._curves[name] = Curve.through(points)
        return self._curves[name]

    def times(self, sizes: Sizes) -> npt.NDArray[np.float64]:
        """Seconds of each kernel at some sizes, [rivals, sizes]; infinite where it is not valid or never ran."""
        times = np.full((len(self.contest.rivals), len(sizes)), np.inf)
        for row, rival in zip(times, self.contest.rivals, strict=True):
            curve = self.curve(rival.name)
            if curve is not None:
                last = rival.rows[1] if rival.rows[1] is not None else np.inf
                valid = (rival.rows[0] <= sizes) & (sizes <= last)
                row[valid] = curve.seconds(sizes[valid])
        return times

    def division(self, distribution: Distribution, limit: int) -> list[tuple[int, str]]:
        """The ranges of least expected time: (first M, kernel), ascending.

        Raises:
            InputError: So few kernels do not serve every M.
        """
        sizes = distribution.sizes()
        times = self.times(sizes)
        cost = times * distribution.over(sizes, times.min(axis=0))
        return [
            (int(sizes[start]), self.contest.rivals[kernel].name)
            for start, kernel in divide(cost, limit, PRICE)
        ]


def serving(division: list[tuple[int, str]], size: int) -> str:
    """The kernel that a division gives M to."""
    return next(name for first, name in reversed(division) if first <= size)
