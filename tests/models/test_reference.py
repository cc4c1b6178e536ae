"""The reference itself: consistent, well conditioned, and every setting and every weight shows in it."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from .comparison import BOUND, assert_logits_agree, distance
from .configurations import BY_NAME, DECODE_STEPS, GRID, TOTAL, Configuration
from .reference import Reference, token_ids

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Bench

INCREMENTAL = (TOTAL - DECODE_STEPS, *[1] * DECODE_STEPS)
DYNAMIC = [configuration for configuration in GRID if configuration.is_dynamic]

each_row = pytest.mark.parametrize("row", GRID, ids=str)


def test_the_table_holds_what_it_must() -> None:
    assert len(GRID) >= 30
    assert len(BY_NAME) == len(GRID), "two rows have the same name"
    heads = {
        (row.settings.get("num_attention_heads"), row.settings.get("num_key_value_heads")) for row in GRID
    }
    assert heads >= {(1, 1), (3, 1), (9, 3), (4, 4), (6, 2), (5, 5)}
    ropes = {(row.settings.get("rope_parameters") or {}).get("rope_type") for row in GRID}
    assert ropes >= {"default", "linear", "llama3", "dynamic", "yarn"}
    assert {row.settings.get("head_dim") for row in GRID} >= {20, 24, 10, 6, 80}
    assert {row.settings.get("sliding_window") for row in GRID} >= {5, 16, 64}
    assert {row.stored for row in GRID} == {"float32", "float16", "bfloat16"}


@each_row
def test_decoding_equals_one_forward(bench: Bench, row: Configuration) -> None:
    reference, ids = bench.reference(row), token_ids(row)
    whole, _ = reference.run(ids, (TOTAL,))
    parts, _ = reference.run(ids, INCREMENTAL)
    if row.is_dynamic:
        assert distance(parts, whole) > 100 * BOUND, "the calling sequence should matter to dynamic rope"
        return
    assert distance(parts, whole) < BOUND / 10
    np.testing.assert_array_equal(reference.logits(ids, INCREMENTAL), whole)


@each_row
def test_split_into_hidden_and_head_is_the_whole_model(bench: Bench, row: Configuration) -> None:
    reference, ids = bench.reference(row), token_ids(row)[:, :40]
    with torch.no_grad():
        expected = reference.model(torch.from_numpy(ids)).logits.numpy()
    assert distance(reference.logits(ids), expected) < BOUND / 10
    assert reference.hidden(ids).shape == (*ids.shape, reference.model.config.hidden_size)


@each_row
def test_rounding_is_far_below_the_bound(bench: Bench, row: Configuration) -> None:
    reference, ids = bench.reference(row), token_ids(row)
    wide = copy.deepcopy(reference.model).double()
    for module in wide.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False  # an order of float32 operations, refused in float64
    assert distance(Reference(wide).run(ids, (TOTAL,))[0], reference.run(ids, (TOTAL,))[0]) < BOUND / 10


@pytest.mark.parametrize(
    ("row", "setting", "value"),
    [(row, *item) for row in GRID for item in row.visible.items()],
    ids=[f"{row}-{setting}-{value}" for row in GRID for setting, value in row.visible.items()],
)
def test_setting_shows(bench: Bench, row: Configuration, setting: str, value: Any) -> None:
    ids = token_ids(row)
    changed = Reference.load(bench.checkpoint(row), **{setting: value})
    assert distance(changed.logits(ids), bench.reference(row).logits(ids)) > 1.5 * BOUND


@each_row
def test_every_weight_shows(bench: Bench, row: Configuration) -> None:
    ids = token_ids(row)[:1, :64]
    expected = bench.reference(row).logits(ids)
    model = copy.deepcopy(bench.reference(row).model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            noise = torch.randn(before.shape, generator=generator)
            parameter.add_(0.05 * before.square().mean().sqrt() * noise)
            changed = Reference(model).logits(ids)
            parameter.copy_(before)
        with pytest.raises(AssertionError, match="differ by more than"):
            assert_logits_agree(changed, expected, name)


@pytest.mark.parametrize("row", DYNAMIC, ids=str)
def test_another_sequence_leaves_nothing_behind(bench: Bench, row: Configuration) -> None:
    ids = token_ids(row)
    length = row.settings["max_position_embeddings"] + 5
    fresh = Reference.load(bench.checkpoint(row)).run(ids[:, :length], (length,))[0]
    used = Reference.load(bench.checkpoint(row))
    used.run(ids, (TOTAL,))
    np.testing.assert_array_equal(used.run(ids[:, :length], (length,))[0], fresh)


@each_row
def test_files_are_what_the_row_says(bench: Bench, row: Configuration) -> None:
    directory = bench.checkpoint(row)
    shards = sorted(directory.glob("*.safetensors"))
    assert (directory / "model.safetensors.index.json").exists() == (row.shard is not None)
    assert (len(shards) > 1) == (row.shard is not None)
    dtypes = {name: dtype for path in shards for name, dtype in _dtypes(path).items()}
    stored = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[row.stored]
    expected = {stored} | (
        {"F32"} if row.files and {"mixed dtypes", "rotary buffers", "bare names"} & set(row.files) else set()
    )
    assert set(dtypes.values()) == expected
    config = json.loads((directory / "config.json").read_text())
    assert ("rope_parameters" in config) == (row.model_type != "gpt2" and "older config" not in row.files)
    assert any(name.endswith("rotary_emb.inv_freq") for name in dtypes) == ("rotary buffers" in row.files)
    assert any(name.startswith("h.") for name in dtypes) == ("bare names" in row.files)
    tied = row.settings.get("tie_word_embeddings", row.model_type == "gpt2")
    assert ("lm_head.weight" in dtypes) == (not tied or "stored tied head" in row.files)


def _dtypes(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
