"""The llama architecture (llama and mistral checkpoints) against transformers."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from safetensors.numpy import load_file, save_file

import relax_llm as rl

from ..machines import PLAINER
from .comparison import assert_logits_agree
from .configurations import BY_NAME, LLAMA, MISTRAL, Configuration
from .driving import advance, batches, check_prompt, ids_of, lengths, rows

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Bench


@lengths
@batches
@rows(LLAMA)
def test_llama_logits(bench: Bench, row: Configuration, batch: int, length: int) -> None:
    check_prompt(bench, row, batch, length)


@lengths
@batches
@rows(MISTRAL)
def test_mistral_logits(bench: Bench, row: Configuration, batch: int, length: int) -> None:
    check_prompt(bench, row, batch, length)


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"],
)
def test_a_changed_weight_is_seen(bench: Bench, tmp_path: Path, tensor: str) -> None:
    row = BY_NAME["one-kv-head"]
    directory = shutil.copytree(bench.checkpoint(row), tmp_path / "checkpoint")
    ids = ids_of(row, 1, 64)
    expected = bench.reference(row).logits(ids)
    same = rl.Runner(rl.compile(directory, weights="f32", target=PLAINER))
    assert_logits_agree(advance(same, same.start(), ids, (64,)), expected, "the copy")

    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor] = tensors[tensor].copy()
    tensors[tensor][-1] *= 1.25  # the last row of a matrix, the last element of a norm
    save_file(tensors, file, metadata={"format": "pt"})
    changed = rl.Runner(rl.compile(directory, weights="f32", target=PLAINER))
    with pytest.raises(AssertionError, match="differ by more than"):
        assert_logits_agree(advance(changed, changed.start(), ids, (64,)), expected, "the changed copy")
