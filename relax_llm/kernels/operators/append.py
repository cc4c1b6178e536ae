# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The record of rotation and appending to the cache."""

from collections.abc import Mapping

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from relax_llm.artifact.kv_cache import (
    CACHE_DTYPES,
    TILE,
    cache_shapes,
    decode_keys,
    decode_values,
    encode_keys,
    encode_values,
)
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.cache import Append
from relax_llm.kernels.halves import to_bf16
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.operators.operator import UNIT, Array, Expected, Mistake, Operand, Operator, Sizes
from relax_llm.kernels.problem import tag


def operands(problem: Append, layout: Layout | None) -> tuple[Operand, ...]:
    """(qkv [batch, seq, width], (rope [seq, 2, head_dim / 2]), k_cache, v_cache, kv_len, q)."""
    keys, values = cache_shapes(problem.cache, "batch", problem.kv_heads, "tiles", problem.head_dim)
    dtype = CACHE_DTYPES[problem.cache]
    rope = [Operand("rope", ("seq", 2, problem.head_dim // 2))] if problem.rope else []
    return (
        Operand("qkv", ("batch", "seq", problem.width)),
        *rope,
        Operand("k_cache", keys, dtype, "updated"),
        Operand("v_cache", values, dtype, "updated"),
        Operand("kv_len", (), "int64", "size"),
        Operand("q", ("batch", "seq", problem.heads, problem.head_dim), role="output"),
    )


def definition(problem: Append) -> PrimFunc:
    """Plain loops: blocks "queries", "keys" and "values"."""
    in_halves = problem.cache == "bf16"
    kind = (
        (_rotating_halves if in_halves else _rotating)
        if problem.rope
        else (_halves if in_halves else _copying)
    )
    func = kind(problem)
    func = func.without_attr("global_symbol").with_attr("tirx.noalias", True)
    return tag(func.with_attr("global_symbol", f"loops_{problem.name}"), problem)


def _rotating(problem: Append):
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    half = dim // 2

    @T.prim_func(s_tir=True)
    def append(
        qkv_in: T.handle,
        rope_in: T.handle,
        k_in: T.handle,
        v_in: T.handle,
        kv_len: T.int64,
        q_out: T.handle,
    ):
        batch, seq, tiles = T.int64(), T.int64(), T.int64()
        qkv = T.match_buffer(qkv_in, (batch, seq, problem.width), "float32")
        rope = T.match_buffer(rope_in, (seq, 2, half), "float32")
        k_cache = T.match_buffer(k_in, (batch, kv_heads, tiles, dim, TILE), "float32")
        v_cache = T.match_buffer(v_in, (batch, kv_heads, tiles, TILE, dim), "float32")
        q = T.match_buffer(q_out, (batch, seq, heads, dim), "float32")
        for b, s, h, c in T.grid(batch, seq, heads, dim):
            with T.sblock("queries"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                q[vb, vs, vh, vc] = T.if_then_else(
                    vc < half,
                    qkv[vb, vs, vh * dim + vc] * rope[vs, 0, vc]
                    - qkv[vb, vs, vh * dim + vc + half] * rope[vs, 1, vc],
                    qkv[vb, vs, vh * dim + vc] * rope[vs, 0, vc - half]
                    + qkv[vb, vs, vh * dim + vc - half] * rope[vs, 1, vc - half],
                )
        for b, s, h, c in T.grid(batch, seq, kv_heads, dim):
            with T.sblock("keys"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                k_cache[vb, vh, (kv_len - seq + vs) // TILE, vc, (kv_len - seq + vs) % TILE] = T.if_then_else(
                    vc < half,
                    qkv[vb, vs, (heads + vh) * dim + vc] * rope[vs, 0, vc]
                    - qkv[vb, vs, (heads + vh) * dim + vc + half] * rope[vs, 1, vc],
                    qkv[vb, vs, (heads + vh) * dim + vc] * rope[vs, 0, vc - half]
                    + qkv[vb, vs, (heads + vh) * dim + vc - half] * rope[vs, 1, vc - half],
                )
        for b, s, h, c in T.grid(batch, seq, kv_heads, dim):
            with T.sblock("values"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                v_cache[vb, vh, (kv_len - seq + vs) // TILE, (kv_len - seq + vs) % TILE, vc] = qkv[
                    vb, vs, (heads + kv_heads + vh) * dim + vc
                ]

    return append


def _copying(problem: Append):
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim

    @T.prim_func(s_tir=True)
    def append(qkv_in: T.handle, k_in: T.handle, v_in: T.handle, kv_len: T.int64, q_out: T.handle):
        batch, seq, tiles = T.int64(), T.int64(), T.int64()
        qkv = T.match_buffer(qkv_in, (batch, seq, problem.width), "float32")
        k_cache = T.match_buffer(k_in, (batch, kv_heads, tiles, dim, TILE), "float32")
        v_cache = T.match_buffer(v_in, (batch, kv_heads, tiles, TILE, dim), "float32")
        q = T.match_buffer(q_out, (batch, seq, heads, dim), "float32")
        for b, s, h, c in T.grid(batch, seq, heads, dim):
            with T.sblock("queries"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                q[vb, vs, vh, vc] = qkv[vb, vs, vh * dim + vc]
        for b, s, h, c in T.grid(batch, seq, kv_heads, dim):
            with T.sblock("keys"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                k_cache[vb, vh, (kv_len - seq + vs) // TILE, vc, (kv_len - seq + vs) % TILE] = qkv[
                    vb, vs, (heads + vh) * dim + vc
                ]
        for b, s, h, c in T.grid(batch, seq, kv_heads, dim):
            with T.sblock("values"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                v_cache[vb, vh, (kv_len - seq + vs) // TILE, (kv_len - seq + vs) % TILE, vc] = qkv[
                    vb, vs, (heads + kv_heads + vh) * dim + vc
                ]

    return append


def _rotating_halves(problem: Append):
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    half = dim // 2

    words = -(-dim // 2)

    @T.prim_func(s_tir=True)
    def append(
        qkv_in: T.handle,
        rope_in: T.handle,
        k_in: T.handle,
        v_in: T.handle,
        kv_len: T.int64,
        q_out: T.handle,
    ):
        batch, seq, tiles = T.int64(), T.int64(), T.int64()
        qkv = T.match_buffer(qkv_in, (batch, seq, problem.width), "float32")
        rope = T.match_buffer(rope_in, (seq, 2, half), "float32")
        k_cache = T.match_buffer(k_in, (batch, kv_heads, tiles, words, TILE, 2), "uint16")
        v_cache = T.match_buffer(v_in, (batch, kv_heads, tiles, TILE // 2, dim, 2), "uint16")
        q = T.match_buffer(q_out, (batch, seq, heads, dim), "float32")
        for b, s, h, c in T.grid(batch, seq, heads, dim):
            with T.sblock("queries"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                q[vb, vs, vh, vc] = T.if_then_else(
                    vc < half,
                    qkv[vb, vs, vh * dim + vc] * rope[vs, 0, vc]
                    - qkv[vb, vs, vh * dim + vc + half] * rope[vs, 1, vc],
                    qkv[vb, vs, vh * dim + vc] * rope[vs, 0, vc - half]
                    + qkv[vb, vs, vh * dim + vc - half] * rope[vs, 1, vc - half],
                )
        for b, s, h, c in T.grid(batch, seq, kv_heads, dim):
            with T.sblock("keys"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                k_cache[vb, vh, (kv_len - seq + vs) // TILE, vc // 2, (kv_len - seq + vs) % TILE, vc % 2] = (
                    _upper(
                        T.if_then_else(
                            vc < half,
                            qkv[vb, vs, (heads + vh) * dim + vc] * rope[vs, 0, vc]
                            - qkv[vb, vs, (heads + vh) * dim + vc + half] * rope[vs, 1, vc],
                            qkv[vb, vs, (heads + vh) * dim + vc] * rope[vs, 0, vc - half]
                            + qkv[vb, vs, (heads + vh) * dim + vc - half] * rope[vs, 1, vc - half],
                        )
                    )
                )
        for b, s, h, c in T.grid(batch, seq, kv_heads, dim):
            with T.sblock("values"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                v_cache[
                    vb,
                    vh,
                    (kv_len - seq + vs) // TILE,
                    (kv_len - seq + vs) % TILE // 2,
                    vc,
                    (kv_len - seq + vs) % 2,
                ] = _upper(qkv[vb, vs, (heads + kv_heads + vh) * dim + vc])

    return append


def _halves(problem: Append):
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim

    words = -(-dim // 2)

    @T.prim_func(s_tir=True)
    def append(qkv_in: T.handle, k_in: T.handle, v_in: T.handle, kv_len: T.int64, q_out: T.handle):
        batch, seq, tiles = T.int64(), T.int64(), T.int64()
        qkv = T.match_buffer(qkv_in, (batch, seq, problem.width), "float32")
        k_cache = T.match_buffer(k_in, (batch, kv_heads, tiles, words, TILE, 2), "uint16")
        v_cache = T.match_buffer(v_in, (batch, kv_heads, tiles, TILE // 2, dim, 2), "uint16")
        q = T.match_buffer(q_out, (batch, seq, heads, dim), "float32")
        for b, s, h, c in T.grid(batch, seq, heads, dim):
            with T.sblock("queries"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                q[vb, vs, vh, vc] = qkv[vb, vs, vh * dim + vc]
        for b, s, h, c in T.grid(batch, seq, kv_heads, dim):
            with T.sblock("keys"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                k_cache[vb, vh, (kv_len - seq + vs) // TILE, vc // 2, (kv_len - seq + vs) % TILE, vc % 2] = (
                    _upper(qkv[vb, vs, (heads + vh) * dim + vc])
                )
        for b, s, h, c in T.grid(batch, seq, kv_heads, dim):
            with T.sblock("values"):
                vb, vs, vh, vc = T.axis.remap("SSSS", [b, s, h, c])
                v_cache[
                    vb,
                    vh,
                    (kv_len - seq + vs) // TILE,
                    (kv_len - seq + vs) % TILE // 2,
                    vc,
                    (kv_len - seq + vs) % 2,
                ] = _upper(qkv[vb, vs, (heads + kv_heads + vh) * dim + vc])

    return append


def _upper(value: Expr) -> Expr:
    """The bits of bf16 that f32 is rounded to."""
    return tirx.Cast("uint16", to_bf16(value) >> tirx.const(16, "uint32"))


def inputs(problem: Append, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Normal numbers everywhere: what the caches held before must stay where nothing is appended."""
    cached = (sizes["batch"], sizes["tiles"] * TILE, problem.kv_heads, problem.head_dim)
    made = {
        operand.name: rng.standard_normal(operand.at(sizes), np.float32)
        for operand in operands(problem, None)
        if operand.is_tensor and operand.role == "input"
    }
    keys, values = (rng.standard_normal(cached, np.float32) for _ in range(2))
    return made | {
        "k_cache": encode_keys(problem.cache, keys),
        "v_cache": encode_values(problem.cache, values),
    }


def expected(problem: Append, sizes: Sizes, values: Mapping[str, Array], exact: bool) -> dict[str, Expected]:
    """Rotated queries, and the caches with rotated keys and values in their places; three roundings each.

    Bits of bf16 are compared as whole numbers: those of a rotated key may be off by one where its f32 may be either
    side of the middle between two.
    """
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    batch, seq = sizes["batch"], sizes["seq"]
    parts = values["qkv"].astype(np.float64).reshape(batch, seq, -1, dim)
    q, k, v = parts[:, :, :heads], parts[:, :, heads : heads + kv_heads], parts[:, :, heads + kv_heads :]
    slack_q, slack_k = np.zeros_like(q), np.zeros_like(k)
    if problem.rope:
        (q, slack_q), (k, slack_k) = _rotated(q, values["rope"]), _rotated(k, values["rope"])
    new = slice(sizes["kv_len"] - seq, sizes["kv_len"])
    found = {"q": Expected(q, slack_q)}
    old = {
        "k_cache": decode_keys(problem.cache, values["k_cache"], dim),
        "v_cache": decode_values(problem.cache, values["v_cache"]),
    }
    for name, right, slack, encode in (
        ("k_cache", k, slack_k, encode_keys),
        ("v_cache", v, np.zeros_like(v), encode_values),
    ):
        whole, bound = old[name].astype(np.float64), np.zeros(old[name].shape)
        whole[:, new], bound[:, new] = right, slack
        if problem.cache == "f32":
            found[name] = Expected(encode("f32", whole), encode("f32", bound))
            continue
        low, middle, high = (
            encode(problem.cache, (whole + sign * bound).astype(np.float32)).astype(np.float64)
            for sign in (-1, 0, 1)
        )
        found[name] = Expected(middle, np.maximum(np.abs(low - middle), np.abs(high - middle)))
    return found


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
