"""The record of attention over the cache."""

from collections.abc import Mapping

import numpy as np
from tvm import te, tirx
from tvm.tirx import PrimFunc

from relax_llm.artifact.kv_cache import CACHE_DTYPES, GRANULE, TILE, cache_tensors, decode, encode
from relax_llm.kernels.attention import Attention
from relax_llm.kernels.attention.tile import most_of
from relax_llm.kernels.halves import from_bf16
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.operators.operator import (
    UNIT,
    Array,
    Expected,
    Mistake,
    Operand,
    Operator,
    Sizes,
    summed,
)
from relax_llm.kernels.problem import tag

_HALF_STEP = 2.0**-8  # How far a number rounded to bf16 may be off, as a share of it.
_HEAVY = 1e-12  # Softmax weights below it do not matter, nor does how far their scores are missed.


def operands(problem: Attention, layout: Layout | None) -> tuple[Operand, ...]:
    """(q [batch, seq, heads, head_dim], the cache, kv_len, out [batch, seq, heads * head_dim])."""
    cache = cache_tensors(problem.cache, "batch", problem.kv_heads, "tiles", problem.head_dim)
    return (
        Operand("q", ("batch", "seq", problem.heads, problem.head_dim)),
        *(Operand(tensor.name, tensor.shape, tensor.dtype) for tensor in cache),
        Operand("kv_len", (), "int64", "size"),
        Operand("out", ("batch", "seq", problem.heads * problem.head_dim), role="output"),
    )


def definition(problem: Attention) -> PrimFunc:
    """Plain loops: blocks "scores", "masked", "largest", "weights", "total", "weighted" and "attended"."""
    batch, seq, tiles, kv_len = (tirx.Var(name, "int64") for name in ("batch", "seq", "tiles", "kv_len"))
    heads, dim, group = problem.heads, problem.head_dim, problem.heads // problem.kv_heads
    q = te.placeholder((batch, seq, heads, dim), name="q")
    cache = {
        tensor.name: te.placeholder(tensor.shape, tensor.dtype, tensor.name)
        for tensor in cache_tensors(problem.cache, batch, problem.kv_heads, tiles, dim)
    }

    def cached(
        which: str, b: tirx.Var, h: tirx.Expr, t: tirx.Var, first: tirx.Var, second: tirx.Var
    ) -> tirx.Expr:
        """What lies at a place of a tile, as a number."""
        array = cache[f"{which}_cache"]
        if problem.cache == "f32":
            return array[b, h, t // TILE, first, second]
        stored = array[b, h, t // TILE, first // 2, second, first % 2]
        if problem.cache == "bf16":
            return from_bf16(stored)
        return tirx.Cast("float32", stored) * cache[f"{which}_scale"][b, h, t // TILE, t % TILE]

    def key(b: tirx.Var, h: tirx.Expr, t: tirx.Var, d: tirx.Var) -> tirx.Expr:
        return cached("k", b, h, t, d, t % TILE)

    def value(b: tirx.Var, h: tirx.Expr, t: tirx.Var, c: tirx.Var) -> tirx.Expr:
        return cached("v", b, h, t, t % TILE, c)

    d = te.reduce_axis((0, dim), name="d")
    at, over, of = (te.reduce_axis((0, kv_len), name=name) for name in ("t_max", "t_sum", "t"))
    square = (batch, heads, seq, kv_len)
    scores = te.compute(
        square,
        lambda b, h, s, t: te.sum(q[b, s, h, d] * key(b, h // group, t, d), axis=d),
        name="scores",
    )

    def mask(b: tirx.Var, h: tirx.Var, s: tirx.Var, t: tirx.Var) -> tirx.Expr:
        visible = t <= kv_len - seq + s
        if problem.window is not None:
            visible = tirx.all(visible, t > kv_len - seq + s - problem.window)
        scaled = scores[b, h, s, t] * tirx.const(problem.scale, "float32")
        return tirx.if_then_else(visible, scaled, tirx.const(-1e30, "float32"))

    masked = te.compute(square, mask, name="masked")
    rows = (batch, heads, seq)
    largest = te.compute(rows, lambda b, h, s: te.max(masked[b, h, s, at], axis=at), name="largest")
    weights = te.compute(
        square, lambda b, h, s, t: tirx.exp(masked[b, h, s, t] - largest[b, h, s]), name="weights"
    )
    total = te.compute(rows, lambda b, h, s: te.sum(weights[b, h, s, over], axis=over), name="total")
    weighted = te.compute(
        (batch, seq, heads, dim),
        lambda b, s, h, c: te.sum(weights[b, h, s, of] * value(b, h // group, of, c), axis=of),
        name="weighted",
    )
    out = te.compute(
        (batch, seq, heads * dim),
        lambda b, s, c: weighted[b, s, c // dim, c % dim] / total[b, c // dim, s],
        name="attended",
    )
    func = te.create_prim_func([q, *cache.values(), kv_len, out])
    return tag(func.with_attr("global_symbol", f"loops_{problem.name}"), problem)


def inputs(problem: Attention, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Normal numbers; what lies in the caches behind kv_len is NaN, in q8 by its scales."""
    q = (sizes["batch"], sizes["seq"], problem.heads, problem.head_dim)
    cached = (sizes["batch"], sizes["tiles"] * TILE, problem.kv_heads, problem.head_dim)
    keys, values = (rng.standard_normal(cached, np.float32) for _ in range(2))
    for array in (keys, values):
        array[:, sizes["kv_len"] :] = np.nan
    return {"q": rng.standard_normal(q, np.float32), **encode(problem.cache, keys, values)}


def expected(
    problem: Attention, sizes: Sizes, values: Mapping[str, Array], exact: bool
) -> dict[str, Expected]:
    """Softmax attention in float64.

    A score that is missed by e makes its weight wrong by a factor exp(e), and all others through their sum; scores far
    below the maximum weigh nothing, so theirs do not count. Each block may rescale what came before it.

    Over a cache in bf16 or q8 queries and weights may be rounded to bf16, too, each by half a step of its own; over one
    in q8 also to whole numbers, by half a step of the largest of a query's channels, or of the weights times scales.
    """
    kv_len, seq, dim = sizes["kv_len"], sizes["seq"], problem.head_dim
    group = problem.heads // problem.kv_heads
    q = values["q"].astype(np.float64)
    keys, cached = (
        np.repeat(x[:, :kv_len].astype(np.float64), group, axis=2) for x in decode(problem.cache, values, dim)
    )
    scores = problem.scale * np.einsum("bshd,bthd->bhst", q, keys, optimize=True)
    scale = abs(problem.scale) * np.einsum("bshd,bthd->bhst", np.abs(q), np.abs(keys), optimize=True)
    query, position = np.arange(kv_len - seq, kv_len)[:, None], np.arange(kv_len)[None]
    visible = position <= query
    if problem.window is not None:
        visible &= position > query - problem.window
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    right = np.einsum("bhst,bthd->bshd", weights, cached, optimize=True)
    rough: Array | float = 0.0
    if problem.cache == "q8":
        step = 0.5 / most_of(dim)
        coarse = (
            np.abs(q).max(axis=-1).swapaxes(1, 2)[..., None] * step / _HALF_STEP
        )  # [batch, heads, seq, 1]
        scale += abs(problem.scale) * coarse * np.abs(keys).sum(axis=-1).swapaxes(1, 2)[:, :, None]
        largest = np.abs(cached).max(axis=-1).swapaxes(1, 2)[:, :, None]  # [batch, heads, 1, kv_len]
        rough = (kv_len * step * (weights * largest).max(axis=-1)).transpose(0, 2, 1)[..., None]
    heavy = np.where(visible & (weights > _HEAVY), scale, 0.0).max(axis=-1)  # [batch, heads, seq]
    rounded = 0.0 if problem.cache == "f32" else _HALF_STEP
    missed = np.expm1(2 * (UNIT * (summed(dim) + 2) + rounded) * heavy)
    relative = missed + 4 * UNIT * (2 + np.sqrt(kv_len / GRANULE)) + 2 * UNIT * summed(kv_len) + rounded
    magnitude = np.einsum("bhst,bthd->bshd", weights, np.abs(cached), optimize=True)
    bound = magnitude * relative.transpose(0, 2, 1)[..., None] + rough + 1e-30
    flat = (q.shape[0], seq, problem.heads * dim)
    return {"out": Expected(right.reshape(flat), bound.reshape(flat))}


ATTENTION = Operator(
    Attention,
    operands,
    definition,
    inputs,
    expected,
    samples=(
        Attention(1, 1, 1, 1.0),
        Attention(3, 1, 10, 10**-0.5),
        Attention(9, 3, 64, 0.125),
        Attention(6, 2, 20, 20**-0.5, window=5),
        Attention(4, 4, 16, -0.3, window=65),
        Attention(9, 3, 64, 0.125, cache="bf16"),
        Attention(3, 1, 7, 7**-0.5, cache="bf16"),
        Attention(6, 2, 40, 40**-0.5, window=21, cache="bf16"),
        Attention(9, 3, 64, 0.125, cache="q8"),
        Attention(3, 1, 7, 7**-0.5, cache="q8"),
        Attention(6, 2, 40, 40**-0.5, window=21, cache="q8"),
    ),
    benchmarks=tuple(
        Attention(heads, kv_heads, head_dim, head_dim**-0.5, cache=cache)
        for heads, kv_heads, head_dim in ((9, 3, 64), (32, 8, 64), (32, 8, 128))
        for cache in CACHE_DTYPES
    ),
    mistakes=(
        Mistake({"heads": 3, "kv_heads": 2, "head_dim": 4, "scale": 1.0}, "share"),
        Mistake({"heads": 2, "kv_heads": 0, "head_dim": 4, "scale": 1.0}, "at least 1"),
        Mistake({"heads": 2, "kv_heads": 2, "head_dim": 4, "scale": 1.0, "window": 0}, "at least 1"),
        Mistake({"heads": 2, "kv_heads": 2, "head_dim": 4, "scale": 1.0, "cache": "q4"}, "q4"),
    ),
)
