"""Tables for people: as text, and as HTML where a notebook asks for it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """Cells in rows under a header. Its text is one line for each row; a notebook shows it as HTML.

    Attributes:
        header: Names of the columns.
        rows: Cells of each row, as text.
        numbers: Columns that are aligned on the right.
        caption: What it is a table of; empty for nothing.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    caption: str = ""

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.rjust(width) if column in self.numbers else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.caption, *text] if self.caption else text)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        head = "".join(self._cell("th", column, name) for column, name in enumerate(self.header))
        body = "".join(
            f"<tr>{''.join(self._cell('td', column, cell) for column, cell in enumerate(row))}</tr>"
            for row in self.rows
        )
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _cell(self, tag: str, column: int, text: str) -> str:
        side = "right" if column in self.numbers else "left"
        return f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>'


def html(title: str, tables: Iterable[Table], note: str = "") -> str:
    """Tables under each other as one piece of HTML, with a title before and a note behind them."""
    parts = [f"<p>{escape(title)}</p>", *(table._repr_html_() for table in tables)]
    return "".join([*parts, f"<p>{escape(note)}</p>"] if note else parts)
