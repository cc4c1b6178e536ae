"""Appending to the KV cache: what is written, where, and that nothing else is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from relax_llm.artifact.kv_cache import CACHE_DTYPES, GRANULE, TILE, CacheTensor, cache_tensors, decode
from relax_llm.kernels.cache import Append

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


def _poisoned(shape: Sequence[int], dtype: str) -> Array:
    words = -(-math.prod(shape) * np.dtype(dtype).itemsize // 4)
    return np.full(words, SENTINEL, np.uint32).view(dtype).reshape(shape)


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


def _flat(problem: Append, cache: Sequence[Array]) -> tuple[Array, Array]:
    """Keys and values as [batch, positions, kv_heads, head_dim]."""
    names = [tensor.name for tensor in _tensors(problem, 1, 1)]
    return decode(problem.cache, dict(zip(names, cache, strict=True)), problem.head_dim)


def _tensors(problem: Append, batch: int, tiles: int) -> Sequence[CacheTensor]:
    return cache_tensors(problem.cache, batch, problem.kv_heads, tiles, problem.head_dim)


def _half_step(cache: str, right: Array) -> Array:
    """How far a number may be from what a cache holds of it."""
    if cache == "q8":  # half a code, and what rounding the scale and its inverse adds
        return np.asarray(np.abs(right).max(axis=-1, keepdims=True) / 127 * (0.5 + 1e-4))
    return np.asarray(np.abs(right) * (2.0**-8 if cache == "bf16" else 0.0))


def _check(problem: Append, on: str, batch: int, chunks: Sequence[int]) -> None:
    """Append chunk after chunk; after each, look at every position of the caches and at the queries."""
    total = sum(chunks)
    tiles = -(-total // GRANULE) * GRANULE // TILE
    cache = [_poisoned(tensor.shape, tensor.dtype) for tensor in _tensors(problem, batch, tiles)]
    before = dict(zip(("keys", "values"), _flat(problem, cache), strict=True))
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
        *cache, q = launch(problem, on, qkv[:, now], *tables, *map(InOut, cache), kv_len, out)
        what = f"{problem.name}, {seq} up to {kv_len}"
        assert_within(q, expected_q[:, now], allowed_q[:, now], f"{what}: queries")
        keys, values = _flat(problem, cache)
        right_k, right_v = expected_k[:, :kv_len], expected_v[:, :kv_len]
        rounded = [_half_step(problem.cache, right) for right in (right_k, right_v)]
        assert_within(keys[:, :kv_len], right_k, allowed_k[:, :kv_len] + rounded[0], f"{what}: keys")
        assert_within(values[:, :kv_len], right_v, rounded[1], f"{what}: values")
        if problem.cache == "bf16":  # to nearest, exactly
            exact = right_v.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(values[:, :kv_len], exact)
        for name, positions in (("keys", keys), ("values", values)):
            rest = [np.ascontiguousarray(x[:, kv_len:]).tobytes() for x in (positions, before[name])]
            assert rest[0] == rest[1], f"{what}: {name} behind the last position were written"


caches = pytest.mark.parametrize("cache", CACHE_DTYPES)


@machines
@caches
@pytest.mark.parametrize("chunks", list(CHUNKS.values()), ids=list(CHUNKS))
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks(on: str, batch: int, chunks: tuple[int, ...], cache: str) -> None:
    _check(Append(3, 1, 10, cache=cache), on, batch, chunks)


@machines
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (8, 1), (32, 4)])
def test_heads(on: str, heads: int, kv_heads: int) -> None:
    _check(Append(heads, kv_heads, 10), on, 2, (5, 1, 12))


@every_machine
@pytest.mark.parametrize("head_dim", [2, 4, 6, 20, 80])
def test_head_dims(on: str, head_dim: int) -> None:
    _check(Append(3, 1, head_dim), on, 2, (5, 1, 12))


@machines
@caches
@pytest.mark.parametrize("head_dim", [1, 4, 7, 16, 17, 64, 128])
def test_without_rope(on: str, head_dim: int, cache: str) -> None:
    """Learned positions: a copy, of odd head_dim, too."""
    _check(Append(4, 2, head_dim, rope=False, cache=cache), on, 2, (5, 1, 12))


@machines
def test_what_bf16_rounds_to(on: str) -> None:
    """Ties to even, overflow to infinity, and NaN of every kind stays NaN."""
    given = np.array(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001,
         0xFFFFFFFF, 0x7FFFFFFF, 0x00000001, 0x80008001, 0x00000000, 0x80000000, 0x3FFFFFFF, 0xBF7F8000],
        np.uint32,
    ).view(np.float32)  # fmt: skip
    problem = Append(1, 1, len(given), rope=False, cache="bf16")
    qkv = np.concatenate([given] * 3).reshape(1, 1, -1)
    cache = [_poisoned(tensor.shape, tensor.dtype) for tensor in _tensors(problem, 1, GRANULE // TILE)]
    *cache, _ = launch(problem, on, qkv, *map(InOut, cache), 1, Out((1, 1, 1, len(given))))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = given.astype(ml_dtypes.bfloat16).astype(np.float32)
    for cached in (tokens[0, 0, 0] for tokens in _flat(problem, cache)):
        np.testing.assert_array_equal(cached, expected)
        np.testing.assert_array_equal(np.signbit(cached), np.signbit(expected) & ~np.isnan(expected))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [4, 10, 30, 32, 34, 64, 66, 96, 128])
def test_more_head_dims(head_dim: int) -> None:
    for chunks in CHUNKS.values():
        _check(Append(4, 2, head_dim), "host", 1, chunks)
