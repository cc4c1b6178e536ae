"""How the KV cache lies in memory: what kernels, the compiler and the runtime must agree on.

The caches of a layer are plain tensors, [batch, kv_heads, tiles, ...], each tile holding `TILE` positions:

=======  ==========================================  ==========================================
format   `k_cache`, keys of a tile                   `v_cache`, values of a tile
=======  ==========================================  ==========================================
f32      float32 [head_dim, TILE]                    float32 [TILE, head_dim]
bf16     uint16 [ceil(head_dim / 2), TILE, 2]        uint16 [TILE / 2, head_dim, 2]
q8       int8 [ceil(head_dim / 2), TILE, 2]          int8 [TILE / 2, head_dim, 2]
=======  ==========================================  ==========================================

Keys have one position a lane, so that scores are computed for `TILE` positions at once without reducing across lanes;
values one channel a lane, which is what the weighted sum over positions reads. In bf16 and q8 two neighbours along what
is summed lie side by side, as products of pairs want them: two channels of a key, two positions of a value. The second
channel of the last pair of an odd head_dim is 0.

In q8 two more tensors, `k_scale` and `v_scale`, hold float32 [TILE]: what a position's codes are multiplied by, one
number for all channels of a head, which is its largest magnitude by 127.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TILE = 16
"""Positions in a tile."""

GRANULE = 64
"""Capacities are multiples of this many positions."""

CACHE_DTYPES: Mapping[str, str] = MappingProxyType({"f32": "float32", "bf16": "uint16", "q8": "int8"})
"""The formats, and the element type of keys and values in each; bf16 is kept as its bits."""

MOST = 127
"""The largest code of q8."""

LEAST = 2.0**-120
"""The least magnitude that q8 tells from 0: what is smaller has no inverse in f32."""


@dataclass(frozen=True)
class CacheTensor:
    """One of the tensors that a layer's cache is made of.

    Attributes:
        name: "k_cache", "v_cache", "k_scale" or "v_scale".
        shape: Numbers, or whatever sizes `cache_tensors` was given.
        dtype: Of its elements.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: str


def cache_tensors(
    format: str, batch: Any, kv_heads: int, tiles: Any, head_dim: int
) -> tuple[CacheTensor, ...]:
    """The cache of one layer, in the order in which kernels take its tensors."""
    outer, dtype = (batch, kv_heads, tiles), CACHE_DTYPES[format]
    keys: tuple[int, ...] = (head_dim, TILE)
    values: tuple[int, ...] = (TILE, head_dim)
    if format != "f32":
        keys, values = (-(-head_dim // 2), TILE, 2), (TILE // 2, head_dim, 2)
    both = (CacheTensor("k_cache", (*outer, *keys), dtype), CacheTensor("v_cache", (*outer, *values), dtype))
    if format != "q8":
        return both
    return (*both, *(CacheTensor(name, (*outer, TILE), "float32") for name in ("k_scale", "v_scale")))


def encode(format: str, keys: Array, values: Array) -> dict[str, Array]:
    """Keys and values [batch, positions, kv_heads, head_dim] of whole tiles as a cache has them, by tensor."""
    scales: dict[str, Array] = {}
    if format == "bf16":
        keys, values = _bits(keys), _bits(values)
    elif format == "q8":
        keys, scales["k_scale"] = _codes(keys)
        values, scales["v_scale"] = _codes(values)
    return {**laid(format, keys, values), **scales}


def decode(format: str, tensors: Mapping[str, Array], head_dim: int) -> tuple[Array, Array]:
    """The keys and the values in a cache as floats: [batch, positions, kv_heads, head_dim] each."""
    keys, values = lifted(format, tensors, head_dim)
    if format == "bf16":
        return _floats(keys), _floats(values)
    if format == "q8":
        return keys * _of_positions(tensors["k_scale"]), values * _of_positions(tensors["v_scale"])
    return keys, values


def laid(format: str, keys: Array, values: Array) -> dict[str, Array]:
    """Elements [batch, positions, kv_heads, head_dim] of whole tiles as `k_cache` and `v_cache` have them."""
    batch, positions, heads, dim = keys.shape
    shape = (batch, positions // TILE, TILE, heads, dim)
    tiled_keys = keys.reshape(shape).transpose(0, 3, 1, 4, 2)  # [batch, kv_heads, tiles, head_dim, TILE]
    tiled_values = values.reshape(shape).transpose(0, 3, 1, 2, 4)  # [batch, kv_heads, tiles, TILE, head_dim]
    if format != "f32":
        if dim % 2:
            tiled_keys = np.concatenate([tiled_keys, np.zeros_like(tiled_keys[:, :, :, :1])], axis=3)
        tiled_keys = tiled_keys.reshape(*tiled_keys.shape[:3], -1, 2, TILE).swapaxes(4, 5)
        tiled_values = tiled_values.reshape(*tiled_values.shape[:3], TILE // 2, 2, -1).swapaxes(4, 5)
    return {"k_cache": np.ascontiguousarray(tiled_keys), "v_cache": np.ascontiguousarray(tiled_values)}


def lifted(format: str, tensors: Mapping[str, Array], head_dim: int) -> tuple[Array, Array]:
    """The elements of `k_cache` and `v_cache`, as `laid` takes them."""
    keys, values = tensors["k_cache"], tensors["v_cache"]
    if format != "f32":
        keys = keys.swapaxes(4, 5).reshape(*keys.shape[:3], -1, TILE)[:, :, :, :head_dim]
        values = values.swapaxes(4, 5).reshape(*values.shape[:3], TILE, -1)
    return _positions(keys.transpose(0, 2, 4, 1, 3)), _positions(values.transpose(0, 2, 3, 1, 4))


def _codes(array: Array) -> tuple[Array, Array]:
    """Whole numbers and what they are multiplied by, [batch, kv_heads, tiles, TILE]."""
    largest = np.abs(array).max(axis=-1).astype(np.float32)
    inverse = np.where(largest < LEAST, 0, MOST / np.maximum(largest, np.float32(LEAST)))
    with np.errstate(invalid="ignore"):  # NaN is no whole number, and its scale says so
        codes = np.rint(array * inverse[..., None]).astype(np.int8)
    scales = largest / np.float32(MOST)
    return codes, scales.reshape(scales.shape[0], -1, TILE, scales.shape[2]).transpose(0, 3, 1, 2)


def _of_positions(scales: Array) -> Array:
    """[batch, kv_heads, tiles, TILE] as [batch, positions, kv_heads, 1]."""
    found: Array = scales.reshape(*scales.shape[:2], -1, 1).swapaxes(1, 2)
    return found


def _positions(tiled: Array) -> Array:
    """[batch, tiles, TILE, kv_heads, head_dim] without tiles."""
    return tiled.reshape(tiled.shape[0], -1, *tiled.shape[3:])


def _bits(array: Array) -> Array:
    bits: Array = array.astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits


def _floats(bits: Array) -> Array:
    floats: Array = np.ascontiguousarray(bits).view(ml_dtypes.bfloat16).astype(np.float32)
    return floats
