"""Where to measure, within a budget: from coarse to fine, then at boundaries, then where predictions were wrong."""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from relax_llm.tuning.contest import Findings
from relax_llm.tuning.distribution import LARGEST, Distribution
from relax_llm.tuning.rounds import Care, Deadline

_LEVELS = (
    (1, 4, 16, 64, 256),
    (2, 8, 32, 128, 512),
    (3, 5, 6, 7, 12, 24, 48, 96, 1024),
    (9, 10, 11, 13, 14, 15, 20, 28, 40, 56, 80, 192, 384, 2048, LARGEST),
)
"""Sizes that are measured in any case, coarse ones first."""

_WARM = (1, 4, 16, 64)

_CLOSE = 1.05
"""A boundary is settled when both neighbours are measured, or sizes that near to each other on both sides."""

_GAP = 1.08
"""Neighbouring measured sizes within this ratio are near enough to interpolate without a test."""

_GOOD = 0.04
"""A prediction is good when it misses by less; where it does not, both halves of the gap are tested as well."""

_NEAR = 1.15
"""Predictions matter for kernels within this ratio of the fastest."""

_SHARE = 0.3
"""A point that would take more than this part of its problem's share of the budget waits until all others are done."""

_SEARCHES = 4
"""Times that boundaries are sought again before the next test of a prediction."""


def explore(
    contests: Sequence[Findings],
    distribution: Distribution,
    limit: int,
    care: Care,
    deadline: Deadline,
    told: Callable[[], None] = lambda: None,
) -> None:
    """Measure until the choice is settled everywhere or the time is over.

    The next point is always one of the problem that has had the least time: a large one does not starve the others.

    Args:
        contests: What to measure, and where findings go.
        distribution: How often sizes occur.
        limit: The most kernels in a plan of one problem.
        care: How carefully.
        deadline: When to end.
        told: Called after each point.
    """
    share = _SHARE * deadline.budget / max(1, len(contests))
    queue = [
        (0.0, index, _points(found, distribution, limit, care, deadline, share))
        for index, found in enumerate(contests)
    ]
    while queue and deadline.left() > 0:
        spent, index, points = heapq.heappop(queue)
        began = deadline.left()
        if next(points, None) is not None:
            heapq.heappush(queue, (spent + began - deadline.left(), index, points))
            told()


def _points(
    found: Findings, distribution: Distribution, limit: int, care: Care, deadline: Deadline, share: float
) -> Iterator[int]:
    """Measure one point of a contest at each step, in the order of what is learned from it."""
    late = []
    for size, cold in _grid(found):
        if _expense(found, size, care) > share:
            late.append(size)
        elif found.measure(size, care, deadline, cold=cold):
            yield size
    tests = _Tests(found, distribution)
    busy = True
    while busy:
        busy = False
        for _ in range(_SEARCHES):
            doubtful = _unsettled(found, distribution, limit)
            if doubtful is None or _expense(found, doubtful, care) > share:
                break
            busy = found.measure(doubtful, care, deadline)
            yield doubtful
        tested = tests.next(care, deadline, share)
        if tested is not None:
            busy = True
            yield tested
    for size in sorted(late):
        if _expense(found, size, care) < deadline.left():
            found.measure(size, care, deadline)
            yield size


def _grid(found: Findings) -> Iterator[tuple[int, bool]]:
    """Sizes, and whether with the weight from memory."""
    for level, sizes in enumerate(_LEVELS):
        yield from ((size, True) for size in sizes if size <= found.contest.largest)
        if level == 0:
            yield from ((size, True) for size in _edges(found))
        if level == 1:
            yield from ((size, False) for size in _WARM if size <= found.contest.largest)


def _edges(found: Findings) -> list[int]:
    """Where a kernel begins or ends to be valid, on both sides."""
    sizes = set()
    for rival in found.contest.rivals:
        first, last = rival.rows
        sizes |= {first - 1, first} | ({last, last + 1} if last is not None else set())
    return sorted(size for size in sizes if 1 <= size <= found.contest.largest)


def _expense(found: Findings, size: int, care: Care) -> float:
    """Seconds that a point takes, as far as is known."""
    curves = [found.curve(rival.name) for rival in found.rivals_at(size)]
    seconds = sum(max(care.batch, curve.at(size)) for curve in curves if curve is not None)
    return seconds * (care.least + 2)


def _unsettled(found: Findings, distribution: Distribution, limit: int) -> int | None:
    """A size next to a boundary that is to be measured before the boundary can be believed."""
    rivals = {rival.name: rival for rival in found.contest.rivals}
    known = found.measured()
    for (_, before), (first, after) in pairwise(found.division(distribution, limit).ranges):
        if first > min(LARGEST, found.contest.largest):
            continue
        if not rivals[before].serves(first) or not rivals[after].serves(first - 1):
            continue  # not a choice: one of the two is not valid on the other side
        lower = max((size for size in known if size < first), default=0)
        upper = min((size for size in known if size >= first), default=LARGEST)
        if upper - lower > 1 and upper > _CLOSE * lower:
            for size in (first - 1, first):
                if size not in known:
                    return size
    return None


class _Tests:
    """Sizes between measured ones, where predictions are put to the test; the weightiest gaps come first."""

    def __init__(self, found: Findings, distribution: Distribution) -> None:
        self._found = found
        self._distribution = distribution
        self._gaps: list[tuple[float, int, int]] = []
        for lower, upper in pairwise(found.measured()):
            self._add(lower, upper)

    def _add(self, lower: int, upper: int) -> None:
        if upper - lower > 1 and upper > _GAP * lower:
            weight = sum(self._distribution.weights.get(size, 0.0) for size in range(lower + 1, upper))
            heapq.heappush(self._gaps, (-weight - 1e-6 * math.log(upper / lower), lower, upper))

    def next(self, care: Care, deadline: Deadline, share: float) -> int | None:
        """Test the next gap that is worth the time, and say where; None when none is left."""
        while self._gaps:
            _, lower, upper = heapq.heappop(self._gaps)
            size = min(max(round(math.sqrt(lower * upper)), lower + 1), upper - 1)
            if (size, True) not in self._found.samples:
                if _expense(self._found, size, care) > share:
                    continue
                if self._is_good(size, care, deadline):
                    return size
            self._add(lower, size)
            self._add(size, upper)
            return size
        return None

    def _is_good(self, size: int, care: Care, deadline: Deadline) -> bool:
        """Whether the kernels that matter take what was predicted, each beside the fastest.

        Beside it, and not in seconds: when the machine has other work to do, all take longer, and no choice changes.
        """
        found = self._found
        curves = {rival.name: found.curve(rival.name) for rival in found.contest.rivals}
        predicted = {name: curve.at(size) for name, curve in curves.items() if curve is not None}
        found.measure(size, care, deadline)
        measured = {name: points[size] for name in predicted if size in (points := found.points(name))}
        best = min(measured, key=lambda name: measured[name])
        misses = [
            (seconds / measured[best]) / (predicted[name] / predicted[best]) - 1
            for name, seconds in measured.items()
            if name != best and min(seconds / measured[best], predicted[name] / predicted[best]) <= _NEAR
        ]
        found.misses += misses
        return max(map(abs, misses), default=0.0) <= _GOOD
