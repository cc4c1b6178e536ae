"""Tiny checkpoints of both families, written with NumPy alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Shapes = dict[str, tuple[int, ...]]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 200,
    "rms_norm_eps": 1e-5,
    "vocab_size": 37,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 24,
    "n_head": 3,
    "n_layer": 1,
    "n_positions": 150,
    "vocab_size": 41,
}


def llama_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a checkpoint of the llama family."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows, columns, bias in (
            ("self_attn.q_proj", q, hidden, "attention_bias"),
            ("self_attn.k_proj", kv, hidden, "attention_bias"),
            ("self_attn.v_proj", kv, hidden, "attention_bias"),
            ("self_attn.o_proj", hidden, q, "attention_bias"),
            ("mlp.gate_proj", inner, hidden, "mlp_bias"),
            ("mlp.up_proj", inner, hidden, "mlp_bias"),
            ("mlp.down_proj", hidden, inner, "mlp_bias"),
        ):
            shapes[f"{at}.{name}.weight"] = (rows, columns)
            if config.get(bias):
                shapes[f"{at}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{name}.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def gpt2_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a GPT-2 checkpoint; matrices are stored as [inputs, outputs]."""
    hidden = config["n_embd"]
    shapes: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}"
        for name, inputs, outputs in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            shapes |= {f"{at}.{name}.weight": (inputs, outputs), f"{at}.{name}.bias": (outputs,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{at}.{name}.weight": (hidden,), f"{at}.{name}.bias": (hidden,)}
    return shapes | {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}


SHAPES = {"llama": llama_shapes, "gpt2": gpt2_shapes}


def tensors_for(shapes: Shapes, seed: int = 0) -> dict[str, Array]:
    """Random values: matrices of a size that keeps activations near 1, norms near 1, biases that show."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            value = (1.0 if "norm" in name or "ln_" in name else 0.0) + 0.2 * value
        elif "embed" not in name and "wte" not in name:
            value = value / np.sqrt(np.float32(shape[-1]))
        tensors[name] = value.astype(np.float32)
    return tensors


def write(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array] | None = None,
    *,
    seed: int = 0,
    **files: Any,
) -> Path:
    """Write a checkpoint.

    Args:
        directory: Made if it is not there.
        config: Its config.json.
        tensors: Its tensors; random ones that fit the config by default.
        seed: Of these.
        files: Further JSON files: `generation_config={...}`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    if tensors is None:
        tensors = tensors_for(SHAPES[config["model_type"]](config), seed)
    save_file(dict(tensors), directory / "model.safetensors")
    return directory
