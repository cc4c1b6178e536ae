"""Tables of facts, kernels and numbers, as wide as whoever reads them can take."""

import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from relax_llm.cli.screen import console, printable

if TYPE_CHECKING:
    from rich.console import Console

    from relax_llm.table import Table

Row = Sequence[str]


def facts(rows: Mapping[str, str]) -> None:
    """Print names and values under each other, long values continued beneath their beginning."""
    out = console(sys.stdout)
    label = max(map(len, rows)) + 2
    for name, value in rows.items():
        _print_labelled(out, f"{name:<{label}}", value, "bold")


def table(header: Row, rows: Iterable[Row], *, numbers: Iterable[int] = (), title: int = 0) -> None:
    """Print one line for each row; on a terminal too narrow for that, blocks or folded cells.

    One line for each row is what `grep` and people with wide terminals want; a formula cut into five lines of eight
    characters is what nobody wants.

    Args:
        header: Names of the columns.
        rows: Their cells.
        numbers: Columns to align on the right.
        title: On a narrow terminal, how many columns become the title of a block that has the others beneath it;
            0 keeps the columns and folds the cells.
    """
    out = console(sys.stdout)
    lines = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(_width, cells)) for cells in zip(header, *lines, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) <= out.width:
        _print_lines(out, [header, *lines], widths, frozenset(numbers))
    elif title:
        _print_blocks(out, header, lines, frozenset(numbers), title)
    else:
        _print_folded(out, header, lines, frozenset(numbers))


def show(found: "Table", *, title: int = 0) -> None:
    """Print a table that somebody made; `title` as in `table`."""
    table(found.header, found.rows, numbers=found.numbers, title=title)


def _print_lines(out: "Console", lines: Sequence[Row], widths: Sequence[int], right: frozenset[int]) -> None:
    from rich.text import Text

    for index, line in enumerate(lines):
        cells = []
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            space = " " * (width - _width(cell))
            cells.append(space + cell if column in right else cell + space)
        out.print(Text("  ".join(cells).rstrip(), "" if index else "bold"), soft_wrap=True)


def _print_blocks(
    out: "Console", header: Row, lines: Sequence[Row], numbers: frozenset[int], title: int
) -> None:
    from rich.text import Text

    label = max(map(len, header[title:]))
    for line in lines:
        heads = [_counted(cell, header[i]) if i in numbers else cell for i, cell in enumerate(line[:title])]
        out.print(Text("  ".join(heads), "bold", overflow="fold"))
        for name, cell in zip(header[title:], line[title:], strict=True):
            if cell:
                _print_labelled(out, f"  {name:>{label}}  ", cell, "dim")


def _print_folded(out: "Console", header: Row, lines: Sequence[Row], numbers: frozenset[int]) -> None:
    from rich.table import Table

    folded = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(header):
        is_number = index in numbers
        folded.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for line in lines:
        folded.add_row(*line)
    out.print(folded)


def _print_labelled(out: "Console", label: str, value: str, style: str) -> None:
    from rich.text import Text

    width = max(20, out.width - len(label))
    wrapped = textwrap.wrap(printable(value), width, break_on_hyphens=False) or [""]
    out.print(Text.assemble((label, style), wrapped[0]), soft_wrap=True)
    for line in wrapped[1:]:
        out.print(Text(" " * len(label) + line), soft_wrap=True)


def _counted(count: str, name: str) -> str:
    return f"{count} {name.removesuffix('s') if count == '1' else name}"


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def quantity(value: float, unit: str = "") -> str:
    """A number with three significant digits and a decimal prefix.

    >>> quantity(7086336, "B")
    '7.09 MB'
    """
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{_three_digits(value / factor)} {prefix}{unit}"
    return f"{_three_digits(value).rstrip('0').rstrip('.') if value % 1 else f'{value:.0f}'} {unit}".rstrip()


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"
