"""Keys and values as arrays [batch, positions, kv_heads, head_dim], and as they lie in a cache."""

import ml_dtypes
import numpy as np

from relax_llm.artifact.kv_cache import TILE
from relax_llm.kernels.operators.operator import Array

HALF_STEP = 2.0**-8
"""How far a number rounded to bf16 may be off, as a share of it."""


def encode_keys(format: str, keys: Array) -> Array:
    """Keys of whole tiles as a cache has them."""
    tiled = _tiles(keys).transpose(0, 3, 1, 4, 2)  # [batch, kv_heads, tiles, head_dim, TILE]
    if format == "f32":
        return np.ascontiguousarray(tiled)
    if tiled.shape[3] % 2:
        tiled = np.concatenate([tiled, np.zeros_like(tiled[:, :, :, :1])], axis=3)
    pairs = _bits(tiled).reshape(*tiled.shape[:3], -1, 2, TILE)
    return np.ascontiguousarray(pairs.swapaxes(4, 5))


def encode_values(format: str, values: Array) -> Array:
    """Values of whole tiles as a cache has them."""
    tiled = _tiles(values).transpose(0, 3, 1, 2, 4)  # [batch, kv_heads, tiles, TILE, head_dim]
    if format == "f32":
        return np.ascontiguousarray(tiled)
    pairs = _bits(tiled).reshape(*tiled.shape[:3], TILE // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(4, 5))


def decode_keys(format: str, cache: Array, head_dim: int) -> Array:
    """The keys in a cache, as f32."""
    if format != "f32":
        pairs = _floats(cache).swapaxes(4, 5)
        cache = pairs.reshape(*cache.shape[:3], -1, TILE)[:, :, :, :head_dim]
    return _positions(cache.transpose(0, 2, 4, 1, 3))


def decode_values(format: str, cache: Array) -> Array:
    """The values in a cache, as f32."""
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
