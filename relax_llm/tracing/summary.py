"""Where the time of a trace went: totals by operator, kernel and site, and what no kernel accounts for."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from relax_llm.errors import InputError
from relax_llm.table import Table

if TYPE_CHECKING:
    from relax_llm.tracing.trace import Trace, TracedLaunch

Grouping = Literal["operator", "kernel", "site", "place"]

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_MOST = 40


@dataclass(frozen=True)
class Total:
    """Launches taken together.

    Attributes:
        names: What they have in common: an operator; a kernel and what the model calls; a site and an operator.
        launches: How many they are.
        seconds: How long they took.
        share: Of the time of all calls.
        flops: Operations of arithmetic.
        bytes: Memory that they must at least have moved.
        limit: How much of what the machine can do they did.
    """

    names: tuple[str, ...]
    launches: int
    seconds: float
    share: float
    flops: float
    bytes: float
    limit: float


_NAMES: Mapping[str, tuple[tuple[str, ...], Callable[["TracedLaunch"], tuple[str, ...]]]] = {
    "operator": (("operator",), lambda launch: (launch.operator,)),
    "kernel": (("kernel", "serves"), lambda launch: (launch.kernel, launch.symbol)),
    "site": (("site", "operator"), lambda launch: (launch.site, launch.operator)),
    "place": (("site", "operator"), lambda launch: (_LAYER.sub("*", launch.site), launch.operator)),
}


def names_of(launch: "TracedLaunch", what: Grouping) -> tuple[str, ...]:
    """What a launch has in common with others of its group."""
    return _NAMES[what][1](launch)


def totals(trace: "Trace", what: Grouping) -> tuple[Total, ...]:
    """Launches by what they have in common, those that took longest first.

    Raises:
        InputError: Traces are not grouped by this.
    """
    if what not in get_args(Grouping):
        raise InputError(f"Launches are grouped by {', '.join(get_args(Grouping))}, not by {what!r}.")
    groups: dict[tuple[str, ...], list[TracedLaunch]] = {}
    for launch in trace.launches:
        groups.setdefault(names_of(launch, what), []).append(launch)
    found = [_total(trace, names, launches) for names, launches in groups.items()]
    return tuple(sorted(found, key=lambda total: -total.seconds))


def _total(trace: "Trace", names: tuple[str, ...], launches: Sequence["TracedLaunch"]) -> Total:
    seconds = sum(launch.duration for launch in launches)
    least = sum(trace.limits.seconds(launch.flops, launch.bytes, launch.products) for launch in launches)
    return Total(
        names,
        len(launches),
        seconds,
        seconds / trace.duration if trace.duration else 0.0,
        sum(launch.flops for launch in launches),
        sum(launch.bytes for launch in launches),
        least / seconds if seconds else 0.0,
    )


def headline(trace: "Trace") -> str:
    """What ran, how long it took, and what the machine can do, in a sentence or two."""
    if not trace.calls:
        return "Nothing was traced: no compiled function ran."
    counted = Counter(call.function for call in trace.calls)
    ran = ", ".join(f"{name} {count}" for name, count in counted.items())
    return (
        f"Calls: {ran}; {len(trace.launches)} launches in {_milliseconds(trace.duration)} ms. "
        f"This machine can do {trace.limits}."
    )


def tables(trace: "Trace", *, every_site: bool = False) -> list[Table]:
    """Totals by operator, by kernel and by site.

    Args:
        trace: What ran.
        every_site: Tell the layers apart.
    """
    kernels = trace.by("kernel")
    operators = _table(trace, "operator", trace.by("operator"))
    inside = _total(trace, ("all kernels",), trace.launches)
    rows = [
        *operators.rows,
        _cells(inside),
        _time("outside kernels", trace.outside, trace),
        _time("all calls", trace.duration, trace),
        _time("between calls", trace.between, None),
    ]
    return [
        Table(operators.header, rows, operators.numbers),
        _table(trace, "kernel", kernels),
        _table(trace, "site", trace.by("site" if every_site else "place")),
    ]


def listed(launches: Sequence["TracedLaunch"]) -> Table:
    """Launches as a table; of many, the first and the last."""
    shown = list(range(len(launches)))
    if len(launches) > _MOST:
        shown = [*shown[: _MOST // 2], *shown[-_MOST // 2 :]]
    rows: list[tuple[str, ...]] = [
        (
            f"{launch.function}[{launch.index}]",
            launch.site,
            launch.operator,
            launch.kernel,
            ", ".join(f"{name} = {size}" for name, size in launch.sizes.items()),
            f"{launch.duration * 1e6:.1f}",
            f"{launch.gflops:.1f}",
            f"{launch.gbytes:.1f}",
        )
        for launch in (launches[index] for index in shown)
    ]
    if len(shown) < len(launches):
        rows.insert(_MOST // 2, (f"... {len(launches) - _MOST} more", *[""] * 7))
    header = ("launch", "site", "operator", "kernel", "sizes", "us", "GFLOP/s", "GB/s")
    return Table(header, rows, frozenset({5, 6, 7}))


def _table(trace: "Trace", what: Grouping, found: Sequence[Total]) -> Table:
    names = _NAMES[what][0]
    header = (*names, "launches", "ms", "share", "GFLOP/s", "GB/s", "of limit")
    return Table(header, [_cells(total) for total in found], frozenset(range(len(names), len(header))))


def _cells(total: Total) -> tuple[str, ...]:
    seconds = total.seconds or float("inf")
    return (
        *total.names,
        str(total.launches),
        _milliseconds(total.seconds),
        f"{total.share:.1%}",
        f"{total.flops / seconds / 1e9:.1f}",
        f"{total.bytes / seconds / 1e9:.1f}",
        f"{total.limit:.0%}",
    )


def _time(name: str, seconds: float, trace: "Trace | None") -> tuple[str, ...]:
    """A line of time in which no kernel is alone; what is between calls is no part of theirs."""
    share = f"{seconds / trace.duration:.1%}" if trace is not None and trace.duration else ""
    return (name, "", _milliseconds(seconds), share, "", "", "")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
