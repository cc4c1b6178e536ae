"""The kernel that rotates queries and keys, and appends keys and values to the KV cache."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import CACHE_DTYPES, MOST, TILE, cache_tensors
from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.codes import Channels, inverse_of, largest_of, rounded
from relax_llm.kernels.halves import to_bf16
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.problem import Problem, require_positive, tag

_SERIAL = 1 << 12
"""One core does all up to this many elements."""


def require_cache_format(format: str) -> None:
    """Refuse a problem over caches in a format that there is not.

    Raises:
        KernelError: It is not known.
    """
    if format not in CACHE_DTYPES:
        raise KernelError(f"The cache format {format!r} is not known; known: {', '.join(CACHE_DTYPES)}.")


def position_bytes(format: str, head_dim: int) -> int:
    """Bytes of a position's key or value in one head."""
    scale = 4 if format == "q8" else 0
    return np.dtype(CACHE_DTYPES[format]).itemsize * head_dim + scale


def declare_cache(format: str, batch: Expr, kv_heads: int, tiles: Expr, head_dim: int) -> dict[str, Expr]:
    """Declare a layer's cache as the next arguments, by name."""
    return {
        tensor.name: b.argument(tensor.name, tensor.shape, tensor.dtype)
        for tensor in cache_tensors(format, batch, kv_heads, tiles, head_dim)
    }


@dataclass(frozen=True)
class Append(Problem):
    """Rotate queries and keys, and append keys and values to the cache in place.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        rope: Rotate queries and keys by the step's rope table; channels i and i + head_dim / 2 are a pair.
        cache: Format of the caches; a key of `relax_llm.artifact.kv_cache.CACHE_DTYPES`.
    """

    operator: ClassVar[str] = "append"
    heads: int
    kv_heads: int
    head_dim: int
    rope: bool = True
    cache: str = "f32"

    def __post_init__(self) -> None:
        require_positive(self, "heads", "kv_heads", "head_dim")
        require_cache_format(self.cache)
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
        written = 4 * self.heads * self.head_dim + 2 * self.kv_heads * position_bytes(
            self.cache, self.head_dim
        )
        return f"{4 * self.width + written}*batch*seq + {4 * self.head_dim * self.rope}*seq"


def append(problem: Append, machine: Machine) -> PrimFunc:
    """qkv [batch, seq, width], (rope [seq, 2, dim/2]), the cache, kv_len -> q [batch, seq, heads, dim].

    Writes positions kv_len - seq ... kv_len - 1 of the caches, which the caller has made large enough. A task has a
    tile of the cache and a key head, with the query heads that share it: two positions may lie in one word.
    """
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    group, half = heads // kv_heads, dim // 2

    def emit() -> None:
        batch, seq, tiles = b.size("batch"), b.size("seq"), b.size("tiles")
        qkv_arg = b.argument("qkv", (batch, seq, problem.width))
        rope = b.argument("rope", (seq, 2, half)) if problem.rope else None
        cache = declare_cache(problem.cache, batch, kv_heads, tiles, dim)
        kv_len = b.scalar("kv_len")
        q_arg = b.argument("q", (batch, seq, heads, dim))
        rows = batch * seq
        qkv = b.view(qkv_arg, (rows, heads + 2 * kv_heads, dim))
        q = b.view(q_arg, (rows, heads, dim))
        k_cache, v_cache = cache["k_cache"], cache["v_cache"]
        if problem.cache != "f32":  # as words of two
            word = f"uint{16 * np.dtype(CACHE_DTYPES[problem.cache]).itemsize}"
            k_cache, v_cache = (b.view(x, x.shape[:-1], word) for x in (k_cache, v_cache))
        past = b.let("past", kv_len - seq)
        first_tile = b.let("first_tile", past // TILE)
        written = b.let("written", (kv_len + (TILE - 1)) // TILE - first_tile)

        def task(index: Expr) -> None:
            # Heads of a tile follow each other: of the tokens' rows each has a part, which is near the next one's.
            of_sequence = b.let("of_sequence", index // kv_heads)
            head = b.let("head", index - of_sequence * kv_heads)
            sequence = b.let("sequence", of_sequence // written)
            tile = b.let("tile", first_tile + (of_sequence - sequence * written))
            begin = b.let("begin", T.max(past, tile * TILE))
            end = b.let("end", T.min(kv_len, (tile + 1) * TILE))
            key = b.local((LANES * -(-dim // LANES),))

            with T.serial(end - begin) as own:
                position = b.let("position", begin + own)
                token, lane = b.let("token", position - past), b.let("lane", position - tile * TILE)
                row = b.let("row", sequence * seq + token)

                def rotated(head: Expr, target: Expr, at: tuple[Expr, ...]) -> None:
                    for start, n in b.chunks(half):
                        cos = b.load(rope, token, 0, start, lanes=n)
                        sin = b.load(rope, token, 1, start, lanes=n)
                        first = b.let("first", b.load(qkv, row, head, start, lanes=n))
                        second = b.let("second", b.load(qkv, row, head, start + half, lanes=n))
                        b.store(target, first * cos - second * sin, *at, start, lanes=n)
                        b.store(target, second * cos + first * sin, *at, start + half, lanes=n)

                def copied(head: Expr, target: Expr, at: tuple[Expr, ...]) -> None:
                    for start, n in b.chunks(dim):
                        b.store(target, b.load(qkv, row, head, start, lanes=n), *at, start, lanes=n)

                move = rotated if problem.rope else copied
                with T.serial(group) as member:
                    move(head * group + member, q, (row, head * group + member))
                move(heads + head, key, ())
                value, place = heads + kv_heads + head, (sequence, head, tile)

                def channels(start: int, n: int) -> Expr:
                    return b.load(qkv, row, value, start, lanes=n)

                if problem.cache == "f32":
                    _scatter(key, k_cache, place, lane, dim)
                    copied(value, v_cache, (*place, lane))
                    return

                def stored(side: str, channels: Channels) -> Channels:
                    if problem.cache == "bf16":
                        return _as_bf16(channels)
                    scale, codes = _as_codes(channels, dim)
                    b.put(cache[f"{side}_scale"], scale, *place, lane)
                    return codes

                keys = stored("k", lambda start, n: b.load(key, start, lanes=n))
                _append_key(keys, k_cache, place, lane, dim)
                _append_value(stored("v", channels), v_cache, (*place, lane // 2), lane % 2, dim)

        b.tasks(batch * kv_heads * written, task, serial_if=rows * problem.width <= _SERIAL, name="tile")

    return tag(b.prim_func(problem.name, emit), problem)


def _scatter(key: Expr, k_cache: Expr, tile: tuple[Expr, ...], lane: Expr, dim: int) -> None:
    """Write the channels of a key to one lane."""
    with T.serial(dim) as channel:
        b.put(k_cache, key[channel], *tile, channel, lane)


def _as_bf16(channels: Channels) -> Channels:
    """Channels rounded to bf16: their bits."""
    return lambda start, n: T.shift_right(to_bf16(channels(start, n), n), _all("uint32", 16, n))


def _as_codes(channels: Channels, dim: int) -> tuple[Expr, Channels]:
    """The scale of a key or value in q8, not finite where a channel is not, and the bits of its codes."""
    largest = largest_of(dim, channels)
    inverse = b.let("inverse", inverse_of(largest, MOST))

    def codes(start: int, n: int) -> Expr:
        return T.Cast(b.vector_type("uint8", n), rounded(channels(start, n) * b.splat(inverse, n), n))

    return T.reinterpret("float32", largest) / T.float32(MOST), codes


def _append_key(key: Channels, k_cache: Expr, tile: tuple[Expr, ...], lane: Expr, dim: int) -> None:
    """Write the bits of a key to the words of one lane; the channel behind an odd last one is 0."""
    word, half = _words(k_cache)
    bits = b.local((2 * -(-dim // 2),), word)
    if dim % 2:
        b.put(bits, T.Cast(word, T.int32(0)), dim)
    for start, n in b.chunks(dim):
        b.store(bits, T.Cast(b.vector_type(word, n), key(start, n)), start, lanes=n)
    with T.serial(-(-dim // 2)) as index:
        low, high = (bits[2 * index + which] for which in range(2))
        b.put(k_cache, T.bitwise_or(low, T.shift_left(high, _all(word, half))), *tile, index, lane)


def _append_value(value: Channels, v_cache: Expr, at: tuple[Expr, ...], odd: Expr, dim: int) -> None:
    """Write the bits of a value to one half of each of its words; the other position's half stays."""
    word, half = _words(v_cache)
    low = (1 << half) - 1

    def write(*, second: bool) -> None:
        for start, n in b.chunks(dim):
            new, old = T.Cast(b.vector_type(word, n), value(start, n)), b.load(v_cache, *at, start, lanes=n)
            kept = T.bitwise_and(old, _all(word, low if second else low << half, n))
            placed = T.shift_left(new, _all(word, half, n)) if second else new
            b.store(v_cache, T.bitwise_or(kept, placed), *at, start, lanes=n)

    b.either(odd == 1, lambda: write(second=True), lambda: write(second=False))


def _words(cache: Expr) -> tuple[str, int]:
    """The type of a cache's words of two, and the bits of one."""
    word = str(cache.dtype)
    return word, 4 * np.dtype(word).itemsize


def _all(dtype: str, value: int, lanes: int = 1) -> Expr:
    return b.splat(tirx.const(value, dtype), lanes)
