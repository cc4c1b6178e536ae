"""The record of rotation and appending to the cache."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import (
    CACHE_DTYPES,
    LEAST,
    MOST,
    TILE,
    cache_tensors,
    decode,
    encode,
    laid,
    lifted,
)
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.cache import Append, declare_cache
from relax_llm.kernels.codes import inverse_of, magnitude, rounded
from relax_llm.kernels.halves import to_bf16
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.operators.operator import UNIT, Array, Expected, Mistake, Operand, Operator, Sizes
from relax_llm.kernels.problem import tag

Channel = Callable[[Expr, Expr, Expr, Expr], Expr]
"""Gives an element, from its sequence, token, head and channel."""


def operands(problem: Append, layout: Layout | None) -> tuple[Operand, ...]:
    """(qkv [batch, seq, width], (rope [seq, 2, head_dim / 2]), the cache, kv_len, q)."""
    cache = cache_tensors(problem.cache, "batch", problem.kv_heads, "tiles", problem.head_dim)
    rope = [Operand("rope", ("seq", 2, problem.head_dim // 2))] if problem.rope else []
    return (
        Operand("qkv", ("batch", "seq", problem.width)),
        *rope,
        *(Operand(tensor.name, tensor.shape, tensor.dtype, "updated") for tensor in cache),
        Operand("kv_len", (), "int64", "size"),
        Operand("q", ("batch", "seq", problem.heads, problem.head_dim), role="output"),
    )


def definition(problem: Append) -> PrimFunc:
    """Plain loops: blocks "queries", "keys" and "values"; in q8 also "largest" and "scales" of each of the latter."""
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    half = dim // 2

    def emit() -> None:
        batch, seq, tiles = (b.size(name) for name in ("batch", "seq", "tiles"))
        qkv = b.argument("qkv", (batch, seq, problem.width))
        rope = b.argument("rope", (seq, 2, half)) if problem.rope else None
        cache = declare_cache(problem.cache, batch, kv_heads, tiles, dim)
        kv_len = b.scalar("kv_len")
        q = b.argument("q", (batch, seq, heads, dim))

        def plain(first: int) -> Channel:
            """The channels of a head as they are; of the first of such heads they begin at column `first`."""
            return lambda i, s, h, c: qkv[i, s, first + h * dim + c]

        def turned(first: int) -> Channel:
            """The same, rotated."""
            at = plain(first)
            if rope is None:
                return at
            return lambda i, s, h, c: T.if_then_else(
                c < half,
                at(i, s, h, c) * rope[s, 0, c] - at(i, s, h, c + half) * rope[s, 1, c],
                at(i, s, h, c) * rope[s, 0, c - half] + at(i, s, h, c - half) * rope[s, 1, c - half],
            )

        def placed(s: Expr) -> tuple[Expr, Expr]:
            """The tile and the lane of a token."""
            return (kv_len - seq + s) // TILE, (kv_len - seq + s) % TILE

        def append(name: str, which: str, channel: Channel) -> None:
            largest = None
            if problem.cache == "q8":
                largest = T.sblock_alloc_buffer((batch, seq, kv_heads), "int32")
                with _block(f"largest_{name}", "SSSR", batch, seq, kv_heads, dim) as (i, s, h, c):
                    with T.init():
                        b.put(largest, T.int32(0), i, s, h)
                    bits = magnitude(channel(i, s, h, c), 1)
                    b.put(largest, T.max(largest[i, s, h], bits), i, s, h)
                with _block(f"scales_{name}", "SSS", batch, seq, kv_heads) as (i, s, h):
                    scale = T.reinterpret("float32", largest[i, s, h]) / T.float32(MOST)
                    b.put(cache[f"{which}_scale"], scale, i, h, *placed(s))
            with _block(name, "SSSS", batch, seq, kv_heads, dim) as (i, s, h, c):
                tile, lane = placed(s)
                value = channel(i, s, h, c)
                at: tuple[Expr, ...] = (c, lane) if which == "k" else (lane, c)
                if largest is not None:
                    value = T.Cast("int8", rounded(value * inverse_of(largest[i, s, h], MOST), 1))
                elif problem.cache == "bf16":
                    value = T.Cast("uint16", to_bf16(value) >> T.uint32(16))
                if problem.cache != "f32":
                    first, second = at
                    at = (first // 2, second, first % 2)
                b.put(cache[f"{which}_cache"], value, i, h, tile, *at)

        with _block("queries", "SSSS", batch, seq, heads, dim) as (i, s, h, c):
            b.put(q, turned(0)(i, s, h, c), i, s, h, c)
        append("keys", "k", turned(heads * dim))
        append("values", "v", plain((heads + kv_heads) * dim))

    name = f"loops_{problem.name}"
    return tag(b.build(name, {"global_symbol": name, "tirx.noalias": True}, emit), problem)


@contextmanager
def _block(name: str, kinds: str, *extents: Expr) -> Iterator[list[Expr]]:
    """Loops and a block with an axis for each, "S" or "R"."""
    with T.grid(*extents) as loops, T.sblock(name):
        yield T.axis.remap(kinds, loops)


def inputs(problem: Append, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Normal numbers everywhere: what the caches held before must stay where nothing is appended."""
    cached = (sizes["batch"], sizes["tiles"] * TILE, problem.kv_heads, problem.head_dim)
    made = {
        operand.name: rng.standard_normal(operand.at(sizes), np.float32)
        for operand in operands(problem, None)
        if operand.is_tensor and operand.role == "input"
    }
    keys, values = (rng.standard_normal(cached, np.float32) for _ in range(2))
    return made | encode(problem.cache, keys, values)


def expected(problem: Append, sizes: Sizes, values: Mapping[str, Array], exact: bool) -> dict[str, Expected]:
    """Rotated queries, and the caches with rotated keys and values in their places; three roundings each.

    Bits of bf16 and codes of q8 are compared as whole numbers: they may be off by one where what is rounded may be
    either side of the middle between two.
    """
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    batch, seq = sizes["batch"], sizes["seq"]
    parts = values["qkv"].astype(np.float64).reshape(batch, seq, -1, dim)
    q, k, v = parts[:, :, :heads], parts[:, :, heads : heads + kv_heads], parts[:, :, heads + kv_heads :]
    slack_q, slack_k, slack_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    if problem.rope:
        (q, slack_q), (k, slack_k) = _rotated(q, values["rope"]), _rotated(k, values["rope"])
    new = slice(sizes["kv_len"] - seq, sizes["kv_len"])
    tokens = [Expected(k, slack_k), Expected(v, slack_v)]
    found = {"q": Expected(q, slack_q)}
    cache = problem.cache
    if cache == "q8":
        for index, name in enumerate(("k_scale", "v_scale")):
            tokens[index], scale = _coded(tokens[index])
            found[name] = _scales(values[name], new, scale)
    before = (lifted if cache == "q8" else decode)(cache, values, dim)
    keys, cached = (_among(old, new, now) for old, now in zip(before, tokens, strict=True))
    return found | (_as_bf16(keys, cached) if cache == "bf16" else _as_numbers(cache, keys, cached))


def _among(before: Array, new: slice, tokens: Expected) -> Expected:
    """The keys or values of all positions, of which some are new."""
    right, bound = before.astype(np.float64), np.zeros(before.shape)
    right[:, new], bound[:, new] = tokens.right, tokens.bound
    return Expected(right, bound)


def _as_numbers(cache: str, keys: Expected, values: Expected) -> dict[str, Expected]:
    """Numbers, or codes, where a cache has them."""
    right, bound = laid(cache, keys.right, values.right), laid(cache, keys.bound, values.bound)
    return {name: Expected(right[name], bound[name]) for name in right}


def _as_bf16(keys: Expected, values: Expected) -> dict[str, Expected]:
    """Bits, as whole numbers."""
    low, middle, high = (
        encode("bf16", *((x.right + sign * x.bound).astype(np.float32) for x in (keys, values)))
        for sign in (-1, 0, 1)
    )
    return {name: _whole(*(bits[name].astype(np.float64) for bits in (low, middle, high))) for name in middle}


def _whole(low: Array, right: Array, high: Array) -> Expected:
    """A number between two others."""
    return Expected(right, np.maximum(np.abs(low - right), np.abs(high - right)))


def _coded(tokens: Expected) -> tuple[Expected, Expected]:
    """Keys or values as codes of q8, and their scales [batch, seq, kv_heads]; an inverse and a product are rounded."""
    right, slack = tokens.right, tokens.bound
    largest, off = np.abs(right).max(axis=-1), slack.max(axis=-1)
    inverse = (MOST / np.maximum(largest, LEAST))[..., None]
    exact = right * inverse
    error = inverse * (slack + np.abs(right) * (off / np.maximum(largest, LEAST))[..., None])
    error += 4 * UNIT * np.abs(exact)
    codes = _whole(np.rint(exact - error), np.rint(exact), np.rint(exact + error))
    return codes, Expected(largest / MOST, off / MOST + 2 * UNIT * largest / MOST)


def _scales(before: Array, new: slice, tokens: Expected) -> Expected:
    """Scales [batch, kv_heads, tiles, TILE] of all positions, of which some are new."""
    flat = before.reshape(*before.shape[:2], -1).transpose(0, 2, 1)
    whole = _among(flat, new, tokens)
    return Expected(*(x.transpose(0, 2, 1).reshape(before.shape) for x in (whole.right, whole.bound)))


def _rotated(x: Array, table: Array) -> tuple[Array, Array]:
    half = x.shape[-1] // 2
    cos, sin = (table[:, i].astype(np.float64)[None, :, None, :] for i in range(2))
    first, second = x[..., :half], x[..., half:]
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    magnitude = np.abs(np.concatenate([first * cos, second * cos], -1))
    magnitude += np.abs(np.concatenate([second * sin, first * sin], -1))
    return rotated, 3 * UNIT * magnitude


APPEND = Operator(
    Append,
    operands,
    definition,
    inputs,
    expected,
    samples=(
        Append(1, 1, 2),
        Append(3, 1, 10),
        Append(9, 3, 64),
        Append(4, 2, 7, rope=False),
        Append(4, 4, 64, rope=False),
        Append(9, 3, 64, cache="bf16"),
        Append(3, 1, 10, cache="bf16"),
        Append(4, 2, 7, rope=False, cache="bf16"),
        Append(9, 3, 64, cache="q8"),
        Append(3, 1, 10, cache="q8"),
        Append(4, 2, 7, rope=False, cache="q8"),
    ),
    benchmarks=tuple(
        Append(*heads, cache=cache)
        for heads in ((9, 3, 64), (32, 8, 64), (32, 8, 128))
        for cache in CACHE_DTYPES
    ),
    mistakes=(
        Mistake({"heads": 3, "kv_heads": 2, "head_dim": 4}, "share"),
        Mistake({"heads": 2, "kv_heads": 1, "head_dim": 5}, "even"),
        Mistake({"heads": 2, "kv_heads": 1, "head_dim": 0}, "at least 1"),
        Mistake({"heads": 2, "kv_heads": 1, "head_dim": 4, "cache": "f64"}, "f64"),
    ),
)
