"""GGUF metadata in the words of config.json; rotary scalings compute the same frequencies in transformers."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from relax_llm.checkpoint import Checkpoint, open_checkpoint
from relax_llm.checkpoint.gguf_rope import llama3_scaling

from .files import ARRAY, GGUF, LLAMA_METADATA, U32, array, f32, gguf_tensor, llama_tensors, string, u32

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def opened(
    tmp_path: Path, factors: NDArray[np.float32] | None = None, **metadata: tuple[int, bytes] | None
) -> Checkpoint:
    """A llama file with changed metadata; in the names `__` stands for the dot."""
    changed = {key.replace("__", "."): value for key, value in metadata.items()}
    merged = {key: value for key, value in {**LLAMA_METADATA, **changed}.items() if value is not None}
    tensors = llama_tensors()
    if factors is not None:
        tensors.append(gguf_tensor("rope_freqs.weight", factors))
    return open_checkpoint(GGUF(merged, tensors).write(tmp_path / "model.gguf"))


def test_defaults_are_those_of_llama_cpp(tmp_path: Path) -> None:
    config = opened(tmp_path, llama__attention__head_count_kv=None).config
    assert config["num_key_value_heads"] == 4
    assert config["head_dim"] == 8
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert config["vocab_size"] == 19
    assert config["rms_norm_eps"] == 1e-5
    assert config["eos_token_id"] == 2
    assert "bos_token_id" not in config


def test_equal_values_for_each_layer_are_one(tmp_path: Path) -> None:
    each = (ARRAY, array(U32, 3, struct.pack("<3I", 2, 2, 2)))
    assert opened(tmp_path, llama__attention__head_count_kv=each).config["num_key_value_heads"] == 2


def test_a_sliding_window_makes_it_mistral(tmp_path: Path) -> None:
    config = opened(tmp_path, llama__attention__sliding_window=u32(16)).config
    assert config["model_type"] == "mistral"
    assert config["sliding_window"] == 16
    assert "sliding_window" not in opened(tmp_path, llama__attention__sliding_window=u32(0)).config


def test_a_wrong_vocab_size_is_ignored_with_a_note(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, llama__vocab_size=u32(32000))
    assert checkpoint.config["vocab_size"] == 19
    (note,) = checkpoint.notes
    assert "llama.vocab_size" in note


def test_all_ends_of_generation_and_the_recommended_sampling(tmp_path: Path) -> None:
    checkpoint = opened(
        tmp_path,
        tokenizer__ggml__bos_token_id=u32(1),
        tokenizer__ggml__eot_token_id=u32(9),
        tokenizer__ggml__eom_token_id=u32(2),
        tokenizer__ggml__padding_token_id=u32(2**32 - 1),
        general__sampling__temp=f32(0.6),
        general__sampling__top_k=u32(20),
        general__sampling__top_p=f32(0.95),
    )
    assert checkpoint.config["eos_token_id"] == 2
    assert checkpoint.generation_config == {
        "bos_token_id": 1,
        "eos_token_id": [2, 9],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "do_sample": True,
    }


def frequencies(config: LlamaConfig) -> tuple[NDArray[np.float32], float]:
    """Inverse frequencies and attention factor as transformers computes them."""
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.numpy(), float(rotary.attention_scaling)


def rotary_config(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> LlamaConfig:
    scaling = {"rope_type": "default"} if scaling is None else scaling
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **scaling},
    )


LLAMA3 = [
    (128, 500000.0, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old": 8192}),
    (64, 500000.0, {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old": 8192}),
    (128, 10000.0, {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old": 2048}),
    (96, 250000.0, {"factor": 2.5, "low_freq_factor": 0.5, "high_freq_factor": 8.0, "old": 4096}),
    (32, 500.0, {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 32.0, "old": 8192}),
    (16, 10000.0, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old": 512}),
    (8, 10000.0, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old": 8192}),
]


@pytest.mark.parametrize(("head_dim", "theta", "rule"), LLAMA3, ids=lambda value: str(value)[:12])
def test_llama3_scaling_is_recovered_from_its_factors(
    head_dim: int, theta: float, rule: dict[str, Any]
) -> None:
    scaling = {"rope_type": "llama3", **rule}
    scaling["original_max_position_embeddings"] = scaling.pop("old")
    expected, _ = frequencies(rotary_config(head_dim, theta, scaling))
    plain, _ = frequencies(rotary_config(head_dim, theta, None))

    found = llama3_scaling((plain / expected).astype(np.float64), theta, 8192)

    assert found is not None
    again, attention = frequencies(rotary_config(head_dim, theta, found))
    assert attention == 1
    np.testing.assert_allclose(again, expected, rtol=3e-6, atol=0)
    if rule["old"] == 8192 and rule["high_freq_factor"] == 4 and head_dim >= 64:
        assert found == scaling


def test_llama3_scaling_reaches_the_config(tmp_path: Path) -> None:
    head_dim, theta, rule = 8, 500000.0, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {"rope_type": "llama3", **rule, "original_max_position_embeddings": 8192}
    plain, _ = frequencies(rotary_config(head_dim, theta, None))
    scaled, _ = frequencies(rotary_config(head_dim, theta, scaling))
    checkpoint = opened(tmp_path, plain / scaled, llama__rope__freq_base=f32(theta))
    assert checkpoint.config["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    assert opened(tmp_path, np.ones(4, np.float32)).config["rope_scaling"] is None


def test_linear_scaling(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 4.0}
    both = opened(tmp_path, llama__rope__scaling__type=string("linear"), llama__rope__scaling__factor=f32(4))
    assert both.config["rope_scaling"] == linear
    assert opened(tmp_path, llama__rope__scaling__factor=f32(4)).config["rope_scaling"] == linear
    assert opened(tmp_path, llama__rope__scale_linear=f32(4)).config["rope_scaling"] == linear
    assert opened(tmp_path, llama__rope__scale_linear=f32(0)).config["rope_scaling"] is None
    none = opened(tmp_path, llama__rope__scaling__type=string("none"), llama__rope__scaling__factor=f32(4))
    assert none.config["rope_scaling"] is None


def test_yarn_scaling(tmp_path: Path) -> None:
    config = opened(
        tmp_path,
        llama__rope__scaling__type=string("yarn"),
        llama__rope__scaling__factor=f32(16),
        llama__rope__scaling__original_context_length=u32(4096),
        llama__rope__scaling__attn_factor=f32(0.5),
    ).config
    scaling = config["rope_scaling"]
    assert scaling == {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 0.5 * (0.1 * math.log(16) + 1),
    }
    _, attention = frequencies(rotary_config(64, 10000.0, scaling))
    assert attention == pytest.approx(0.5 * (0.1 * math.log(16) + 1))
    del scaling["attention_factor"]
    _, usual = frequencies(rotary_config(64, 10000.0, scaling))
    assert attention == pytest.approx(0.5 * usual)
