"""A plan's measurements as a picture: SVG, written here, so that no drawing library is needed."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from relax_llm.errors import InputError, PlanError
from relax_llm.plan.plan import Entry, Plan

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT = 640, 200, 60, 34, 190
_PANEL = _TOP + _HEIGHT + 56
_MOST = 2.0
"""A kernel that takes so many times the fastest one's time is drawn at the upper edge."""

_FONT = 'font-family="sans-serif" font-size="11"'


def plot(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw, for each problem that was measured, every kernel's time by M as a multiple of the fastest one's.

    Below the curves a band shows which kernel the plan gives each range to.

    Args:
        plan: With measurements.
        path: A file whose name ends in .svg.

    Raises:
        InputError: The name ends otherwise, or the file cannot be written.
        PlanError: The plan has no measurements.
    """
    file = Path(path)
    check_name(file)
    entries = [entry for entry in plan.entries if any(taken.cold for taken in entry.measurements)]
    if not entries:
        raise PlanError("The plan has no measurements, so there is nothing to draw.")
    width, height = _LEFT + _WIDTH + _RIGHT, _PANEL * len(entries) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, entry in enumerate(entries):
        parts.append(f'<g transform="translate({_LEFT},{index * _PANEL + _TOP})">')
        parts += _panel(entry)
        parts.append("</g>")
    try:
        file.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")
    except OSError as error:
        raise InputError(f"The plot {file} cannot be written: {error.strerror}.") from error


def check_name(path: Path) -> None:
    """Refuse other formats than SVG.

    Raises:
        InputError: The name does not end in .svg.
    """
    if path.suffix.lower() != ".svg":
        raise InputError(f"Plots are SVG: give a name that ends in .svg, not {path.name}.")


def _panel(entry: Entry) -> Iterator[str]:
    times: dict[int, dict[str, float]] = {}
    for taken in entry.measurements:
        if taken.cold:
            times.setdefault(taken.sizes["M"], {})[taken.kernel] = taken.seconds
    largest = max(2, *times)
    colors = _colors(entry)

    def x(size: float) -> float:
        return _WIDTH * math.log(size) / math.log(largest)

    def y(ratio: float) -> float:
        return _HEIGHT * (1 - (min(ratio, _MOST) - 1) / (_MOST - 1))

    yield _text(
        0, -14, f"{entry.problem}, {len(entry.sites)} sites: time as a multiple of the fastest kernel's"
    )
    for ratio in (1.0, 1.25, 1.5, 1.75, 2.0):
        yield f'<line x1="0" x2="{_WIDTH}" y1="{y(ratio):.1f}" y2="{y(ratio):.1f}" stroke="#ddd"/>'
        yield _text(-8, y(ratio) + 4, f"{ratio:g}", "end")
    size = 1
    while size <= largest:
        yield f'<line x1="{x(size):.1f}" x2="{x(size):.1f}" y1="0" y2="{_HEIGHT}" stroke="#eee"/>'
        yield _text(x(size), _HEIGHT + 36, f"M={size}" if size == 1 else str(size), "middle")
        size *= 4
    for name, color in colors.items():
        points = [
            (x(size), y(measured[name] / min(measured.values())))
            for size, measured in sorted(times.items())
            if name in measured
        ]
        line = " ".join(f"{across:.1f},{up:.1f}" for across, up in points)
        yield f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        yield from (
            f'<circle cx="{across:.1f}" cy="{up:.1f}" r="2" fill="{color}"/>' for across, up in points
        )
    yield from _ranges(entry, colors, largest, x)
    for row, (name, color) in enumerate(colors.items()):
        yield f'<rect x="{_WIDTH + 16}" y="{16 * row}" width="10" height="10" fill="{color}"/>'
        yield _text(_WIDTH + 32, 16 * row + 9, name)


def _ranges(
    entry: Entry, colors: Mapping[str, str], largest: int, x: Callable[[float], float]
) -> Iterator[str]:
    for part in entry.ranges:
        first, last = part.sizes["M"]
        if first <= largest:
            start, end = x(first), x(min(largest, last + 1 if last else largest))
            color = colors.get(part.kernel, "black")
            yield (
                f'<rect x="{start:.1f}" y="{_HEIGHT + 6}" width="{max(2.0, end - start):.1f}" height="12" '
                f'fill="{color}"><title>{escape(f"{part}: {part.kernel}")}</title></rect>'
            )


def _colors(entry: Entry) -> dict[str, str]:
    names: Sequence[str] = list(dict.fromkeys(taken.kernel for taken in entry.measurements if taken.cold))
    return {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}


def _text(across: float, down: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{across:.1f}" y="{down:.1f}" {_FONT} text-anchor="{anchor}">{escape(text)}</text>'
