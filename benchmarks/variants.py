"""A checkpoint with other numbers: the same function off the grid of its file, or as llama.cpp would store it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from relax_llm.checkpoint import Checkpoint, Tensor

Array = npt.NDArray[Any]

_ALL = slice(None)
_CHUNK = 1 << 22  # numbers that are quantized at a time


def off_grid(checkpoint: Checkpoint) -> Checkpoint:
    """The same llama with its channels in another order.

    The numbers of a quantized file lie on the grids of its groups, and whoever quantizes them again may just find
    these. Here hidden channels, neurons of the MLP and channels of each value head change places: nothing that the
    model computes changes, but a group of 32 weights comes from many groups of the file.
    """
    config, random = checkpoint.config, np.random.default_rng(0)
    dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
    shared = config["num_attention_heads"] // kv_heads
    hidden = random.permutation(config["hidden_size"])
    made: dict[str, Callable[[], Array]] = {}

    def place(name: str, rows: Array | slice = _ALL, columns: Array | slice = _ALL) -> None:
        tensor = checkpoint.tensors[f"{name}.weight"]
        made[f"{name}.weight"] = lambda: tensor.read().astype(np.float32)[rows][..., columns]

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        neurons = random.permutation(config["intermediate_size"])
        channels = np.stack([random.permutation(dim) for _ in range(kv_heads)])
        values = _heads(channels, dim)
        for part in ("q", "k"):
            place(f"{at}.self_attn.{part}_proj", columns=hidden)
        place(f"{at}.self_attn.v_proj", values, hidden)
        place(f"{at}.self_attn.o_proj", hidden, _heads(np.repeat(channels, shared, axis=0), dim))
        for part in ("gate", "up"):
            place(f"{at}.mlp.{part}_proj", neurons, hidden)
        place(f"{at}.mlp.down_proj", hidden, neurons)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            place(f"{at}.{norm}", hidden)
    place("model.norm", hidden)
    for table in ("model.embed_tokens", "lm_head"):
        if f"{table}.weight" in checkpoint.tensors:
            place(table, columns=hidden)
    return _changed(checkpoint, made, "off grid")


def _heads(channels: Array, dim: int) -> Array:
    """Orders of the channels of each head [heads, dim] as one order of all."""
    order: Array = (channels + dim * np.arange(len(channels))[:, None]).reshape(-1)
    return order


def as_llama_cpp(checkpoint: Checkpoint, kind: str) -> Checkpoint:
    """The numbers that are left when llama.cpp's plain quantizer stores every matrix as a kind of block.

    The table of tokens, which is the head where they are tied, is stored as Q8_0, as llama.cpp does.
    """
    made: dict[str, Callable[[], Array]] = {}
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2:
            stored = "Q8_0" if tensor.shape[0] == checkpoint.config["vocab_size"] else kind
            made[name] = lambda tensor=tensor, stored=stored: _through(tensor, stored)  # type: ignore[misc]
    return _changed(checkpoint, made, kind)


def _through(tensor: Tensor, kind: str) -> Array:
    """A matrix, quantized and dequantized."""
    matrix = tensor.read().astype(np.float32)
    form = gguf.GGMLQuantizationType[kind]
    result = np.empty_like(matrix)
    step = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        result[rows] = gguf.quants.dequantize(gguf.quants.quantize(matrix[rows], form), form)
    return result


def _changed(checkpoint: Checkpoint, made: Mapping[str, Callable[[], Array]], how: str) -> Checkpoint:
    tensors = {
        name: tensor.holding(made[name]) if name in made else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors, fingerprint=f"{checkpoint.fingerprint} {how}")
