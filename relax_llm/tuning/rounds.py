"""Measuring rivals against each other: interleaved rounds, so that what else the machine does meets all alike."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

Run = Callable[[str, int], float]
"""Launches a kernel, named, some number of times, and gives the seconds that all of them took."""

_LONG = 0.1
"""A round of so many seconds is as good as several short ones."""

_AGREEING = 3
"""Samples that must agree before a rival's time is known."""


@dataclass(frozen=True)
class Care:
    """How carefully to measure.

    Attributes:
        batch: Seconds that one sample lasts at least: as many launches as that takes.
        least: Rounds at least; three where rounds are long.
        most: Rounds at most.
        spread: A rival's fastest samples agree when they are within this part of each other.
        hopeless: A rival that takes so many times what the best takes leaves the race.
    """

    batch: float = 1e-3
    least: int = 5
    most: int = 15
    spread: float = 0.02
    hopeless: float = 1.3


class Deadline:
    """When to stop.

    Attributes:
        budget: Seconds in all.
    """

    def __init__(self, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        self._clock = clock
        self._end = clock() + budget

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that does not count."""
        began = self._clock()
        try:
            yield
        finally:
            self._end += self._clock() - began

    def left(self) -> float:
        """Seconds left; negative when over."""
        return self._end - self._clock()


def contend(rivals: Sequence[str], run: Run, care: Care, deadline: Deadline) -> dict[str, list[float]]:
    """Launch rivals in rounds until their times are known.

    In each round every rival in the race launches for a batch; an unmeasured launch of each comes before the first.
    The least number of rounds is run whatever the deadline says.

    Args:
        rivals: Names of kernels.
        run: Launches one.
        care: How carefully.
        deadline: When to add no more rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    counts = {name: max(1, round(care.batch / max(run(name, 1), 1e-9))) for name in rivals}
    racing = list(rivals)
    for index in range(care.most):
        for name in racing:
            count = counts[name]
            samples[name].append(run(name, count) / count)
        if index == 0:  # the launch that came before also waited for memory and for threads
            counts = {name: max(1, round(care.batch / max(samples[name][0], 1e-9))) for name in rivals}
        if index + 1 < _AGREEING:
            continue
        best = min(estimate(samples[name]) for name in racing)
        racing = [
            name
            for name in racing
            if min(samples[name]) <= care.hopeless * best or _disagreement(samples[name]) > care.spread
        ]
        long = sum(samples[name][-1] * counts[name] for name in racing) > _LONG
        if index + 1 < (_AGREEING if long else care.least):
            continue
        if deadline.left() <= 0 or all(_disagreement(samples[name]) <= care.spread for name in racing):
            break
    return samples


def estimate(samples: Sequence[float]) -> float:
    """A kernel's seconds from those of several rounds: the median of the fastest three.

    Other work on the machine only ever adds time, often to most rounds, so the middle of all of them tells of that
    work. The fastest one may be luck; three that agree are not.
    """
    return median(sorted(samples)[:_AGREEING])


def _disagreement(samples: Sequence[float]) -> float:
    """By what part the fastest three differ."""
    fastest = sorted(samples)[:_AGREEING]
    return fastest[-1] / fastest[0] - 1
