"""A chart for the documentation: everybody's speed, relative to the best peer of each case."""

from collections.abc import Sequence
from html import escape

from benchmarks.report import Report

WIDTH, LEFT, RIGHT, ROW, GAP = 760, 110, 40, 22, 44
OURS = "#c2410c"
PEERS = ("#1d4ed8", "#0f766e", "#7e22ce", "#4d7c0f", "#0e7490", "#a16207", "#be185d", "#57534e")


def chart(reports: Sequence[Report]) -> str:
    """An SVG: a panel for each weight format, a line for each case, a dot for each engine; 1 is the best peer.

    Where an engine was measured in several variants, the fastest has the dot.
    """
    engines = sorted({engine for report in reports for engine in _relative(report)})
    peers = [engine for engine in engines if engine != _ours(reports)]
    colours = {engine: PEERS[index % len(PEERS)] for index, engine in enumerate(peers)}
    colours[_ours(reports)] = OURS
    values = [value for r in reports for row in _relative(r).values() for value in row.values()]
    most = max((1.25, *values)) * 1.04

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / most

    parts: list[str] = []
    y = 30
    for index, engine in enumerate([_ours(reports), *peers]):
        x = LEFT + (index % 4) * 160
        parts += [_dot(x, y - 4, colours[engine]), _text(x + 10, y, engine)]
        y += ROW if index % 4 == 3 else 0
    y += GAP
    for report in reports:
        relative = _relative(report)
        parts.append(_text(8, y, report.weights, bold=True))
        top = y - 14
        for case in report.cases:
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y - 4}" y2="{y - 4}" stroke="#e5e5e5"/>'
            )
            parts.append(_text(LEFT - 8, y, str(case), end=True))
            for engine in (*peers, _ours(reports)):
                value = relative.get(engine, {}).get(str(case))
                if value is not None:
                    parts.append(_dot(across(value), y - 4, colours[engine], large=engine == _ours(reports)))
            y += ROW
        parts.append(
            f'<line x1="{across(1):.1f}" x2="{across(1):.1f}" y1="{top}" y2="{y - ROW + 6}" '
            'stroke="#737373" stroke-dasharray="3 3"/>'
        )
        y += ROW
    parts += [_text(across(1), y - ROW, "the best peer: 1", middle=True)]
    title = escape(reports[0].title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        f'font-family="sans-serif" font-size="12"><title>{title}</title>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _ours(reports: Sequence[Report]) -> str:
    return next((_engine(name) for report in reports for name in report.ours), "")


def _engine(name: str) -> str:
    """The engine's name without its version and its variant."""
    words = name.split()
    return " ".join(words[: next(i for i, word in enumerate(words) if word[0].isdigit())])


def _relative(report: Report) -> dict[str, dict[str, float]]:
    """Of each engine, its speed at each case over that of the best peer."""
    result: dict[str, dict[str, float]] = {}
    for case, best in report.best.items():
        unit = report.figures[best].rate(case)
        for name, figures in report.figures.items():
            rate = figures.rate(case)
            if rate and unit:
                row = result.setdefault(_engine(name), {})
                row[str(case)] = max(rate / unit, row.get(str(case), 0))
    return result


def _dot(x: float, y: float, colour: str, *, large: bool = False) -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="{6 if large else 4}" fill="{colour}" fill-opacity="0.85"/>'


def _text(
    x: float, y: float, text: str, *, bold: bool = False, end: bool = False, middle: bool = False
) -> str:
    style = ' font-weight="bold"' if bold else ""
    style += ' text-anchor="end"' if end else ' text-anchor="middle"' if middle else ""
    return f'<text x="{x:.1f}" y="{y}"{style}>{escape(text)}</text>'
