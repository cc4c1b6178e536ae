"""The model of random weights can be read and spoken to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import relax_llm as rl
from benchmarks.llm import PROMPT
from benchmarks.models import Shape, write_random

if TYPE_CHECKING:
    from pathlib import Path


def test_a_model_of_random_weights(tmp_path: Path, plainer_machine: None) -> None:
    write_random(tmp_path / "model.gguf", Shape(64, 1, 4, 2, 16, 96, 300))
    runner = rl.Runner(rl.compile(tmp_path / "model.gguf"))
    assert runner.tokenizer is not None
    ids = runner.tokenizer.encode(PROMPT)
    assert runner.tokenizer.decode(ids) == PROMPT
    assert runner.prefill(runner.start(), ids).shape == (300,)
