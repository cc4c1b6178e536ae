"""Links lead somewhere, and every document can be reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import DOCUMENTS, ROOT, anchors, blocks, links

if TYPE_CHECKING:
    from pathlib import Path

CONTENTS = ROOT / "docs" / "README.md"

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@documents
def test_blocks_say_what_they_are(document: Path) -> None:
    assert document.read_text(encoding="utf-8").count("```") == 2 * len(list(blocks(document)))
    for block in blocks(document):
        assert block.language in ("python", "sh", "text", "json", "tvmscript"), block


def test_the_contents_list_every_document() -> None:
    listed = {(CONTENTS.parent / link).resolve() for link in links(CONTENTS) if link.endswith(".md")}
    assert listed >= {path for path in DOCUMENTS if path.parent == CONTENTS.parent and path != CONTENTS}
    assert "docs/README.md" in links(ROOT / "README.md")
