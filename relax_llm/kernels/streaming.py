"""Softmax attention of a tile of queries to a block of positions, in functions that the kernels of a library share.

A *partial* is what a softmax over some positions leaves of each row: the largest score, the sum of the weights
relative to it, and the sum of the values by these weights. Partials of neighbouring positions are merged by bringing
them to one largest score (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022).

Positions are cut into blocks at the same places whatever the queries are, a block's partial is computed from nothing
but the block, and partials are merged in ascending order, by one function. So a row's result has the same bits
whichever rows are beside it, and whichever core works on which block.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

from tvm import ir
from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import TILE
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.halves import pair_of_bf16, pair_of_floats
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.intrinsics import BF16, dot_bf16, imported, round_bf16
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.shape import tile_for
from relax_llm.kernels.vectormath import exp_nonpositive

BLOCK = 128
"""Positions in a block: so many that merging is no work, so few that the keys and values stay in a core's caches."""

_LOWEST = -1.0e30
"""The largest score of no positions. Finite, so that differences from it are no NaN."""

_HIDDEN = -3.0e38
"""The score of a position that a row does not see: its weight is 0 even beside `_LOWEST`."""

_HEIGHTS = (1, 2, 3, 4, 6, 8, 10)
"""Rows for which there are functions, beside the most. Others take the next, and compute rows that nobody reads."""

_UNROLL = 2  # steps in a turn of a loop
_PAIR = 2  # tiles of scores that become weights at once
_MOST = 4  # vectors of a row that are summed at once, at most
_FAR = 1 << 20  # where a function does not know how much memory an address has


@dataclass(frozen=True)
class Tile:
    """A tile of rows, which are queries of heads that share a key head.

    A cache in bf16 is read as words of two: two channels of a key, two positions of a value. Where the processor
    multiplies pairs of bf16, queries and weights are rounded to such words, too; else words are widened.

    Codes of q8 are unpacked to words first, once for all tiles of a task: to pairs of bf16, which hold them exactly,
    or to f32. Their scales are left to the scores, and to the weights.

    Attributes:
        dim: Channels of a head.
        machine: What code is generated for.
        cache: Format of the caches.
    """

    dim: int
    machine: Machine
    cache: str = "f32"

    @property
    def codes(self) -> bool:
        """Whether the caches are unpacked before they are multiplied, and have scales."""
        return self.cache == "q8"

    @property
    def halves(self) -> bool:
        """Whether what is multiplied are words of two."""
        return self.cache == "bf16" or (self.codes and self.machine.features >= BF16)

    @property
    def pairs(self) -> bool:
        """Whether pairs are multiplied as they are."""
        return self.halves and self.machine.features >= BF16

    @property
    def words(self) -> str:
        """What is multiplied with queries and weights."""
        return "int32" if self.halves else "float32"

    @property
    def key_words(self) -> int:
        """Words of a tile of keys."""
        return TILE * (-(-self.dim // 2) if self.halves else self.dim)

    @property
    def value_words(self) -> int:
        """Words of a tile of values."""
        return TILE * self.dim // (2 if self.halves else 1)

    @property
    def stored(self) -> str:
        """What the caches are read as."""
        return "int8" if self.codes else self.words

    @property
    def stored_keys(self) -> int:
        """Elements of a tile of keys in its cache."""
        return TILE * self.dim if self.codes else self.key_words

    @property
    def stored_values(self) -> int:
        """Elements of a tile of values in its cache."""
        return TILE * self.dim if self.codes else self.value_words

    @property
    def query_words(self) -> int:
        """Elements of a query, as many as there are in a key, or in whole vectors of pairs."""
        if self.pairs:
            return LANES * -(-self.dim // (2 * LANES))
        return self.dim + self.dim % 2 if self.halves else self.dim

    @property
    def query_dtype(self) -> str:
        """Their type."""
        return "int32" if self.pairs else "float32"

    def take(self, query: Callable[[int, int], Expr], target: Expr, at: tuple[Expr, ...]) -> None:
        """Emit what writes a query in the form in which it is multiplied.

        Args:
            query: Gives some channels, from their first and their number.
            target: Where to.
            at: Its first element.
        """
        *outer, first = at
        if not self.pairs:
            for start, n in b.chunks(self.dim):
                b.store(target, query(start, n), *outer, first + start, lanes=n)
            if self.query_words > self.dim:
                b.put(target, T.float32(0), *outer, first + self.dim)
            return
        whole = b.local((2 * self.query_words,))
        for start in range(0, 2 * self.query_words, LANES):
            n = min(LANES, self.dim - start)
            if n < LANES:
                b.store(whole, b.splat(0.0), start)
            if n > 0:
                b.store(whole, query(start, n), start, lanes=n)
        with imported():
            for word in range(0, self.query_words, LANES):
                low, high = (b.load(whole, 2 * word + half) for half in (0, LANES))
                b.store(target, round_bf16(low, high), *outer, first + word)

    @property
    def rows(self) -> int:
        """The most rows: as many as a tile of a matmul has, and no more than a vector has lanes."""
        return min(tile_for(self.machine).rows, LANES)

    @property
    def partial(self) -> int:
        """Elements of a partial: the largest scores in a vector, a vector of weights and the values for each row."""
        return LANES * (1 + self.rows + -(-self.rows * self.dim // LANES))

    def weights_at(self, row: Expr) -> Expr:
        """Where in a partial the sums of a row's weights are, one in each lane of a vector."""
        return LANES + row * LANES

    def values_at(self, row: Expr) -> Expr:
        """Where in a partial the sum of a row's values is."""
        return LANES + self.rows * LANES + row * self.dim

    @property
    def scores(self) -> ir.GlobalVar:
        """Products of queries and tiles of keys, each summed over the channels in ascending order.

        ::

            scores(height, queries [height, dim], keys, ahead, scores [height, BLOCK], tiles)
            scores(height, queries [height, dim], keys, ahead, scales, scores [height, BLOCK], tiles)

        Small tiles wait for memory, and ask for as much of a cache from the address `ahead` on as they use. All of a
        tile's rows must hold numbers, more than `height` of them, too. Codes have `scales`, one for each position.
        """

        def emit(rows: int, queries_at: Expr, keys_at: Expr, ahead_at: Expr, *rest: Expr) -> None:
            *scales_at, out_at, tiles = rest
            scales = memory(scales_at[0], (_FAR, TILE)) if scales_at else None
            steps = -(-self.dim // 2) if self.halves else self.dim
            queries, out = (
                memory(queries_at, (rows, self.query_words), self.query_dtype),
                memory(out_at, (rows, BLOCK)),
            )
            keys = memory(keys_at, (_FAR, steps, TILE), self.words)

            def some(first: Expr, vectors: int) -> None:
                acc = b.Registers(rows, b.chunks(vectors * TILE))

                def step(channel: Expr) -> None:
                    for t in range(vectors if self._waits(rows) else 0):
                        self._ask(ahead_at, ((first + t) * steps + channel) * TILE)
                    for r, t, _, lanes in acc:
                        word = b.load(keys, first + t, channel, 0)
                        acc.set(r, t, self._plus(acc.get(r, t), queries, r, channel, word, lanes))

                acc.clear()
                _in_turns(T.int64(steps), step)
                for r, t, _, _ in acc:
                    score = acc.get(r, t)
                    if scales is not None:
                        score = score * b.load(scales, first + t, 0)
                    b.store(out, score, r, (first + t) * TILE)

            wide = self._wide(rows)
            turns = b.let("turns", T.truncdiv(tiles, T.int64(wide)))
            with T.serial(turns) as turn:
                some(b.let("first", turn * wide), wide)
            if wide > 1:
                with T.serial(tiles - turns * wide) as rest:
                    some(b.let("first", turns * wide + rest), 1)

        return self._by_height(
            "attention_scores",
            {
                "queries": self.query_dtype,
                "keys": self.words,
                "ahead": self.stored,
                **({"scales": "float32"} if self.codes else {}),
                "scores": "float32",
            },
            emit,
        )

    @property
    def weighted(self) -> ir.GlobalVar:
        """Values summed by weights over the positions in ascending order.

        ::

            weighted(height, weights [height, BLOCK], values, ahead, sums [height, dim], positions)
        """

        def emit(
            rows: int, weights_at: Expr, values_at: Expr, ahead_at: Expr, out_at: Expr, positions: Expr
        ) -> None:
            width = BLOCK // 2 if self.pairs else BLOCK
            weights = memory(weights_at, (rows, width), "int32" if self.pairs else "float32")
            out = memory(out_at, (rows, self.dim))
            values = memory(values_at, (_FAR, self.dim), self.words)

            def some(first: Expr, vectors: list[tuple[int, int]]) -> None:
                acc = b.Registers(rows, vectors)

                def step(position: Expr, *, single: bool = False) -> None:
                    for start, _ in vectors if self._waits(rows) else ():
                        self._ask(ahead_at, position * self.dim + first + start)
                    for r, i, start, lanes in acc:
                        value = b.load(values, position, first + start, lanes=lanes)
                        total = self._plus(acc.get(r, i), weights, r, position, value, lanes, single=single)
                        acc.set(r, i, total)

                acc.clear()
                if self.halves:
                    pairs = b.let("pairs", T.truncdiv(positions, T.int64(2)))
                    _in_turns(pairs, step)
                    with b.when(positions > 2 * pairs):  # what lies in the other half is not known
                        step(pairs, single=True)
                else:
                    _in_turns(positions, step)
                for r, i, start, lanes in acc:
                    b.store(out, acc.get(r, i), r, first + start, lanes=lanes)

            wide = self._wide(rows) * LANES
            if self.dim // wide:
                with T.serial(self.dim // wide) as i:
                    some(b.let("first", i * wide), b.chunks(wide))
            if self.dim % wide:
                some(T.int64(self.dim // wide * wide), b.chunks(self.dim % wide))

        return self._by_height(
            "attention_weighted",
            {
                "weights": "int32" if self.pairs else "float32",
                "values": self.words,
                "ahead": self.stored,
                "sums": "float32",
            },
            emit,
        )

    def mask(self, group: int, window: int | None) -> ir.GlobalVar:
        """Take scores away from rows that do not see the position.

        ::

            mask(height, scores [height, BLOCK], first, offset, tiles)

        Row r is a head of query (first + r) // group, which sees the positions up to `offset` more than that, and of
        these only a window. Scores of tiles that all rows see are not touched.
        """

        def emit() -> None:
            height, scores_at = number("height"), pointer("scores")
            first, offset, tiles = number("first"), number("offset"), number("tiles")
            scores = memory(scores_at, (self.rows, BLOCK))
            seen = T.truncdiv(T.max(offset + T.truncdiv(first, T.int64(group)) + 1, 0), T.int64(TILE))
            begin = b.let("begin", seen if window is None else T.int64(0))
            with T.serial(height) as r:
                last = b.let("last", T.cast(offset + T.truncdiv(first + r, T.int64(group)), "int32"))
                with T.serial(tiles - begin) as tile:
                    at = b.let("at", (begin + tile) * TILE)
                    lane = T.ramp(T.cast(at, "int32"), 1, LANES)
                    visible = lane <= T.broadcast(last, LANES)
                    if window is not None:
                        visible = T.And(visible, lane > T.broadcast(last - window, LANES))
                    b.store(scores, T.Select(visible, b.load(scores, r, at), b.splat(_HIDDEN)), r, at)

        return inner(f"attention_mask_group{group}", (self.machine, window), emit, entry=True)

    @property
    def weights(self) -> ir.GlobalVar:
        """Scores become e**(score - largest); the largest scores and the sums of weights go to the partial.

        ::

            weights(height, scores [height, BLOCK], (words [height, BLOCK / 2]), (scales), partial, tiles)

        Weights take the place of the scores; as pairs of bf16 they are written to `words`, and the sum is that of the
        weights before rounding. Codes have `scales`, by which the weights are multiplied, but not those in the sum;
        they must be numbers for an even number of tiles.
        """

        def emit() -> None:
            height, scores_at = number("height"), pointer("scores")
            words_at = pointer("words", "int32") if self.pairs else None
            scales_at = pointer("scales") if self.codes else None
            partial_at, tiles = pointer("partial"), number("tiles")
            scores, partial = memory(scores_at, (self.rows, BLOCK)), memory(partial_at, (self.partial,))
            words = memory(words_at, (self.rows, BLOCK // 2), "int32") if self.pairs else None
            scales = memory(scales_at, (BLOCK,)) if self.codes else None
            with imported() if self.pairs else nullcontext():
                emit_body(height, scores, partial, tiles, words, scales)

        def emit_body(
            height: Expr, scores: Expr, partial: Expr, tiles: Expr, words: Expr | None, scales: Expr | None
        ) -> None:

            def largest(r: Expr, count: int) -> None:
                top = b.local((LANES,))
                b.store(top, b.splat(_LOWEST), 0)
                for at in range(0, count * TILE, LANES):
                    b.store(top, T.max(b.load(top, 0), b.load(scores, r, at)), 0)
                b.put(partial, b.fold(b.load(top, 0), T.max), r)

            def weigh(r: Expr, count: int) -> None:
                top, total = b.let("top", partial[r]), b.local((LANES,))
                b.store(total, b.splat(0.0), 0)
                found = []
                for at in range(0, count * TILE, LANES):
                    weight = b.let("weight", exp_nonpositive(b.load(scores, r, at) - b.splat(top)))
                    b.store(total, b.load(total, 0) + weight, 0)
                    if scales is not None:
                        weight = b.let("scaled", weight * b.load(scales, at))
                    found.append(weight)
                    if words is None:
                        b.store(scores, weight, r, at)
                    elif at % (2 * LANES):
                        b.store(words, round_bf16(*found[-2:]), r, at // (2 * LANES) * LANES)
                b.store(partial, b.load(total, 0), self.weights_at(r))

            b.store(partial, b.splat(_LOWEST), 0)
            odd = b.let("odd", T.truncmod(tiles, T.int64(_PAIR)))
            with b.when(odd != 0), T.serial(height) as r:
                b.store(scores, b.splat(_HIDDEN), r, tiles * TILE)
            for count in range(_PAIR, BLOCK // TILE + 1, _PAIR):
                with b.when(tiles + odd == count):
                    # For all rows first: a processor would wait for each row's, whose lanes depend on each other.
                    with T.serial(height) as r:
                        largest(r, count)
                    with T.serial(height) as r:
                        weigh(r, count)

        return inner(f"attention_weights_d{self.dim}{self._suffix}", (self.machine,), emit, entry=True)

    def unpack(self, rows: int, width: int) -> ir.GlobalVar:
        """Codes as words, for tiles of `rows` rows: pairs of neighbouring rows, or each row as it is.

        ::

            unpack(codes [tiles, rows, width], words, tiles)

        A row behind an odd last one counts as 0.
        """

        def emit() -> None:
            codes_at, words_at = pointer("codes", "int8"), pointer("words", self.words)
            tiles = number("tiles")
            each = -(-rows // 2) if self.halves else rows
            codes, words = (
                memory(codes_at, (_FAR, rows, width), "int8"),
                memory(words_at, (_FAR, each, width), self.words),
            )

            def floats(tile: Expr, row: Expr, start: int, lanes: int) -> Expr:
                kind = "float32" if lanes == 1 else f"float32x{lanes}"
                return T.Cast(kind, b.load(codes, tile, row, start, lanes=lanes))

            def pair(tile: Expr, at: Expr, *, single: bool) -> None:
                for start, lanes in b.chunks(width):
                    low = floats(tile, 2 * at, start, lanes)
                    high = None if single else floats(tile, 2 * at + 1, start, lanes)
                    b.store(words, pair_of_floats(low, high, lanes), tile, at, start, lanes=lanes)

            with T.serial(tiles) as tile:
                if self.halves:
                    with T.serial(rows // 2) as at:
                        pair(tile, at, single=False)
                    if rows % 2:
                        pair(tile, T.int64(rows // 2), single=True)
                else:
                    with T.serial(rows) as row:
                        for start, lanes in b.chunks(width):
                            b.store(words, floats(tile, row, start, lanes), tile, row, start, lanes=lanes)

        kind = "pairs" if self.halves else "floats"
        return inner(f"attention_unpack_{kind}_{rows}x{width}", (self.machine,), emit, entry=True)

    @property
    def _suffix(self) -> str:
        """What tells functions over caches in another format from each other."""
        return "" if self.cache == "f32" else f"_{self.cache}"

    def _plus(
        self,
        total: Expr,
        factors: Expr,
        row: int,
        step: Expr,
        word: Expr,
        lanes: int,
        *,
        single: bool = False,
    ) -> Expr:
        """A vector of sums and the products of a step: of a row's factor, or pair of factors, and of words of a cache.

        Args:
            total: The sums.
            factors: Queries or weights, [rows, ...].
            row: Of the factors.
            step: Of the reduction.
            word: The vector of the cache.
            lanes: How long it is.
            single: Only the first of two counts.
        """
        if not self.halves:
            return total + b.splat(factors[row, step], lanes) * word
        if self.pairs and lanes == LANES:  # the instruction has one length
            known = T.bitwise_and(word, T.broadcast(T.int32(0xFFFF), lanes)) if single else word
            return dot_bf16(total, known, T.broadcast(factors[row, step], lanes))
        for which in range(1 if single else 2):
            factor = pair_of_bf16(factors[row, step], which) if self.pairs else factors[row, 2 * step + which]
            total = total + b.splat(factor, lanes) * pair_of_bf16(word, which, lanes)
        return total

    @property
    def merge(self) -> ir.GlobalVar:
        """The partial of some positions joins that of all before them.

        ::

            merge(before, partial, height)
        """

        def emit() -> None:
            addresses, height = [pointer("before"), pointer("partial")], number("height")
            parts = [memory(at, (self.partial,)) for at in addresses]
            tops = [b.let("top", b.load(part, 0)) for part in parts]
            top = b.let("top", T.max(*tops))
            scales = [b.local((LANES,)) for _ in parts]
            for scale, old in zip(scales, tops, strict=True):
                b.store(scale, exp_nonpositive(old - top), 0)
            b.store(parts[0], top, 0)

            with T.serial(height) as r:

                def join(start: Expr, lanes: int, r: Expr = r) -> None:
                    at = b.let("at", start)
                    old, new = (
                        b.load(part, at, lanes=lanes) * b.splat(scale[r], lanes)
                        for part, scale in zip(parts, scales, strict=True)
                    )
                    b.store(parts[0], old + new, at, lanes=lanes)

                join(self.weights_at(r), LANES)
                for start, lanes in b.chunks(self.dim):
                    join(self.values_at(r) + start, lanes)

        return inner(f"attention_merge_d{self.dim}", (self.machine,), emit, entry=True)

    def _wide(self, rows: int) -> int:
        """How many vectors of each of some rows are summed at once, in registers: a power of two."""
        held = tile_for(self.machine)
        most = min(_MOST, held.rows * held.cols // (LANES * rows))
        return 1 << most.bit_length() - 1

    def _waits(self, rows: int) -> bool:
        """Whether some rows are so few that reading what they are multiplied with takes longer than multiplying."""
        return 3 * rows <= 2 * self.rows

    def _ask(self, ahead: Expr, word: Expr) -> None:
        """Emit what asks for a word from an address in a cache on, or for the codes that it will be."""
        codes = 2 if self.codes and self.halves else 1
        b.prefetch(memory(ahead, (_FAR,), self.stored), word * codes)

    def _by_height(self, name: str, pointers: Mapping[str, str], emit: Callable[..., None]) -> ir.GlobalVar:
        """A function (height, *pointers, count) that calls one for as many rows or more, whose body `emit` writes.

        Args:
            name: What is computed.
            pointers: Names of the addresses, and what is there.
            emit: Writes the body for a number of rows.
        """

        def declared() -> list[Expr]:
            return [*(pointer(one, dtype) for one, dtype in pointers.items()), number("count")]

        def one(rows: int) -> ir.GlobalVar:
            def body() -> None:
                given = declared()
                with imported() if self.pairs else nullcontext():
                    emit(rows, *given)

            return inner(f"{name}_d{self.dim}{self._suffix}_rows{rows}", (self.machine,), body, entry=False)

        def choose() -> None:
            height = number("height")
            given = declared()

            def least(heights: list[int]) -> None:
                if heights[1:]:
                    b.either(
                        height <= heights[0],
                        lambda: b.call(one(heights[0]), *given),
                        lambda: least(heights[1:]),
                    )
                else:
                    b.call(one(heights[0]), *given)

            least([*(rows for rows in _HEIGHTS if rows < self.rows), self.rows])

        return inner(f"{name}_d{self.dim}{self._suffix}", (self.machine,), choose, entry=True)


def _in_turns(count: Expr, step: Callable[[Expr], None]) -> None:
    """Emit a loop over steps, some of them in a turn."""
    turns = b.let("turns", T.truncdiv(count, T.int64(_UNROLL)))
    with T.serial(turns) as turn:
        for u in range(_UNROLL):
            step(turn * _UNROLL + u)
    with T.serial(count - turns * _UNROLL) as rest:
        step(turns * _UNROLL + rest)
