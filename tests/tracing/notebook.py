"""HTML as a notebook shows it."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Reader(HTMLParser):
    """What a browser would show of a piece of HTML.

    Attributes:
        tags: The tags that there are, in order.
        cells: The text of the cells of its tables.
        outside: All other text.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.outside = ""
        self._in_cell = False
        self.feed(text)
        self.close()

    @property
    def text(self) -> str:
        """All text."""
        return " ".join([self.outside, *self.cells])

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data
        else:
            self.outside += f" {data}"
