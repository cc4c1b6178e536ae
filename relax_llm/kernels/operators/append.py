# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The record of rotation and appending to the cache."""

from collections.abc import Mapping

import numpy as np
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from relax_llm.kernels.cache import TILE, Append, cache_shapes
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.operators.operator import UNIT, Array, Expected, Mistake, Operand, Operator, Sizes
from relax_llm.kernels.problem import tag


def operands(problem: Append, layout: Layout | None) -> tuple[Operand, ...]:
    """(qkv [batch, seq, width], (rope [seq, 2, head_dim / 2]), k_cache, v_cache, kv_len, q)."""
    keys, values = cache_shapes("batch", problem.kv_heads, "tiles", problem.head_dim)
    rope = [Operand("rope", ("seq", 2, problem.head_dim // 2))] if problem.rope else []
    return (
        Operand("qkv", ("batch", "seq", problem.width)),
        *rope,
        Operand("k_cache", keys, role="updated"),
        Operand("v_cache", values, role="updated"),
        Operand("kv_len", (), "int64", "size"),
        Operand("q", ("batch", "seq", problem.heads, problem.head_dim), role="output"),
    )


def definition(problem: Append) -> PrimFunc:
    """Plain loops: blocks "queries", "keys" and "values"."""
    func = _rotating(problem) if problem.rope else _copying(problem)
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


def inputs(problem: Append, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Normal numbers everywhere: what the caches held before must stay where nothing is appended."""
    return {
        operand.name: rng.standard_normal(operand.at(sizes), np.float32)
        for operand in operands(problem, None)
        if operand.is_tensor and operand.role != "output"
    }


def expected(problem: Append, sizes: Sizes, values: Mapping[str, Array], exact: bool) -> dict[str, Expected]:
    """Rotated queries, and the caches with rotated keys and values in their places; three roundings each."""
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    batch, seq = sizes["batch"], sizes["seq"]
    parts = values["qkv"].astype(np.float64).reshape(batch, seq, -1, dim)
    q, k, v = parts[:, :, :heads], parts[:, :, heads : heads + kv_heads], parts[:, :, heads + kv_heads :]
    slack_q, slack_k = np.zeros_like(q), np.zeros_like(k)
    if problem.rope:
        (q, slack_q), (k, slack_k) = _rotated(q, values["rope"]), _rotated(k, values["rope"])
    position = np.arange(sizes["kv_len"] - seq, sizes["kv_len"])
    tile, lane = position // TILE, position % TILE
    found = {"q": Expected(q, slack_q)}
    for name, new, slack in (("k_cache", k, slack_k), ("v_cache", v, np.zeros_like(v))):
        right = values[name].astype(np.float64)
        bound = np.zeros_like(right)
        for i in range(seq):  # [batch, kv_heads, dim] at one position
            at = np.s_[:, :, tile[i], :, lane[i]] if name == "k_cache" else np.s_[:, :, tile[i], lane[i], :]
            right[at], bound[at] = new[:, i], slack[:, i]
        found[name] = Expected(right, bound)
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
    ),
    benchmarks=(Append(9, 3, 64), Append(32, 8, 64), Append(32, 8, 128)),
    mistakes=(
        Mistake({"heads": 3, "kv_heads": 2, "head_dim": 4}, "share"),
        Mistake({"heads": 2, "kv_heads": 1, "head_dim": 5}, "even"),
        Mistake({"heads": 2, "kv_heads": 1, "head_dim": 0}, "at least 1"),
    ),
)
