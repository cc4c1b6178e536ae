"""Causal attention over the KV cache: softmax(q k^T * scale) v, streamed over blocks of positions.

Query heads that share a key head share its loads. What is done with a block is in `kernels.streaming`; here is how
launches are cut into tasks.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import TILE
from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.cache import declare_cache, position_bytes, require_cache_format
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.problem import Problem, require_positive, tag
from relax_llm.kernels.streaming import BLOCK, Tile

_TOGETHER = 4
"""Tiles of rows, at most, that a task takes through the cache together: a block comes from memory once for all."""

_TASKS = 16
"""Tasks have fewer tiles where there would be fewer tasks than this."""

_FEW = 16
"""Up to this many tiles in a launch, a task has one block of one tile."""

_SERIAL = 3000
"""One core does all up to this many products of a position and a row; of loading a position, as long as 8 rows take."""

_SERIAL_MERGES = 2000
"""One core does all up to this many merges of a row."""


@dataclass(frozen=True)
class Attention(Problem):
    """Attention of the step's queries to the cache.

    Attributes:
        heads: Query heads; heads / kv_heads of them share each key and value head.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        scale: Factor on the scores before the softmax.
        window: A query at position i sees positions above i - window only; None sees all.
        cache: Format of the caches; where it is not "f32", queries and softmax weights may be rounded to it, too.
    """

    operator: ClassVar[str] = "attention"
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    cache: str = "f32"

    def __post_init__(self) -> None:
        require_positive(
            self, "heads", "kv_heads", "head_dim", *(("window",) if self.window is not None else ())
        )
        require_cache_format(self.cache)
        if self.heads % self.kv_heads:
            raise KernelError(f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly.")

    @property
    def flops(self) -> str:
        return f"{4 * self.heads * self.head_dim}*batch*seq*{self._seen}"

    @property
    def bytes(self) -> str:
        cache = f"{2 * self.kv_heads * position_bytes(self.cache, self.head_dim)}*batch*kv_len"
        return f"{cache} + {8 * self.heads * self.head_dim}*batch*seq"

    @property
    def _seen(self) -> str:
        mean = "(kv_len - (seq - 1)/2)"
        return mean if self.window is None else f"min({self.window}, {mean})"


def attention(problem: Attention, machine: Machine) -> PrimFunc:
    """q [batch, seq, heads, head_dim], the cache, kv_len -> out [batch, seq, heads * head_dim].

    Rows are pairs of a query and a head of those that share a key head. They are cut into tiles, and positions into
    blocks. Where tiles are many, a task takes some of them through all blocks that they see. Where they are few, as in
    decoding, a task has one block of one tile, and what tasks leave is merged in the order of the blocks. Both ways
    give the same bits.
    """
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    group, window, shape = heads // kv_heads, problem.window, Tile(dim, machine, problem.cache)
    height = shape.rows

    def emit() -> None:
        batch, seq, tiles = b.size("batch"), b.size("seq"), b.size("tiles")
        q = b.argument("q", (batch, seq, heads, dim))
        cache = declare_cache(problem.cache, batch, kv_heads, tiles, dim)
        kv_len = b.scalar("kv_len")
        out_arg = b.argument("out", (batch, seq, heads * dim))

        out = b.view(out_arg, (batch, seq, heads, dim))
        pairs = batch * kv_heads  # of a sequence and a key head
        keys, values = (
            b.view(cache[name], (pairs, tiles * elements), shape.stored)
            for name, elements in (("k_cache", shape.stored_keys), ("v_cache", shape.stored_values))
        )
        scales = [b.view(cache[name], (pairs, tiles * TILE)) for name in cache if name.endswith("scale")]
        rows, past = b.let("rows", seq * group), b.let("past", kv_len - seq)
        row_tiles = b.let("row_tiles", _ceil(seq * group, height))
        first_block = b.let(
            "first_block", _floor(T.max(past - (window - 1), 0), BLOCK) if window else T.int64(0)
        )
        blocks = b.let("blocks", _ceil(kv_len, BLOCK) - first_block)

        def rows_of(tile: Expr) -> _Rows:
            first = b.let("first", tile * height)
            count = b.let("count", T.min(rows - first, T.int64(height)))
            earliest, latest = past + _floor(first, group), past + _floor(first + count - 1, group)
            begin = T.max(earliest - (window - 1), 0) if window else T.int64(0)
            return _Rows(
                first,
                count,
                b.let("earliest", earliest),
                b.let("latest", latest),
                b.let("begin", begin),
            )

        def place(pair: Expr, row: Expr) -> tuple[Expr, Expr, Expr]:
            """The sequence, query and head of a row."""
            token, sequence = b.let("token", _floor(row, group)), b.let("sequence", _floor(pair, kv_heads))
            return (
                sequence,
                token,
                b.let("head", (pair - sequence * kv_heads) * group + (row - token * group)),
            )

        def take(pair: Expr, own: _Rows, queries: Expr, at: Expr) -> None:
            """Copy the queries of a tile, scaled; the last one again for rows that it lacks."""
            with T.serial(height) as r:
                from_row = place(pair, b.let("row", own.first + T.min(r, own.count - 1)))
                shape.take(
                    lambda start, n: b.load(q, *from_row, start, lanes=n) * b.splat(problem.scale, n),
                    queries,
                    (at, r * shape.query_words),
                )

        def finish(pair: Expr, own: _Rows, partials: Expr, at: Expr) -> None:
            """Divide the sums by those of the weights."""
            with T.serial(own.count) as r:
                to_row = place(pair, b.let("row", own.first + r))
                total = b.fold(b.let("total", b.load(partials, at, shape.weights_at(r))), operator.add)
                inverse = b.let("inverse", T.float32(1) / total)
                for start, n in b.chunks(dim):
                    value = b.load(partials, at, shape.values_at(r) + start, lanes=n)
                    b.store(out, value * b.splat(inverse, n), *to_row, start, lanes=n)

        def attend(
            pair: Expr,
            own: _Rows,
            block: Expr,
            queries: Expr,
            memory: _Memory,
            partial: Callable[[Expr], Expr],
        ) -> None:
            """The partial of a tile over what it sees of a block."""
            after = b.let("after", (block + 1) * BLOCK)
            start = b.let("start", T.max(block * BLOCK, _floor(own.begin, TILE) * TILE))
            positions = b.let("positions", T.min(own.latest + 1, after) - start)
            count = b.let("tiles", _ceil(positions, TILE))
            first_tile = b.let("first_tile", _floor(start, TILE))
            key_scales, value_scales = [], []
            if memory.unpacked is None:
                key = T.address_of(keys[pair, first_tile * shape.key_words])
                value = T.address_of(values[pair, first_tile * shape.value_words])
                asked = value, following(keys, shape.stored_keys, pair, block)
            else:
                asked = tuple(
                    following(cache, elements, pair, block)
                    for cache, elements in ((keys, shape.stored_keys), (values, shape.stored_values))
                )
                slot = b.let("in_block", first_tile - block * (BLOCK // TILE))
                key = memory.unpacked.keys(slot * shape.key_words)
                value = memory.unpacked.values(slot * shape.value_words)
                key_scales, value_scales = (
                    [T.address_of(kept[slot * TILE])] for kept in memory.unpacked.scales
                )
            scores, weights = memory.scores, memory.weights
            b.call(shape.scores, own.count, queries, key, asked[0], *key_scales, scores, count)
            hidden = own.earliest - start < count * TILE - 1
            if window:
                hidden = T.Or(hidden, own.latest - start >= window)
            with b.when(hidden):
                b.call(shape.mask(group, window), own.count, scores, own.first, past - start, count)
            places = [scores, weights] if shape.pairs else [scores]
            b.call(shape.weights, own.count, *places, *value_scales, partial(0), count)
            sums = partial(shape.values_at(0))
            b.call(shape.weighted, own.count, weights, value, asked[1], sums, positions)

        def following(cache: Expr, elements: int, pair: Expr, block: Expr) -> Expr:
            """What is read next of keys or values: those of the block behind this one, or of the next head's first."""
            after = b.let("after", (block + 1) * BLOCK)
            more = b.let("more", T.Cast("int64", after < kv_len))
            next_pair = T.min(pair + 1 - more, pairs - 1)
            next_tile = _floor(first_block * BLOCK + more * (after - first_block * BLOCK), TILE)
            return T.address_of(cache[next_pair, next_tile * elements])

        def unpack(pair: Expr, block: Expr, begin: Expr, latest: Expr, memory: _Unpacked) -> None:
            """Unpack what is seen of a block, from the positions `begin` to `latest`, to its place there."""
            first = b.let("first_tile", T.max(block * (BLOCK // TILE), _floor(begin, TILE)))
            end = T.min((block + 1) * (BLOCK // TILE), _ceil(latest + 1, TILE))
            count = b.let("tiles", end - first)
            slot = b.let("in_block", first - block * (BLOCK // TILE))
            key = T.address_of(keys[pair, first * shape.stored_keys])
            value = T.address_of(values[pair, first * shape.stored_values])
            b.call(shape.unpack(dim, TILE), key, memory.keys(slot * shape.key_words), count)
            b.call(shape.unpack(TILE, dim), value, memory.values(slot * shape.value_words), count)
            for scale, kept in zip(scales, memory.scales, strict=True):
                with T.serial(count) as tile:
                    at = b.let("at", (first + tile) * TILE)
                    position, after = T.ramp(T.cast(at, "int32"), 1, LANES), T.cast(kv_len, "int32")
                    there = position < T.broadcast(after, LANES)
                    known = T.Select(there, b.load(scale, pair, at), b.splat(0.0))
                    b.store(kept, known, (slot + tile) * TILE)
                b.store(kept, b.splat(0.0), (slot + count) * TILE)

        def through_all_blocks() -> None:
            wanted = T.max(_ceil(row_tiles, _TOGETHER), T.truncdiv(pairs + (_TASKS - 1), pairs))
            groups = b.let("groups", T.min(row_tiles, _ceil(wanted, 4) * 4))

            def task(index: Expr) -> None:
                pair = b.let("pair", T.truncdiv(index, groups))
                turn = b.let("turn", index - pair * groups)
                # Early queries see few positions and late ones many: alternate, so that neighbouring tasks even out,
                # in each half of a key head's, too.
                half = _floor(turn, 2)
                part = b.let("part", T.Select(turn - 2 * half == 0, half, groups - 1 - half))
                start = b.let("start", T.truncdiv(row_tiles * part, groups))
                own = b.let("own", T.truncdiv(row_tiles * (part + 1), groups) - start)
                queries = b.stack((_TOGETHER, height * shape.query_words), dtype=shape.query_dtype)
                memory = _Memory.of(shape)
                partials = b.stack((_TOGETHER + 1, shape.partial))  # one for each tile, and one to be merged
                with T.serial(own) as i:
                    take(pair, rows_of(start + i), queries, i)
                begin, latest = rows_of(start).begin, rows_of(start + own - 1).latest
                first, last = b.let("first", _floor(begin, BLOCK)), b.let("last", _floor(latest, BLOCK))
                with T.serial(last + 1 - first) as number:
                    block = b.let("block", first + number)
                    if memory.unpacked:
                        unpack(pair, block, begin, latest, memory.unpacked)
                    with T.serial(own) as i:
                        these = rows_of(start + i)
                        with b.when(these.sees(block)):
                            opens = these.begin >= block * BLOCK
                            slot = b.let("slot", T.if_then_else(opens, i, T.int64(_TOGETHER)))
                            partial = _addresses(partials, slot)
                            attend(pair, these, block, T.address_of(queries[i, 0]), memory, partial)
                            with b.when(slot != i):
                                b.call(shape.merge, _addresses(partials, i)(0), partial(0), these.count)
                with T.serial(own) as i:
                    finish(pair, rows_of(start + i), partials, i)

            b.tasks(pairs * groups, task)

        def each_block_alone() -> None:
            # Memory is taken before anything else, so its size follows from the arguments alone.
            wanted = pairs * _ceil(seq * group, height)
            partials = b.scratch(
                (T.Select(wanted <= _FEW, wanted * _ceil(kv_len, BLOCK), T.int64(1)), shape.partial)
            )

            def work(index: Expr) -> None:
                pair_block = b.let("pair_block", T.truncdiv(index, row_tiles))
                pair = b.let("pair", T.truncdiv(pair_block, blocks))
                block = b.let("block", first_block + pair_block - pair * blocks)
                queries = b.stack((1, height * shape.query_words), dtype=shape.query_dtype)
                memory = _Memory.of(shape)
                these = rows_of(index - pair_block * row_tiles)
                with b.when(these.sees(block)):
                    take(pair, these, queries, T.int64(0))
                    if memory.unpacked:
                        unpack(pair, block, these.begin, these.latest, memory.unpacked)
                    partial = _addresses(partials, index)
                    attend(pair, these, block, T.address_of(queries[0, 0]), memory, partial)

            def merge(index: Expr) -> None:
                pair = b.let("pair", T.truncdiv(index, row_tiles))
                tile = b.let("tile", index - pair * row_tiles)
                these = rows_of(tile)
                begin, last = b.let("begin", _floor(these.begin, BLOCK)), _floor(these.latest, BLOCK)
                at = b.let("at", (pair * blocks + begin - first_block) * row_tiles + tile)
                with T.serial(last - begin) as number:
                    following = b.let("following", at + (number + 1) * row_tiles)
                    b.call(
                        shape.merge,
                        _addresses(partials, at)(0),
                        _addresses(partials, following)(0),
                        these.count,
                    )
                finish(pair, these, partials, at)

            small = pairs * kv_len * (rows + 8) <= _SERIAL
            b.tasks(pairs * blocks * row_tiles, work, serial_if=small)
            b.tasks(pairs * row_tiles, merge, serial_if=pairs * rows * blocks <= _SERIAL_MERGES)

        b.either(pairs * row_tiles <= _FEW, each_block_alone, through_all_blocks)

    return tag(b.prim_func(problem.name, emit), problem)


@dataclass(frozen=True)
class _Rows:
    """A tile of rows.

    Attributes:
        first: Its first.
        count: How many.
        earliest: Position of the first query.
        latest: Position of the last.
        begin: The first position that one of them sees.
    """

    first: Expr
    count: Expr
    earliest: Expr
    latest: Expr
    begin: Expr

    def sees(self, block: Expr) -> Expr:
        """Whether one of them sees something of a block."""
        return T.And(block * BLOCK <= self.latest, (block + 1) * BLOCK > self.begin)


@dataclass(frozen=True)
class _Unpacked:
    """A block of keys and values as they are multiplied, and their scales.

    Attributes:
        words: [2, words of a block].
        scales: Of keys and of values, [BLOCK + TILE] each, 0 where there is no position.
    """

    words: Expr
    scales: tuple[Expr, Expr]

    @staticmethod
    def of(shape: Tile) -> "_Unpacked":
        """New memory of a task."""
        tiles = BLOCK // TILE
        words = b.scratch((2, tiles * max(shape.key_words, shape.value_words)), shape.words)
        return _Unpacked(words, (b.stack((BLOCK + TILE,)), b.stack((BLOCK + TILE,))))

    def keys(self, at: Expr) -> Expr:
        """The address of a word of the keys."""
        return T.address_of(self.words[0, at])

    def values(self, at: Expr) -> Expr:
        """The address of a word of the values."""
        return T.address_of(self.words[1, at])


@dataclass(frozen=True)
class _Memory:
    """What a task has for a block: addresses of the scores of a tile, and of the weights that they become.

    Attributes:
        scores: [rows, BLOCK].
        weights: The same, or words.
        unpacked: For caches that are codes.
    """

    scores: Expr
    weights: Expr
    unpacked: _Unpacked | None

    @staticmethod
    def of(shape: Tile) -> "_Memory":
        """New memory of a task."""
        unpacked = _Unpacked.of(shape) if shape.codes else None
        scores = T.address_of(b.stack((shape.rows * BLOCK,))[0])
        if not shape.pairs:
            return _Memory(scores, scores, unpacked)
        return _Memory(scores, T.address_of(b.stack((shape.rows * BLOCK // 2,), dtype="int32")[0]), unpacked)


def _addresses(rows: Expr, row: Expr) -> Callable[[Expr], Expr]:
    """What gives the address of an element of a row."""
    return lambda at: T.address_of(rows[row, at])


def _floor(count: Expr, size: int) -> Expr:
    return T.truncdiv(count, T.int64(size))


def _ceil(count: Expr, size: int) -> Expr:
    return T.truncdiv(count + (size - 1), T.int64(size))
