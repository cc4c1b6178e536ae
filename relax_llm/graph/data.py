"""A graph as plain data, for JSON and for the page. docs/tracing.md says what each field is."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.manifest import Dispatcher
from relax_llm.errors import InputError
from relax_llm.graph.graph import Graph
from relax_llm.plan.plan import Entry
from relax_llm.plan.sizes import Box
from relax_llm.tracing.trace import Trace, TracedLaunch


def as_data(graph: Graph, artifact: Artifact) -> dict[str, Any]:
    """Launches and tensors of a function."""
    kernels = artifact.manifest.kernels
    return {
        "function": graph.function,
        "nodes": [
            {
                "index": node.index,
                "site": node.launch.site,
                "layer": node.group,
                "operator": node.operator,
                "symbol": node.launch.kernel,
                "flops": kernels[node.launch.kernel].flops,
                "bytes": kernels[node.launch.kernel].bytes,
                "arguments": [
                    {**asdict(argument), "shape": list(argument.shape)} for argument in node.launch.arguments
                ],
            }
            for node in graph.nodes
        ],
        "edges": [{**asdict(edge), "shape": list(edge.shape)} for edge in graph.edges],
    }


def choices(graph: Graph, artifact: Artifact) -> tuple[list[dict[str, Any]], list[int]]:
    """What the plan says of each launch's kernels.

    Returns:
        The different choices; and for each launch, which of them is its own.
    """
    entries = {
        (site, entry.operator, entry.problem): entry
        for entry in artifact.plan.entries
        for site in entry.sites
    }
    found: list[dict[str, Any]] = []
    places: dict[tuple[str, tuple[str, ...]], int] = {}
    own = []
    for node in graph.nodes:
        symbol = node.launch.kernel
        same = [
            entry
            for (site, operator, _), entry in entries.items()
            if (site, operator) == (node.launch.site, node.operator)
        ]
        entry = _fitting(same, symbol)
        key = symbol, entry.sites if entry else ()
        if key not in places:
            places[key] = len(found)
            found.append(_choice(symbol, entry, artifact.manifest.dispatchers.get(symbol)))
        own.append(places[key])
    return found, own


def _fitting(entries: Sequence[Entry], symbol: str) -> Entry | None:
    """The entry of a site that a symbol belongs to: dispatchers are named after their problem."""
    named = [entry for entry in entries if symbol.startswith(entry.problem)]
    return next(iter(named or entries), None)


def _choice(symbol: str, entry: Entry | None, dispatcher: Dispatcher | None) -> dict[str, Any]:
    if dispatcher is not None:
        ranges = [(str(Box.from_json(served.sizes)), served.kernel) for served in dispatcher.ranges]
    elif entry is not None:
        ranges = [(str(part.sizes), part.kernel) for part in entry.ranges]
    else:
        ranges = [("every size", symbol)]
    return {
        "symbol": symbol,
        "problem": entry.problem if entry else "",
        "layout": entry.layout if entry else "",
        "ranges": [{"sizes": sizes, "kernel": kernel} for sizes, kernel in ranges],
        "candidates": [
            {"kernel": one.kernel, "sizes": str(one.sizes), "reason": one.reason}
            for one in (entry.candidates if entry else ())
        ],
    }


def times(graph: Graph, trace: Trace) -> list[dict[str, Any] | None]:
    """For each launch of a graph, what a trace knows of it; None where it was not launched.

    Raises:
        InputError: The trace has no call of the function, or one with other launches.
    """
    launches: dict[int, list[TracedLaunch]] = {}
    for launch in trace.launches:
        if launch.function == graph.function:
            launches.setdefault(launch.index, []).append(launch)
    if not launches:
        traced = sorted({call.function for call in trace.calls})
        raise InputError(
            f"The trace has no call of {graph.function}"
            + (f", but of {', '.join(traced)}." if traced else ".")
        )
    known = {node.index: (node.launch.site, node.launch.kernel) for node in graph.nodes}
    for index, (first, *_) in launches.items():
        if known.get(index) != (first.site, first.symbol):
            raise InputError(
                f"The trace is of another model: its launch {index} of {graph.function} is {first.symbol} at "
                f"{first.site}."
            )
    return [_time(launches[node.index], trace) if node.index in launches else None for node in graph.nodes]


def _time(launches: Sequence[TracedLaunch], trace: Trace) -> dict[str, Any]:
    seconds = sum(launch.duration for launch in launches)
    flops, moved = sum(launch.flops for launch in launches), sum(launch.bytes for launch in launches)
    least = sum(trace.limits.seconds(launch.flops, launch.bytes, launch.products) for launch in launches)
    served: Mapping[str, int] = Counter(launch.kernel for launch in launches)
    return {
        "launches": len(launches),
        "microseconds": median(launch.duration for launch in launches) * 1e6,
        "gflops": flops / max(seconds, 1e-9) / 1e9,
        "gbytes": moved / max(seconds, 1e-9) / 1e9,
        "limit": least / max(seconds, 1e-9),
        "kernels": dict(served),
        "sizes": _extents(launches),
    }


def _extents(launches: Sequence[TracedLaunch]) -> str:
    """The smallest and largest of each size: "M = 1", "kv_len = 6..13"."""
    shown = []
    for axis in launches[0].sizes:
        low, high = (end(launch.sizes[axis] for launch in launches) for end in (min, max))
        shown.append(f"{axis} = {low}" if low == high else f"{axis} = {low}..{high}")
    return ", ".join(shown)
