"""Causal attention over the KV cache: softmax(q k^T * scale) v, streamed over blocks of positions.

The running maximum and sum of a streaming softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) let a
task visit each block of the cache once. Query heads that share a key head share its loads.
"""

from dataclasses import dataclass
from typing import ClassVar

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.cache import GRANULE, TILE, cache_shapes
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.problem import Problem, require_positive, tag
from relax_llm.kernels.vectormath import exp

_MASKED = (
    -1.0e30
)  # Finite, so that a block without a visible position leaves no NaN; a later block erases its trace.


@dataclass(frozen=True)
class Attention(Problem):
    """Attention of the step's queries to the cache.

    Attributes:
        heads: Query heads; heads / kv_heads of them share each key and value head.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        scale: Factor on the scores before the softmax.
        window: A query at position i sees positions above i - window only; None sees all.
    """

    operator: ClassVar[str] = "attention"
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None

    def __post_init__(self) -> None:
        require_positive(
            self, "heads", "kv_heads", "head_dim", *(("window",) if self.window is not None else ())
        )
        if self.heads % self.kv_heads:
            raise KernelError(f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly.")

    @property
    def flops(self) -> str:
        return f"{4 * self.heads * self.head_dim}*batch*seq*{self._seen}"

    @property
    def bytes(self) -> str:
        cache = f"{8 * self.kv_heads * self.head_dim}*batch*kv_len"
        return f"{cache} + {8 * self.heads * self.head_dim}*batch*seq"

    @property
    def _seen(self) -> str:
        mean = "(kv_len - (seq - 1)/2)"
        return mean if self.window is None else f"min({self.window}, {mean})"


def attention(problem: Attention, machine: Machine) -> PrimFunc:
    """q [batch, seq, heads, head_dim], k_cache, v_cache, kv_len -> out [batch, seq, heads * head_dim].

    A task has one key head and some rows, which are pairs of a query and a head of its group; every number of rows up
    to the tile's height has its own unrolled micro-kernels.
    """
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    group = heads // kv_heads
    step = max(n for n in (1, 2, 4) if n <= machine.accumulators)  # key tiles at once
    height = max(1, machine.accumulators // step)

    def emit() -> None:
        batch, seq, tiles = b.size("batch"), b.size("seq"), b.size("tiles")
        q = b.argument("q", (batch, seq, heads, dim))
        k_shape, v_shape = cache_shapes(batch, kv_heads, tiles, dim)
        k_cache, v_arg = b.argument("k_cache", k_shape), b.argument("v_cache", v_shape)
        kv_len = b.scalar("kv_len")
        out_arg = b.argument("out", (batch, seq, heads * dim))
        out = b.view(out_arg, (batch, seq, heads, dim))
        v_cache = b.view(v_arg, (batch, kv_heads, tiles * TILE, dim))
        rows = b.let("rows", seq * group)
        row_tiles = b.let("row_tiles", (rows + (height - 1)) // height)
        past = b.let("past", kv_len - seq)

        def task(index: Expr) -> None:
            # Early queries see few positions and late ones many: alternate, so that neighbouring tasks even out.
            pair = b.let("pair", index // (batch * kv_heads))
            row_tile = b.let("row_tile", T.Select(pair % 2 == 0, pair // 2, row_tiles - 1 - pair // 2))
            sequence = b.let("sequence", index // kv_heads % batch)
            kv_head = b.let("kv_head", index % kv_heads)
            first = b.let("first", rows * row_tile // row_tiles)
            count = b.let("count", rows * (row_tile + 1) // row_tiles - first)

            queries, scores, sums = b.local((height, dim)), b.local((height, GRANULE)), b.local((height, dim))
            weight, top, largest = b.local((height, LANES)), b.local((height,)), b.local((LANES,))

            with T.serial(count) as r:
                token, head = (first + r) // group, kv_head * group + (first + r) % group

                def begin(at: Expr, n: int, r: Expr = r, token: Expr = token, head: Expr = head) -> None:
                    value = b.load(q, sequence, token, head, at, lanes=n) * b.splat(problem.scale, n)
                    b.store(queries, value, r, at, lanes=n)
                    b.store(sums, b.splat(0.0, n), r, at, lanes=n)

                b.sweep(dim, begin)
                b.put(top, T.float32(_MASKED), r)
                b.store(weight, b.splat(0.0), r, 0)

            end = b.let("end", past + (first + count - 1) // group + 1)
            begin_at = (
                T.max(past + first // group - (problem.window - 1), 0) if problem.window else T.int64(0)
            )
            begin_block = b.let("begin_block", begin_at // GRANULE)

            def score(n: int, block: Expr) -> None:
                """scores[:n] = queries[:n] . keys of the block, `step` tiles at a time."""
                with T.serial(GRANULE // TILE // step) as s:
                    acc = b.Registers(n, b.chunks(step * TILE))
                    acc.clear()
                    with T.serial(dim) as channel:
                        for r, t, _, _ in acc:
                            at = block * (GRANULE // TILE) + s * step + t
                            keys = b.load(k_cache, sequence, kv_head, at, channel, 0)
                            acc.set(r, t, acc.get(r, t) + b.splat(queries[r, channel]) * keys)
                    for r, t, _, _ in acc:
                        b.store(scores, acc.get(r, t), r, (s * step + t) * TILE)

            def softmax(r: Expr, block: Expr) -> None:
                """scores[r] becomes exp(scores[r] - max), and what was summed before is scaled to the new maximum."""
                last = b.let("last", T.cast(past + (first + r) // group - block * GRANULE, "int32"))
                b.store(largest, b.splat(_MASKED), 0)
                for at in range(0, GRANULE, LANES):
                    lane = T.ramp(T.int32(at), 1, LANES)
                    visible = lane <= T.broadcast(last, LANES)
                    if problem.window:
                        visible = T.And(visible, lane > T.broadcast(last - problem.window, LANES))
                    masked = b.let("masked", T.Select(visible, b.load(scores, r, at), b.splat(_MASKED)))
                    b.store(scores, masked, r, at)
                    b.store(largest, T.max(b.load(largest, 0), masked), 0)
                maximum = b.let("maximum", T.max(top[r], b.reduce_lanes(largest, (), T.max)))
                rescale = b.let("rescale", exp(top[r] - maximum))
                b.put(top, maximum, r)
                total = b.load(weight, r, 0) * b.splat(rescale)
                for at in range(0, GRANULE, LANES):
                    p = b.let("p", exp(b.load(scores, r, at) - b.splat(maximum)))
                    b.store(scores, p, r, at)
                    total = total + p
                b.store(weight, total, r, 0)
                b.sweep(
                    dim,
                    lambda at, n: b.store(
                        sums, b.load(sums, r, at, lanes=n) * b.splat(rescale, n), r, at, lanes=n
                    ),
                )

            def accumulate(n: int, block: Expr, visible: Expr) -> None:
                """sums[:n] += scores[:n] @ values of the block, as many channels at once as registers hold."""
                vectors = b.chunks(dim)
                at_once = max(1, machine.accumulators // n)
                for group_start in range(0, len(vectors), at_once):
                    acc = b.Registers(n, vectors[group_start : group_start + at_once])
                    for r, index, start, lanes in acc:
                        acc.set(r, index, b.load(sums, r, start, lanes=lanes))
                    with T.serial(visible) as j:
                        for r, index, start, lanes in acc:
                            values = b.load(
                                v_cache, sequence, kv_head, block * GRANULE + j, start, lanes=lanes
                            )
                            acc.set(r, index, acc.get(r, index) + b.splat(scores[r, j], lanes) * values)
                    for r, index, start, lanes in acc:
                        b.store(sums, acc.get(r, index), r, start, lanes=lanes)

            with T.serial((end - 1) // GRANULE + 1 - begin_block) as i:
                block = b.let("block", begin_block + i)
                visible = b.let("visible", T.min(end - block * GRANULE, T.int64(GRANULE)))
                for n in range(1, height + 1):
                    with b.when(count == n):
                        score(n, block)
                with T.serial(count) as r:
                    softmax(r, block)
                for n in range(1, height + 1):
                    with b.when(count == n):
                        accumulate(n, block, visible)

            with T.serial(count) as r:
                token, head = (first + r) // group, kv_head * group + (first + r) % group
                inverse = b.let("inverse", T.float32(1) / b.reduce_lanes(weight, (r,), lambda x, y: x + y))

                def finish(
                    at: Expr, n: int, r: Expr = r, token: Expr = token, head: Expr = head, by: Expr = inverse
                ) -> None:
                    b.store(
                        out, b.load(sums, r, at, lanes=n) * b.splat(by, n), sequence, token, head, at, lanes=n
                    )

                b.sweep(dim, finish)

        b.tasks(batch * kv_heads * row_tiles, task)

    return tag(b.prim_func(problem.name, emit), problem)
