"""The gpt2 architecture against transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .configurations import GPT2, Configuration
from .driving import batches, check_prompt, lengths, rows

if TYPE_CHECKING:
    from .conftest import Bench


@lengths
@batches
@rows(GPT2)
def test_gpt2_logits(bench: Bench, row: Configuration, batch: int, length: int) -> None:
    check_prompt(bench, row, batch, length)
