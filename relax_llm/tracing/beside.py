"""Two models that were traced in turns: where one of them takes less time than the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from relax_llm.table import Table
from relax_llm.tracing.summary import Grouping, names_of

if TYPE_CHECKING:
    from relax_llm.tracing.trace import Trace

ALL = "all calls"

_HEADER = ("function", "site", "operator")


@dataclass(frozen=True)
class Pair:
    """What took two models some time.

    Attributes:
        names: A function, a site and an operator; or a function and `ALL`.
        first: Seconds that it took the first model, in each round; empty where that has no such launches.
        second: Likewise the other one.
    """

    names: tuple[str, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def times(self) -> float | None:
        """How many times as fast the other model is: the median of the ratios within rounds; None if one has none."""
        if not self.first or not self.second:
            return None
        return median(one / other for one, other in zip(self.first, self.second, strict=True))


def pairs(first: Sequence["Trace"], second: Sequence["Trace"], *, every_site: bool = False) -> list[Pair]:
    """What the two models did, by function, site and operator: functions first, then what took longest.

    Args:
        first: Traces of a model, one of each round.
        second: Those of the other one, in the same rounds.
        every_site: Tell the layers apart.
    """
    what: Grouping = "site" if every_site else "place"
    one, other = (_seconds(traces, what) for traces in (first, second))
    found = [Pair(names, one.get(names, ()), other.get(names, ())) for names in {**one, **other}]
    return sorted(found, key=lambda pair: (pair.names[1] != ALL, -max(map(sum, (pair.first, pair.second)))))


def _seconds(traces: Sequence["Trace"], what: Grouping) -> Mapping[tuple[str, ...], tuple[float, ...]]:
    """Seconds of each round, by names."""
    found: dict[tuple[str, ...], list[float]] = {}
    for number, trace in enumerate(traces):
        for call in trace.calls:
            whole: tuple[tuple[str, ...], float] = ((ALL, ""), call.duration)
            for group, seconds in (whole, *((names_of(one, what), one.duration) for one in call.launches)):
                names = (call.function, *group)
                rounds = found.setdefault(names, [0.0] * len(traces))
                rounds[number] += seconds
    return {names: tuple(rounds) for names, rounds in found.items()}


def table(found: Sequence[Pair]) -> Table:
    """The medians of both, and how many times as fast the second one is."""

    def milliseconds(seconds: Sequence[float]) -> str:
        return f"{median(seconds) * 1e3:.3f}" if seconds else ""

    rows = [
        (
            *pair.names,
            milliseconds(pair.first),
            milliseconds(pair.second),
            "" if pair.times is None else f"{pair.times:.3f}x",
        )
        for pair in found
    ]
    return Table((*_HEADER, "ms", "ms", "times"), rows, frozenset({3, 4, 5}))
