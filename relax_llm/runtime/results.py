"""What a launch has written, to look at and to overwrite: its outputs, and the tokens of the caches it appends to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.runtime.launch import Launch

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Result:
    """One thing that a launch writes.

    Attributes:
        name: "" for an output, else "k_cache" or "v_cache".
        value: A view of the output; of a cache a copy of what is in use, [batch, kv_heads, kv_len, head_dim].
    """

    name: str
    value: Array


def results(launch: Launch) -> list[Result]:
    """Everything that a launch writes, which has been made."""
    found = [Result("", output) for output in launch.outputs]
    if launch.operator == "append":
        found += [
            Result(kind, tokens_of(kind, cache, launch.sizes["kv_len"])) for kind, cache in _caches(launch)
        ]
    return found


def overwrite(launch: Launch, values: Sequence[Array | None]) -> None:
    """Put other values where a launch has written.

    Args:
        launch: Made already.
        values: In the order of `results`; None leaves what is there. Of a cache the last tokens may be given alone.
    """
    outputs = launch.outputs
    for output, value in zip(outputs, values, strict=False):
        if value is not None:
            output[...] = value
    if launch.operator == "append":
        for (kind, cache), value in zip(_caches(launch), values[len(outputs) :], strict=True):
            if value is not None:
                _put_tokens(kind, cache, value, launch.sizes["kv_len"])


def residual_of(launch: Launch, problem: Mapping[str, Any]) -> Array | None:
    """What a launch adds to; None where it adds to nothing."""
    if not problem.get("residual") and launch.operator not in ("fused", "elementwise"):
        return None
    shape = launch.outputs[0].shape
    said = [operand.value for operand in launch.arguments if operand.role == "activation"]
    given = said[1:] if problem.get("residual") else said
    return next((value for value in given if value.shape == shape), None)


def tokens_of(kind: str, cache: Array, kv_len: int) -> Array:
    """The first tokens of a cache: [batch, kv_heads, tiles, ...] -> [batch, kv_heads, kv_len, head_dim]."""
    tiles = cache.swapaxes(3, 4) if kind == "k_cache" else cache
    batch, heads, count, tile, dim = tiles.shape
    return tiles.reshape(batch, heads, count * tile, dim)[:, :, :kv_len]


def _put_tokens(kind: str, cache: Array, values: Array, kv_len: int) -> None:
    tiles = cache.swapaxes(3, 4) if kind == "k_cache" else cache
    positions = np.arange(kv_len - values.shape[2], kv_len)
    size = tiles.shape[3]
    tiles[:, :, positions // size, positions % size] = values


def _caches(launch: Launch) -> list[tuple[str, Array]]:
    return [
        (operand.name.rpartition(".")[2], operand.value)
        for operand in launch.arguments
        if operand.role == "cache"
    ]
