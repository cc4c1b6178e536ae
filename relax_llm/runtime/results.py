"""What a launch has written, to look at and to overwrite: its outputs, and the tokens of the caches it appends to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from relax_llm.artifact.kv_cache import CACHE_DTYPES, decode, encode
from relax_llm.runtime.launch import Launch

Array = npt.NDArray[Any]

TOKENS = ("k_cache", "v_cache")
"""What an append has written beside its output, whatever tensors hold it."""


@dataclass(frozen=True)
class Result:
    """One thing that a launch writes.

    Attributes:
        name: "" for an output, else one of `TOKENS`.
        value: A view of the output; of a cache a copy of what is in use, [batch, kv_heads, kv_len, head_dim].
    """

    name: str
    value: Array


def results(launch: Launch) -> list[Result]:
    """Everything that a launch writes, which has been made."""
    found = [Result("", output) for output in launch.outputs]
    if launch.operator == "append":
        both = decoded(*_cache(launch), launch.sizes["kv_len"])
        found += [Result(name, tokens) for name, tokens in both.items()]
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
        format, cache, head_dim = _cache(launch)
        kv_len = launch.sizes["kv_len"]
        whole = [tokens.copy() for tokens in decode(format, cache, head_dim)]
        for tokens, value in zip(whole, values[len(outputs) :], strict=True):
            if value is not None:
                tokens[:, kv_len - value.shape[2] : kv_len] = value.swapaxes(1, 2)
        for name, array in encode(format, *whole).items():
            cache[name][...] = array


def residual_of(launch: Launch, problem: Mapping[str, Any]) -> Array | None:
    """What a launch adds to; None where it adds to nothing."""
    if not problem.get("residual") and launch.operator not in ("fused", "elementwise"):
        return None
    shape = launch.outputs[0].shape
    said = [operand.value for operand in launch.arguments if operand.role == "activation"]
    given = said[1:] if problem.get("residual") else said
    return next((value for value in given if value.shape == shape), None)


def decoded(format: str, cache: Mapping[str, Array], head_dim: int, kv_len: int) -> dict[str, Array]:
    """The first tokens of a layer's cache as floats, [batch, kv_heads, kv_len, head_dim], by the names in `TOKENS`."""
    both = decode(format, cache, head_dim)
    return {name: tokens[:, :kv_len].swapaxes(1, 2) for name, tokens in zip(TOKENS, both, strict=True)}


def _cache(launch: Launch) -> tuple[str, dict[str, Array], int]:
    """Format, tensors by their kernels' names, and channels of a head."""
    cache = {
        operand.name.rpartition(".")[2]: operand.value
        for operand in launch.arguments
        if operand.role == "cache"
    }
    values = cache["v_cache"]
    format = next(format for format, dtype in CACHE_DTYPES.items() if dtype == values.dtype.name)
    return format, cache, values.shape[4]  # [batch, kv_heads, tiles, TILE or half of that, head_dim, ...]
