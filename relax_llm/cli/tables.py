"""Tables of facts, kernels and numbers, as wide as whoever reads them can take."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from relax_llm.cli.screen import console, printable

if TYPE_CHECKING:
    from rich.console import Console


def facts(rows: Mapping[str, str]) -> None:
    """Print names and values under each other, long values continued beneath their beginning."""
    if not sys.stdout.isatty():
        label = max(map(len, rows))
        sys.stdout.write("".join(f"{name:<{label}}  {printable(value)}\n" for name, value in rows.items()))
        return
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, printable(value))
    console(sys.stdout).print(grid)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> None:
    """Print rows under each other; on a terminal that is too narrow, every row as a block of its own.

    One line for each row is what `grep` and people with wide terminals want; a formula cut into five lines of
    eight characters is what nobody wants.

    Args:
        header: Names of the columns.
        rows: Their cells.
        numbers: Columns to align on the right.
    """
    out = console(sys.stdout)
    lines = [[printable(cell) for cell in row] for row in rows]
    columns = [max(map(_width, cells)) for cells in zip(header, *lines, strict=True)]
    if sum(columns) + 2 * (len(columns) - 1) <= out.width:
        _print_rows(out, header, lines, columns, frozenset(numbers))
    else:
        _print_blocks(out, header, lines)


def _print_rows(
    out: "Console",
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    columns: Sequence[int],
    right: frozenset[int],
) -> None:
    from rich.text import Text

    for index, line in enumerate([header, *lines]):
        cells = [
            " " * (width - _width(cell)) + cell if column in right else cell + " " * (width - _width(cell))
            for column, (cell, width) in enumerate(zip(line, columns, strict=True))
        ]
        out.print(Text("  ".join(cells).rstrip(), "" if index else "bold"), soft_wrap=True)


def _print_blocks(out: "Console", header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    label = max(map(len, header))
    for index, line in enumerate(lines):
        if index:
            out.print()
        out.print(Text(line[0], "bold", overflow="fold"))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=label + 2, justify="right", style="dim")
        grid.add_column(overflow="fold")
        for name, cell in zip(header[1:], line[1:], strict=True):
            if cell:
                grid.add_row(name, cell)
        out.print(grid)


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
    return f"{value:g} {unit}".rstrip()


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"
