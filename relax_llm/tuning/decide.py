"""From findings to the plan: ranges, the measurements behind them, and for every kernel the reason in numbers."""

from collections.abc import Mapping
from dataclasses import replace

from relax_llm.plan.plan import Candidate, Entry, Measurement, Range
from relax_llm.plan.sizes import Box
from relax_llm.tuning.contest import Division, Findings
from relax_llm.tuning.distribution import Distribution

_ENOUGH = (3, 16)
"""Sizes that must be measured, and how far they must reach, before a plan rests on them."""


def decided(entry: Entry, found: Findings, distribution: Distribution, limit: int) -> Entry | None:
    """The entry with measured ranges; None where too little was measured to decide by.

    Args:
        entry: As planned without measurements.
        found: What was measured for it.
        distribution: How often sizes occur.
        limit: The most kernels.

    Raises:
        InputError: So few kernels do not serve every M.
    """
    measured = found.measured()
    few, far = _ENOUGH
    if len(measured) < few or measured[-1] < min(far, found.contest.largest):
        return None
    division = found.division(distribution, limit)
    reasons = _reasons(found, division, limit)
    candidates = tuple(
        replace(candidate, reason=reasons.get(candidate.kernel, candidate.reason))
        for candidate in entry.candidates
    )
    return replace(
        entry,
        layout=division.layout,
        ranges=_ranges(division),
        candidates=candidates,
        measurements=_measurements(found),
    )


def unmeasured(entry: Entry, reason: str) -> Entry:
    """The entry as it is, with what kept it from being measured said of every kernel that serves."""
    used = {part.kernel for part in entry.ranges}
    candidates = tuple(
        Candidate(candidate.kernel, candidate.sizes, f"{candidate.reason}; {reason}")
        if candidate.kernel in used
        else candidate
        for candidate in entry.candidates
    )
    return replace(entry, candidates=candidates)


def _ranges(division: Division) -> tuple[Range, ...]:
    starts = [first for first, _ in division.ranges]
    lasts = [*(start - 1 for start in starts[1:]), None]
    return tuple(
        Range(Box.of(M=(first, last)), name)
        for (first, name), last in zip(division.ranges, lasts, strict=True)
    )


def _measurements(found: Findings) -> tuple[Measurement, ...]:
    return tuple(
        Measurement(rival.name, {"M": size}, float(f"{seconds:.4g}"), cold)
        for cold in (True, False)
        for rival in found.contest.rivals
        for size, seconds in found.points(rival.name, cold=cold).items()
    )


def _reasons(found: Findings, division: Division, limit: int) -> dict[str, str]:
    times: dict[int, dict[str, float]] = {}
    for rival in found.contest.rivals:
        for size, seconds in found.points(rival.name).items():
            times.setdefault(size, {})[rival.name] = seconds
    reasons = {}
    for rival in found.contest.rivals:
        ranges = [part.sizes for part in _ranges(division) if part.kernel == rival.name]
        if ranges:
            reasons[rival.name] = _serves(rival.name, ranges, times)
        elif not any(rival.name in measured for measured in times.values()):
            reasons[rival.name] = "not measured: the budget was over before"
        else:
            layout = "" if rival.layout == division.layout else rival.layout
            reasons[rival.name] = _slower(rival.name, layout, division, times, limit)
    return reasons


def _serves(name: str, ranges: list[Box], times: Mapping[int, Mapping[str, float]]) -> str:
    """Where it serves, and by what it is ahead where it is ahead most."""
    said = f"serves {' and '.join(str(box) for box in ranges)}"
    ahead: list[tuple[float, int, str]] = []
    for size, measured in times.items():
        others = {other: seconds for other, seconds in measured.items() if other != name}
        if name in measured and others and any({"M": size} in box for box in ranges):
            next_ = min(others, key=lambda other: others[other])
            ahead.append((others[next_] / measured[name], size, next_))
    if not ahead:
        return said
    ratio, size, other = max(ahead)
    if ratio <= 1:
        return f"{said}; by measurement no slower than others within what dividing further would gain"
    mine, theirs = times[size][name], times[size][other]
    return f"{said}; by measurement, for instance {_us(mine)} against {_us(theirs)} of {other} at M={size}"


def _slower(
    name: str, layout: str, division: Division, times: Mapping[int, Mapping[str, float]], limit: int
) -> str:
    """By how much it is behind where it is behind least."""
    behind = [
        (measured[name] / measured[division.serving(size)], size)
        for size, measured in times.items()
        if name in measured and division.serving(size) in measured
    ]
    if not behind:
        return "slower by measurement"
    ratio, size = min(behind)
    chosen = division.serving(size)
    numbers = f"{_us(times[size][name])} against {_us(times[size][chosen])} of {chosen} at M={size}"
    if layout:
        return f"reads the weight {layout}, which is stored {division.layout} here; at best {numbers}"
    if ratio >= 1:
        return f"slower by measurement: at best {numbers}"
    if len({kernel for _, kernel in division.ranges}) >= limit:
        return f"left out by the limit of {limit} kernels: {numbers}"
    return f"faster by measurement, but too seldom to be worth a range: {numbers}"


def _us(seconds: float) -> str:
    """Microseconds with three digits."""
    microseconds = 1e6 * seconds
    return f"{microseconds:.0f} us" if microseconds >= 100 else f"{microseconds:.3g} us"
