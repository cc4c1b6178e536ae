"""What a launch has written, to look at and to overwrite: its outputs, and the tokens of the caches it appends to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from relax_llm.artifact.kv_cache import CACHE_DTYPES, decode_keys, decode_values, encode_keys, encode_values
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
        kv_len = launch.sizes["kv_len"]
        head_dim = _head_dim(launch)
        found += [Result(kind, tokens_of(kind, cache, head_dim, kv_len)) for kind, cache in _caches(launch)]
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
        head_dim = _head_dim(launch)
        for (kind, cache), value in zip(_caches(launch), values[len(outputs) :], strict=True):
            if value is not None:
                _put_tokens(kind, cache, value, head_dim, launch.sizes["kv_len"])


def residual_of(launch: Launch, problem: Mapping[str, Any]) -> Array | None:
    """What a launch adds to; None where it adds to nothing."""
    if not problem.get("residual") and launch.operator not in ("fused", "elementwise"):
        return None
    shape = launch.outputs[0].shape
    said = [operand.value for operand in launch.arguments if operand.role == "activation"]
    given = said[1:] if problem.get("residual") else said
    return next((value for value in given if value.shape == shape), None)


def tokens_of(kind: str, cache: Array, head_dim: int, kv_len: int) -> Array:
    """The first tokens of a cache as floats: [batch, kv_heads, kv_len, head_dim]."""
    tokens: Array = _decoded(kind, cache, head_dim)[:, :kv_len].swapaxes(1, 2)
    return tokens


def _put_tokens(kind: str, cache: Array, values: Array, head_dim: int, kv_len: int) -> None:
    tokens = _decoded(kind, cache, head_dim).copy()
    tokens[:, kv_len - values.shape[2] : kv_len] = values.swapaxes(1, 2)
    cache[...] = (encode_keys if kind == "k_cache" else encode_values)(_format(cache), tokens)


def _decoded(kind: str, cache: Array, head_dim: int) -> Array:
    if kind == "k_cache":
        return decode_keys(_format(cache), cache, head_dim)
    return decode_values(_format(cache), cache)


def _format(cache: Array) -> str:
    return next(format for format, dtype in CACHE_DTYPES.items() if dtype == cache.dtype.name)


def _head_dim(launch: Launch) -> int:
    """Channels of a head, which a cache of keys alone does not tell."""
    values = next(cache for kind, cache in _caches(launch) if kind == "v_cache")
    return int(decode_values(_format(values), values[:1, :1, :1]).shape[3])


def _caches(launch: Launch) -> list[tuple[str, Array]]:
    return [
        (operand.name.rpartition(".")[2], operand.value)
        for operand in launch.arguments
        if operand.role == "cache"
    ]
