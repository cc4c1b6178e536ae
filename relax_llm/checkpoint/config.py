"""What a config may say: the fields that decide a model's arithmetic, each with what it may hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["check_config", "check_generation_config", "check_layer_count"]

SIZES = [
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "sliding_window",
]
POSITIVE_NUMBERS = ["rope_theta", "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"]
SWITCHES = ["tie_word_embeddings", "attention_bias", "mlp_bias", "scale_attn_weights"]
STRINGS = ["model_type", "hidden_act", "activation_function"]
OBJECTS = ["rope_scaling", "rope_parameters", "auto_map", "quantization_config", "compression_config"]
TOKEN_IDS = ["bos_token_id", "eos_token_id", "pad_token_id"]

LARGEST_SIZE = 2**31 - 1


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_int(value) and 0 < value <= LARGEST_SIZE


def _is_positive(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and value > 0 and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _is_token_id(value: Any) -> bool:
    return _is_int(value) and -1 <= value <= LARGEST_SIZE


def _is_token_ids(value: Any) -> bool:
    return all(map(_is_token_id, value)) if isinstance(value, list) else _is_token_id(value)


_KINDS: list[tuple[list[str], Callable[[Any], bool], str]] = [
    (SIZES, _is_size, f"an integer from 1 to {LARGEST_SIZE}"),
    (POSITIVE_NUMBERS, _is_positive, "a positive number"),
    (SWITCHES, lambda value: isinstance(value, bool), "true or false"),
    (STRINGS, lambda value: isinstance(value, str), "a string"),
    (OBJECTS, lambda value: isinstance(value, dict), "an object"),
    (TOKEN_IDS, _is_token_ids, "a token id or an array of token ids"),
]

_GENERATION_KINDS: list[tuple[list[str], Callable[[Any], bool], str]] = [
    (TOKEN_IDS, _is_token_ids, "a token id or an array of token ids"),
    (["do_sample"], lambda value: isinstance(value, bool), "true or false"),
    (["temperature", "top_p", "min_p", "repetition_penalty"], _is_number, "a number"),
    (["top_k", "max_new_tokens", "max_length"], _is_int, "an integer"),
]

# How a quantized Hugging Face checkpoint announces itself: transformers, compressed-tensors, MLX.
_QUANTIZATION_KEYS = ["quantization_config", "compression_config", "quantization"]


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Check the fields of a config.json that this package may use; others may hold anything.

    Raises:
        CheckpointError: `model_type` is missing, a field has the wrong type, or the weights are quantized in
            a format that this package does not read.
    """
    if config.get("model_type") is None:
        raise CheckpointError(
            f"{path}: the field 'model_type' is missing, so no architecture can be chosen; "
            'add it (for example "llama") or save the model again with a current transformers.'
        )
    _check_fields(config, path, _KINDS)
    for key in _QUANTIZATION_KEYS:
        if config.get(key):
            value = config[key]
            method = value.get("quant_method", value.get("mode")) if isinstance(value, dict) else None
            raise CheckpointError(
                f"{path}: the field {key!r} says that the weights are quantized"
                f"{f' by {method!r}' if isinstance(method, str) else ''}; use the checkpoint with the "
                "original f32, f16 or bf16 weights, or a GGUF file."
            )


def check_generation_config(config: Mapping[str, Any], path: Path) -> None:
    """Check the fields of a generation_config.json that this package may use.

    Raises:
        CheckpointError: A field has the wrong type.
    """
    _check_fields(config, path, _GENERATION_KINDS)


def check_layer_count(config: Mapping[str, Any], tensors: int, path: Path) -> None:
    """Refuse a config with more layers than there are tensors, before anyone loops over them.

    Raises:
        CheckpointError: There are fewer tensors than layers.
    """
    for key in ("num_hidden_layers", "n_layer"):
        layers = config.get(key)
        if layers is not None and layers > tensors:
            raise CheckpointError(
                f"{path}: {key!r} is {layers}, but the checkpoint holds only {tensors} tensors."
            )


def _check_fields(
    config: Mapping[str, Any], path: Path, kinds: list[tuple[list[str], Callable[[Any], bool], str]]
) -> None:
    for names, accepts, expected in kinds:
        for name in names:
            value = config.get(name)
            if value is not None and not accepts(value):
                shown = repr(value)
                shown = shown if len(shown) <= 60 else shown[:57] + "..."
                raise CheckpointError(f"{path}: the field {name!r} is {shown}, where {expected} is expected.")
