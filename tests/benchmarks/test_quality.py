"""The benchmark of quality: its text, and the checkpoints that it compares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import relax_llm as rl
from benchmarks.quality import text
from benchmarks.variants import as_llama_cpp, off_grid

from ..machines import PLAINER
from ..models.test_formats import write_quantized

if TYPE_CHECKING:
    from pathlib import Path


def test_the_text_is_long_and_the_same_everywhere() -> None:
    assert len(text()) > 100_000
    assert text() == text()
    assert " at 0x" not in text()
    assert "\nFILE\n" not in text()


def test_another_order_of_channels_is_the_same_model(tmp_path: Path) -> None:
    checkpoint = rl.open_checkpoint(write_quantized(tmp_path / "model.gguf"))
    moved = off_grid(checkpoint)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert not np.array_equal(moved.tensors[name].read(), checkpoint.tensors[name].read())
    assert moved.fingerprint != checkpoint.fingerprint
    ids = np.arange(20) * 7 % 67
    logits = []
    for given in (checkpoint, moved):
        runner = rl.Runner(rl.compile(given, target=PLAINER))
        logits.append(runner.prefill(runner.start(), ids, output="all"))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_matrices_are_stored_as_llama_cpp_would(tmp_path: Path) -> None:
    checkpoint = rl.open_checkpoint(write_quantized(tmp_path / "model.gguf"))
    stored = as_llama_cpp(checkpoint, "Q4_0")
    down = "model.layers.0.mlp.down_proj.weight"  # a Q8_0 in the file
    groups = stored.tensors[down].read().reshape(-1, 32)
    assert max(len(np.unique(group)) for group in groups) <= 16
    table = "model.embed_tokens.weight"
    np.testing.assert_allclose(stored.tensors[table].read(), checkpoint.tensors[table].read(), atol=2e-3)
    norm = "model.norm.weight"
    np.testing.assert_array_equal(stored.tensors[norm].read(), checkpoint.tensors[norm].read())
