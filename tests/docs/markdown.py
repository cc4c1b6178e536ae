"""The project's Markdown files, and the fenced blocks and links in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`\n]+`")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: The file it stands in.
        line: The number of its first line.
        language: What follows the opening fence.
        text: Its lines.
        output: The text block that follows it at once, if there is one: what it must print.
    """

    document: Path
    line: int
    language: str
    text: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> Iterator[Block]:
    """All fenced blocks of a document, in order."""
    source = document.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(source))
    for index, match in enumerate(found):
        output = None
        if index + 1 < len(found) and found[index + 1][1] == "text":
            between = source[match.end() : found[index + 1].start()]
            output = found[index + 1][2] if not between.strip() else None
        line = source.count("\n", 0, match.start()) + 2
        yield Block(document, line, match[1], match[2], output)


def links(document: Path) -> list[str]:
    """All links of a document, without what looks like one inside code."""
    return _LINK.findall(_CODE.sub("code", _BLOCK.sub("", document.read_text(encoding="utf-8"))))


def anchors(document: Path) -> set[str]:
    """The anchors that its headings have on GitHub."""
    source = _BLOCK.sub("", document.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in _HEADING.findall(source)}
