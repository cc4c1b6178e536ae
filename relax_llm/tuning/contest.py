"""A contest: the kernels that can serve one problem, how to run them, and what was found out about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from relax_llm.errors import InputError
from relax_llm.plan.sizes import Bounds
from relax_llm.tuning.distribution import Distribution
from relax_llm.tuning.law import Curve
from relax_llm.tuning.ranges import divide, expense
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
        layout: How it reads the weight; kernels of a plan's entry share one.
    """

    name: str
    rows: Bounds
    digest: str
    layout: str = ""

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
        misses: How far predictions were off where they were put to the test: of a kernel's seconds as a multiple of
            the fastest one's, measured / predicted - 1.
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
        """Learn what kernels take at M: from an earlier process if it measured that, else by launching them.

        Returns:
            Whether this is new here.
        """
        if (size, cold) in self.samples:
            return False
        rivals = {rival.name: rival.digest for rival in self.rivals_at(size)}
        point = f"M={size} {'cold' if cold else 'warm'}"
        found = self._store.find(point, rivals)
        if found is None:
            found = contend(list(rivals), self.contest.prepare(size, cold), care, deadline)
            self._store.keep(point, rivals, found)
        self.samples[size, cold] = found
        self._seconds[size, cold] = {name: estimate(taken) for name, taken in found.items()}
        if cold:
            for name in found:
                self._curves.pop(name, None)
        return True

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

    def division(self, distribution: Distribution, limit: int) -> Division:
        """The ranges of least expected time; of all weight layouts that kernels read, the one that allows the least.

        Raises:
            InputError: So few kernels do not serve every M, in no layout.
        """
        sizes = distribution.sizes()
        times = self.times(sizes)
        cost = times * distribution.over(sizes, times.min(axis=0))
        rivals = self.contest.rivals
        found: list[tuple[float, Division]] = []
        refusal: InputError | None = None
        for layout in dict.fromkeys(rival.layout for rival in rivals):
            members = [index for index, rival in enumerate(rivals) if rival.layout == layout]
            try:
                divided = divide(cost[members], limit, PRICE)
            except InputError as error:
                refusal = InputError(f"{self.contest.name}: {error}")
                continue
            ranges = tuple((int(sizes[start]), rivals[members[kernel]].name) for start, kernel in divided)
            found.append((expense(cost[members], divided, PRICE), Division(layout, ranges)))
        if refusal is not None and not found:
            raise refusal
        return min(found, key=lambda item: item[0])[1]


@dataclass(frozen=True)
class Division:
    """Which kernel serves which M.

    Attributes:
        layout: The weight layout that they share.
        ranges: (first M, kernel), ascending; the last range is without end.
    """

    layout: str
    ranges: tuple[tuple[int, str], ...]

    def serving(self, size: int) -> str:
        """The kernel for M."""
        return next(name for first, name in reversed(self.ranges) if first <= size)
