"""The list of passes in the documentation is the pipeline."""

from __future__ import annotations

from tests.docs.pipeline import generated, written


def test_the_documented_passes_are_those_of_the_pipeline() -> None:
    assert "### 1. " in generated()
    assert written() == generated(), "Run `python -m tests.docs.pipeline`."
