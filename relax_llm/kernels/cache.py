"""The KV cache's layout, and the kernel that appends to it.

Both caches are plain tensors, [batch, kv_heads, tiles, ...], each tile holding `TILE` positions:

- keys [..., head_dim, TILE]: one position per lane, so that scores are computed for `TILE` positions at once without
  reducing across lanes;
- values [..., TILE, head_dim]: one channel per lane, which is what the weighted sum over positions reads.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.problem import Problem, require_positive, tag

TILE = 16
"""Positions in a tile."""

GRANULE = 64
"""Capacities are multiples of this many positions; attention reads whole blocks of it."""

_SERIAL_ROWS = 4


def cache_shapes(
    batch: Any, kv_heads: int, tiles: Any, head_dim: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shapes of the key and the value cache of one layer."""
    return (batch, kv_heads, tiles, head_dim, TILE), (batch, kv_heads, tiles, TILE, head_dim)


@dataclass(frozen=True)
class Append(Problem):
    """Rotate queries and keys, and append keys and values to the cache in place.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        rope: Rotate queries and keys by the step's rope table; channels i and i + head_dim / 2 are a pair.
    """

    operator: ClassVar[str] = "append"
    heads: int
    kv_heads: int
    head_dim: int
    rope: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "heads", "kv_heads", "head_dim")
        if self.heads % self.kv_heads:
            raise KernelError(f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly.")
        if self.rope and self.head_dim % 2:
            raise KernelError(f"Rotation pairs channels, so head_dim must be even, not {self.head_dim}.")

    @property
    def width(self) -> int:
        """Columns of the fused query, key and value projections."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def flops(self) -> str:
        return f"{3 * (self.heads + self.kv_heads) * self.head_dim * self.rope}*batch*seq"

    @property
    def bytes(self) -> str:
        return f"{8 * self.width}*batch*seq + {4 * self.head_dim * self.rope}*seq"


def append(problem: Append, machine: Machine) -> PrimFunc:
    """qkv [batch, seq, width], (rope [seq, 2, dim/2]), k_cache, v_cache, kv_len -> q [batch, seq, heads, dim].

    Writes positions kv_len - seq ... kv_len - 1 of the caches, which the caller has made large enough.
    """
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    half = dim // 2

    def emit() -> None:
        batch, seq, tiles = b.size("batch"), b.size("seq"), b.size("tiles")
        qkv_arg = b.argument("qkv", (batch, seq, problem.width))
        rope = b.argument("rope", (seq, 2, half)) if problem.rope else None
        k_shape, v_shape = cache_shapes(batch, kv_heads, tiles, dim)
        k_cache, v_cache = b.argument("k_cache", k_shape), b.argument("v_cache", v_shape)
        kv_len = b.scalar("kv_len")
        q_arg = b.argument("q", (batch, seq, heads, dim))
        rows = batch * seq
        qkv = b.view(qkv_arg, (rows, heads + 2 * kv_heads, dim))
        q = b.view(q_arg, (rows, heads, dim))

        def task(row: Expr) -> None:
            token = b.let("token", row % seq)
            sequence = b.let("sequence", row // seq)
            position = b.let("position", kv_len - seq + token)
            tile, lane = b.let("tile", position // TILE), b.let("lane", position % TILE)

            def rotated(head: Expr, target: Expr, at: tuple[Expr, ...]) -> None:
                for start, n in b.chunks(half):
                    cos = b.load(rope, token, 0, start, lanes=n)
                    sin = b.load(rope, token, 1, start, lanes=n)
                    first = b.let("first", b.load(qkv, row, head, start, lanes=n))
                    second = b.let("second", b.load(qkv, row, head, start + half, lanes=n))
                    b.store(target, first * cos - second * sin, *at, start, lanes=n)
                    b.store(target, second * cos + first * sin, *at, start + half, lanes=n)

            def copied(head: Expr, target: Expr, at: tuple[Expr, ...]) -> None:
                b.sweep(
                    dim,
                    lambda start, n: b.store(
                        target, b.load(qkv, row, head, start, lanes=n), *at, start, lanes=n
                    ),
                )

            move = rotated if problem.rope else copied
            with T.serial(heads) as head:
                move(head, q, (row, head))
            key = b.local((dim,))
            with T.serial(kv_heads) as head:
                move(heads + head, key, ())
                with T.serial(dim) as channel:
                    b.put(k_cache, key[channel], sequence, head, tile, channel, lane)
                copied(heads + kv_heads + head, v_cache, (sequence, head, tile, lane))

        b.tasks(rows, task, serial_if=rows <= _SERIAL_ROWS, name="row")

    return tag(b.prim_func(problem.name, emit), problem)
