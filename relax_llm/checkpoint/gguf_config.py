"""GGUF metadata as Hugging Face's config.json and generation_config.json would say it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relax_llm.checkpoint.gguf_metadata import Metadata
from relax_llm.checkpoint.gguf_rope import rope_scaling
from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from relax_llm.checkpoint.gguf_header import TensorEntry

__all__ = ["generation_config", "model_config"]

# Keys that change the arithmetic in a way that no supported architecture has, with values that do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    ".expert_count": (0,),
    ".attention.causal": (True,),
    ".attention.scale": (0,),
    ".attention.clamp_kqv": (0,),
    ".attention.max_alibi_bias": (0,),
    ".attention.temperature_scale": (0,),
    ".attn_logit_softcapping": (0,),
    ".final_logit_softcapping": (0,),
    ".logit_scale": (0, 1),
    ".residual_scale": (0, 1),
    ".embedding_scale": (0, 1),
    ".use_parallel_residual": (False,),
}

_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def model_config(
    path: Path,
    values: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    rope_factors: Callable[[], NDArray[np.float32] | None],
) -> dict[str, Any]:
    """Translate the metadata of a GGUF file.

    Args:
        path: Named in messages.
        values: The metadata.
        entries: The tensor table by GGUF's names; it decides what metadata leaves open (vocabulary, tied
            head, biases).
        rope_factors: Reads the tensor `rope_freqs.weight`, float32 [head_dim / 2], if there is one.

    Returns:
        What config.json would hold; `model_type` is "llama", "mistral" or "gpt2".

    Raises:
        CheckpointError: The architecture is not one of these, or a key is missing or has a wrong value.
    """
    kind = values.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            f"{path}: the metadata key 'general.type' is {str(kind)[:40]!r}; only whole models are opened "
            "(merge an adapter into its base model first)."
        )
    architecture = Metadata(path, values, "").string("general.architecture")
    metadata = Metadata(path, values, architecture)
    if architecture not in _ARCHITECTURES:
        raise metadata.refuse(
            "general.architecture",
            f"is {architecture[:40]!r}; GGUF files of {', '.join(_ARCHITECTURES)} are read "
            "(for another architecture use its Hugging Face checkpoint)",
        )
    for key, neutral in _NEUTRAL.items():
        value = values.get(metadata.key(key), neutral[0])
        if value not in neutral:
            raise metadata.refuse(key, f"is {str(value)[:40]}, which is not supported")
    config = _ARCHITECTURES[architecture](metadata, entries, rope_factors)
    config["tie_word_embeddings"] = "output.weight" not in entries
    for field, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.token_id(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{field}_token_id"] = token
    return config


def generation_config(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens that end a generation, and the sampling that the file recommends.

    Raises:
        CheckpointError: A key has a wrong value.
    """
    metadata = Metadata(path, values, "")
    config: dict[str, Any] = {}
    for field, key in (("bos", "bos"), ("pad", "padding")):
        token = metadata.token_id(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{field}_token_id"] = token
    ends = [metadata.token_id(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(token for token in ends if token is not None))
    if known:
        config["eos_token_id"] = known[0] if len(known) == 1 else known
    for key, field in _SAMPLING.items():
        if metadata.has(f"general.sampling.{key}"):
            value = metadata.number(f"general.sampling.{key}", positive=False)
            config[field] = int(value) if field == "top_k" else value
    if config.get("temperature"):
        config["do_sample"] = True
    return config


def _rows(metadata: Metadata, entries: Mapping[str, TensorEntry], name: str) -> int:
    if name not in entries or len(entries[name].shape) != 2:
        raise CheckpointError(f"{metadata.path}: the tensor {name!r} is missing or is not a matrix.")
    return entries[name].shape[0]


def _llama(
    metadata: Metadata,
    entries: Mapping[str, TensorEntry],
    rope_factors: Callable[[], NDArray[np.float32] | None],
) -> dict[str, Any]:
    hidden, heads = metadata.size(".embedding_length"), metadata.size(".attention.head_count")
    head_dim = metadata.size(".attention.key_length", max(hidden // heads, 1))
    for key in (".attention.value_length", ".rope.dimension_count"):
        if metadata.size(key, head_dim) != head_dim:
            raise metadata.refuse(
                key,
                f"is {metadata.size(key)}, and differs from the head dimension {head_dim}, which is not "
                "supported",
            )
    theta = metadata.number(".rope.freq_base", 10000.0)
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.size(".feed_forward_length"),
        "num_hidden_layers": metadata.size(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.size(".context_length"),
        "rms_norm_eps": metadata.number(".attention.layer_norm_rms_epsilon"),
        "vocab_size": _rows(metadata, entries, "token_embd.weight"),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(metadata, rope_factors(), theta, head_dim),
        "attention_bias": any(f"blk.0.attn_{part}.bias" in entries for part in ("q", "k", "v", "output")),
        "mlp_bias": any(f"blk.0.ffn_{part}.bias" in entries for part in ("gate", "up", "down")),
    }
    # llama.cpp has one architecture for both; the window is what tells Mistral from Llama.
    if metadata.values.get(metadata.key(".attention.sliding_window"), 0) != 0:
        config["model_type"] = "mistral"
        config["sliding_window"] = metadata.size(".attention.sliding_window")
    return config


def _gpt2(
    metadata: Metadata,
    entries: Mapping[str, TensorEntry],
    rope_factors: Callable[[], NDArray[np.float32] | None],
) -> dict[str, Any]:
    hidden, context = metadata.size(".embedding_length"), metadata.size(".context_length")
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": hidden,
        "n_inner": metadata.size(".feed_forward_length", 4 * hidden),
        "n_layer": metadata.size(".block_count"),
        "n_head": metadata.size(".attention.head_count"),
        "n_positions": context,
        "n_ctx": context,
        "layer_norm_epsilon": metadata.number(".attention.layer_norm_epsilon"),
        "vocab_size": _rows(metadata, entries, "token_embd.weight"),
    }


_ARCHITECTURES: dict[
    str,
    Callable[[Metadata, Mapping[str, TensorEntry], Callable[[], NDArray[np.float32] | None]], dict[str, Any]],
] = {"llama": _llama, "gpt2": _gpt2}
