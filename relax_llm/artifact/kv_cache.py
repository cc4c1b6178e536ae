"""How the KV cache lies in memory: what kernels, the compiler and the runtime must agree on.

The caches of a layer are two plain tensors, [batch, kv_heads, tiles, ...], each tile holding `TILE` positions:

=======  ==========================================  ==========================================
format   keys of a tile                              values of a tile
=======  ==========================================  ==========================================
f32      float32 [head_dim, TILE]                    float32 [TILE, head_dim]
bf16     uint16 [ceil(head_dim / 2), TILE, 2]        uint16 [TILE / 2, head_dim, 2]
=======  ==========================================  ==========================================

Keys have one position a lane, so that scores are computed for `TILE` positions at once without reducing across lanes;
values one channel a lane, which is what the weighted sum over positions reads. In bf16 two neighbours along what is
summed lie in one word, as products of pairs want them: two channels of a key, two positions of a value. The second
channel of the last pair of an odd head_dim is 0.
"""

from collections.abc import Mapping
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

CACHE_DTYPES: Mapping[str, str] = MappingProxyType({"f32": "float32", "bf16": "uint16"})
"""The formats, and the element type of each in memory; bf16 is kept as its bits."""


def cache_shapes(
    format: str, batch: Any, kv_heads: int, tiles: Any, head_dim: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shapes of the key and the value cache of one layer."""
    outer = (batch, kv_heads, tiles)
    if format == "bf16":
        return (*outer, -(-head_dim // 2), TILE, 2), (*outer, TILE // 2, head_dim, 2)
    return (*outer, head_dim, TILE), (*outer, TILE, head_dim)


def encode_keys(format: str, keys: Array) -> Array:
    """Keys [batch, positions, kv_heads, head_dim] of whole tiles as a cache has them."""
    tiled = _tiles(keys).transpose(0, 3, 1, 4, 2)  # [batch, kv_heads, tiles, head_dim, TILE]
    if format == "f32":
        return np.ascontiguousarray(tiled)
    if tiled.shape[3] % 2:
        tiled = np.concatenate([tiled, np.zeros_like(tiled[:, :, :, :1])], axis=3)
    pairs = _bits(tiled).reshape(*tiled.shape[:3], -1, 2, TILE)
    return np.ascontiguousarray(pairs.swapaxes(4, 5))


def encode_values(format: str, values: Array) -> Array:
    """Values [batch, positions, kv_heads, head_dim] of whole tiles as a cache has them."""
    tiled = _tiles(values).transpose(0, 3, 1, 2, 4)  # [batch, kv_heads, tiles, TILE, head_dim]
    if format == "f32":
        return np.ascontiguousarray(tiled)
    pairs = _bits(tiled).reshape(*tiled.shape[:3], TILE // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(4, 5))


def decode_keys(format: str, cache: Array, head_dim: int) -> Array:
    """The keys in a cache as floats: [batch, positions, kv_heads, head_dim]."""
    if format != "f32":
        pairs = _floats(cache).swapaxes(4, 5)
        cache = pairs.reshape(*cache.shape[:3], -1, TILE)[:, :, :, :head_dim]
    return _positions(cache.transpose(0, 2, 4, 1, 3))


def decode_values(format: str, cache: Array) -> Array:
    """The values in a cache as floats: [batch, positions, kv_heads, head_dim]."""
    if format != "f32":
        pairs = _floats(cache).swapaxes(4, 5)
        cache = pairs.reshape(*cache.shape[:3], TILE, -1)
    return _positions(cache.transpose(0, 2, 3, 1, 4))


def _tiles(array: Array) -> Array:
    batch, positions, heads, dim = array.shape
    return array.reshape(batch, positions // TILE, TILE, heads, dim)


def _positions(tiled: Array) -> Array:
    """[batch, tiles, TILE, kv_heads, head_dim] without tiles."""
    return tiled.reshape(tiled.shape[0], -1, *tiled.shape[3:])


def _bits(array: Array) -> Array:
    bits: Array = array.astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits


def _floats(bits: Array) -> Array:
    floats: Array = np.ascontiguousarray(bits).view(ml_dtypes.bfloat16).astype(np.float32)
    return floats
