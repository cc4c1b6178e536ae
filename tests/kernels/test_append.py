"""Appending to the KV cache: what is written, where, and that nothing else is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.kernels.cache import GRANULE, TILE, Append, cache_shapes

from ..tolerances import UNIT, assert_within
from .bench import every_machine, launch, machines, random
from .guarded import SENTINEL, InOut, Out

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Array = npt.NDArray[Any]

CHUNKS = {
    "one by one": (1,) * 18,
    "a tile and its neighbours": (15, 1, 1, 16, 17),
    "blocks": (63, 1, 1, 64, 65),
    "a prompt": (130, 1, 1),
    "the whole": (192,),
}


def _poisoned(shape: Sequence[int]) -> Array:
    return np.full(shape, SENTINEL, np.uint32).view(np.float32)


def _split(problem: Append, qkv: Array) -> tuple[Array, Array, Array]:
    """[batch, seq, width] -> q, k, v as [batch, seq, heads, head_dim]."""
    batch, seq, _ = qkv.shape
    parts = qkv.astype(np.float64).reshape(batch, seq, -1, problem.head_dim)
    heads, kv_heads = problem.heads, problem.kv_heads
    return parts[:, :, :heads], parts[:, :, heads : heads + kv_heads], parts[:, :, heads + kv_heads :]


def _rotate(x: Array, table: Array) -> tuple[Array, Array]:
    """Rotate [batch, seq, heads, head_dim] by a table [seq, 2, head_dim / 2]; and what rounding may do to it."""
    half = x.shape[-1] // 2
    cos, sin = (table[:, i].astype(np.float64)[None, :, None, :] for i in range(2))
    first, second = x[..., :half], x[..., half:]
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    magnitude = np.abs(np.concatenate([first * cos, second * cos], -1))
    magnitude += np.abs(np.concatenate([second * sin, first * sin], -1))
    return rotated, 3 * UNIT["float32"] * magnitude


def _flat_keys(cache: Array) -> Array:
    """[batch, kv_heads, tiles, head_dim, TILE] -> [batch, positions, kv_heads, head_dim]."""
    batch, kv_heads, tiles, dim, tile = cache.shape
    flat: Array = cache.transpose(0, 2, 4, 1, 3).reshape(batch, tiles * tile, kv_heads, dim)
    return flat


def _flat_values(cache: Array) -> Array:
    """[batch, kv_heads, tiles, TILE, head_dim] -> [batch, positions, kv_heads, head_dim]."""
    batch, kv_heads, tiles, tile, dim = cache.shape
    flat: Array = cache.transpose(0, 2, 3, 1, 4).reshape(batch, tiles * tile, kv_heads, dim)
    return flat


def _check(problem: Append, on: str, batch: int, chunks: Sequence[int]) -> None:
    """Append chunk after chunk; after each, look at every position of the caches and at the queries."""
    total = sum(chunks)
    tiles = -(-total // GRANULE) * GRANULE // TILE
    shapes = cache_shapes(batch, problem.kv_heads, tiles, problem.head_dim)
    k_cache, v_cache = (_poisoned(shape) for shape in shapes)
    qkv = random(batch, total, problem.width)
    table = random(total, 2, problem.head_dim // 2, seed=1)
    expected_q, expected_k, expected_v = _split(problem, qkv)
    allowed_q, allowed_k = np.zeros_like(expected_q), np.zeros_like(expected_k)
    if problem.rope:
        expected_q, allowed_q = _rotate(expected_q, table)
        expected_k, allowed_k = _rotate(expected_k, table)
    kv_len = 0
    for seq in chunks:
        now = slice(kv_len, kv_len + seq)
        kv_len += seq
        tables = [table[now]] if problem.rope else []
        out = Out((batch, seq, problem.heads, problem.head_dim))
        caches = InOut(k_cache), InOut(v_cache)
        k_cache, v_cache, q = launch(problem, on, qkv[:, now], *tables, *caches, kv_len, out)
        what = f"{problem.name}, {seq} up to {kv_len}"
        assert_within(q, expected_q[:, now], allowed_q[:, now], f"{what}: queries")
        keys, values = _flat_keys(k_cache), _flat_values(v_cache)
        assert_within(keys[:, :kv_len], expected_k[:, :kv_len], allowed_k[:, :kv_len], f"{what}: keys")
        assert_within(values[:, :kv_len], expected_v[:, :kv_len], np.float64(0), f"{what}: values")
        for name, positions in (("keys", keys), ("values", values)):
            rest = np.ascontiguousarray(positions[:, kv_len:]).view(np.uint32)
            assert (rest == SENTINEL).all(), f"{what}: {name} behind the last position were written"


@machines
@pytest.mark.parametrize("chunks", list(CHUNKS.values()), ids=list(CHUNKS))
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks(on: str, batch: int, chunks: tuple[int, ...]) -> None:
    _check(Append(3, 1, 10), on, batch, chunks)


@machines
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (8, 1), (32, 4)])
def test_heads(on: str, heads: int, kv_heads: int) -> None:
    _check(Append(heads, kv_heads, 10), on, 2, (5, 1, 12))


@every_machine
@pytest.mark.parametrize("head_dim", [2, 4, 6, 20, 80])
def test_head_dims(on: str, head_dim: int) -> None:
    _check(Append(3, 1, head_dim), on, 2, (5, 1, 12))


@machines
@pytest.mark.parametrize("head_dim", [1, 4, 7, 16, 17, 64, 128])
def test_without_rope(on: str, head_dim: int) -> None:
    """Learned positions: a copy, of odd head_dim, too."""
    _check(Append(4, 2, head_dim, rope=False), on, 2, (5, 1, 12))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [4, 10, 30, 32, 34, 64, 66, 96, 128])
def test_more_head_dims(head_dim: int) -> None:
    for chunks in CHUNKS.values():
        _check(Append(4, 2, head_dim), "host", 1, chunks)
