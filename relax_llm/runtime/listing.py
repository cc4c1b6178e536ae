"""The launches of a call as a table: what was made, where it stands, and what is still to come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relax_llm.runtime.choices import Fixed
from relax_llm.runtime.control import sizes_of
from relax_llm.runtime.execution import Knowledge
from relax_llm.table import Table


@dataclass(frozen=True)
class Listed:
    """One launch of a call, made or still to come.

    Attributes:
        index: Its place among the function's launches, from 0.
        site: The place in the model.
        operator: What is computed.
        kernel: The kernel that served it, or that would serve it.
        done: "run", "skipped" or "replaced", and "" before.
        seconds: How long it took; None before, and where it was skipped.
        current: Whether it is the one that is about to be made or was made last.
    """

    index: int
    site: str
    operator: str
    kernel: str
    done: str
    seconds: float | None
    current: bool


def listed(
    knowledge: Knowledge,
    sizes: Mapping[str, int],
    made: Mapping[int, tuple[str, float | None]],
    current: int | None,
) -> tuple[Listed, ...]:
    """All launches of a call.

    Args:
        knowledge: What is known of them.
        sizes: batch, seq and kv_len of the call.
        made: What became of those that were made, and the seconds.
        current: Index of the launch at which the call stands.
    """
    found = []
    for index, (launch, at) in enumerate(knowledge.line.launches):
        if isinstance(at, Fixed):
            kernel = at.kernel
        else:
            known = dict(sizes_of(at.operator, launch, sizes))
            kernel = at.kernels[knowledge.rule[index](tuple(known[axis] for axis in at.axes))][0]
        done, seconds = made.get(index, ("", None))
        found.append(Listed(index, at.site, at.operator, kernel, done, seconds, index == current))
    return tuple(found)


def table(launches: Sequence[Listed], caption: str = "") -> Table:
    """One row for each launch, the current one marked."""
    rows = [
        (
            ">" if one.current else "",
            str(one.index),
            one.site,
            one.operator,
            one.kernel,
            one.done,
            "" if one.seconds is None else f"{one.seconds * 1e6:.1f}",
        )
        for one in launches
    ]
    header = (" ", "launch", "site", "operator", "kernel", "", "us")
    return Table(header, rows, frozenset({1, 6}), caption)
