"""The products of a tile, queries with keys and weights with values: sums in registers, a function for each height.

They are like the micro-kernels of a matmul: all kernels of a library with such a tile share them.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

from tvm import ir
from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import TILE
from relax_llm.kernels import builder as b
from relax_llm.kernels.attention.tile import BLOCK, FAR, Tile
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.halves import pair_of_bf16, pair_of_integers
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.intrinsics import dot_bf16, dot_int16, imported
from relax_llm.kernels.machine import LANES
from relax_llm.kernels.matmul.shape import tile_for

_HEIGHTS = (1, 2, 3, 4, 6, 8, 10)
"""Rows for which there are functions, beside the most. Others take the next, and compute rows that nobody reads."""

_UNROLL = 2  # steps in a turn of a loop
_MOST = 4  # vectors of a row that are summed at once, at most


def computed(tile: Tile, height: Expr) -> Expr:
    """How many rows are computed for a height: those of the least function that has as many."""
    *lower, most = _heights(tile)
    rows = T.int64(most)
    for least in reversed(lower):
        rows = T.Select(height <= least, T.int64(least), rows)
    return b.let("computed", rows)


def scores(tile: Tile) -> ir.GlobalVar:
    """The function that multiplies queries with tiles of keys, each sum over the channels in ascending order.

    ::

        scores(height, queries [height, dim], keys, ahead, scores [height, BLOCK], left, jump, tiles)
        scores(height, queries [height, dim], keys, ahead, scales, scores [height, BLOCK], left, jump, tiles)

    Small tiles wait for memory, and ask for as much of a cache as they use: see `Asked`. All rows
    that are `computed` must hold numbers, more than `height` of them, too. Codes have `scales`, one for each position.
    """
    steps = -(-tile.dim // 2) if tile.halves else tile.dim

    def emit(rows: int, queries_at: Expr, keys_at: Expr, ahead_at: Expr, *rest: Expr) -> None:
        *scales_at, out_at, left, jump, tiles = rest
        scales = memory(scales_at[0], (FAR, TILE)) if scales_at else None
        queries = memory(queries_at, (rows, tile.query_factors), tile.factors)
        out = memory(out_at, (rows, BLOCK))
        keys = memory(keys_at, (FAR, steps, tile.word * TILE), tile.stored)

        def some(first: Expr, vectors: int) -> None:
            acc = b.Registers(rows, b.chunks(vectors * TILE), tile.sums)
            waiting = range(vectors if _waits(tile, rows) else 0)
            beyond = [b.let("beyond", _beyond(first + t < left, jump)) for t in waiting]

            def step(channel: Expr, turn: int) -> None:
                for t in waiting:
                    _ask(tile, ahead_at, ((first + t) * steps + channel) * TILE, beyond[t], turn)
                for r, t, _, lanes in acc:
                    word = _words(tile, keys, first + t, channel, 0)
                    acc.set(r, t, _plus(tile, acc.get(r, t), queries, r, channel, word, lanes))

            acc.clear()
            _in_turns(T.int64(steps), step)
            for r, t, _, _ in acc:
                score = _result(tile, acc.get(r, t), queries, r)
                if scales is not None:
                    score = score * b.load(scales, first + t, 0)
                b.store(out, score, r, (first + t) * TILE)

        wide = _wide(tile, rows)
        turns = b.let("turns", T.truncdiv(tiles, T.int64(wide)))
        with T.serial(turns) as turn:
            some(b.let("first", turn * wide), wide)
        if wide > 1:
            with T.serial(tiles - turns * wide) as rest:
                some(b.let("first", turns * wide + rest), 1)

    pointers = {
        "queries": tile.factors,
        "keys": tile.stored,
        "ahead": tile.stored,
        **({"scales": "float32"} if tile.codes else {}),
        "scores": "float32",
    }
    return _by_height(tile, "attention_scores", pointers, emit)


def weighted(tile: Tile) -> ir.GlobalVar:
    """The function that sums values by weights over the positions in ascending order.

    ::

        weighted(height, weights [height, BLOCK], values, ahead, sums [height, dim], left, jump, positions)

    Small tiles ask for as much of a cache as they use: see `Asked`.
    """
    steps = TILE // 2 if tile.halves else TILE  # in a tile of positions

    def emit(
        rows: int,
        weights_at: Expr,
        values_at: Expr,
        ahead_at: Expr,
        out_at: Expr,
        left: Expr,
        jump: Expr,
        positions: Expr,
    ) -> None:
        weights = memory(weights_at, (rows, tile.weight_factors), tile.factors)
        out = memory(out_at, (rows, tile.dim))
        values = memory(values_at, (FAR, tile.word * tile.dim), tile.stored)

        def some(first: Expr, vectors: list[tuple[int, int]]) -> None:
            acc = b.Registers(rows, vectors, tile.sums)

            def step(position: Expr, turn: int = 0, *, single: bool = False) -> None:
                if _waits(tile, rows):
                    beyond = b.let("beyond", _beyond(position < left * steps, jump))
                    for index, (start, _) in enumerate(vectors):
                        _ask(tile, ahead_at, position * tile.dim + first + start, beyond, index)
                for r, i, start, lanes in acc:
                    value = _words(tile, values, position, first + start, lanes=lanes)
                    total = _plus(tile, acc.get(r, i), weights, r, position, value, lanes, single=single)
                    acc.set(r, i, total)

            acc.clear()
            if tile.codes:  # behind an odd last position are a weight of 0 and some code
                _in_turns(b.let("pairs", T.truncdiv(positions + 1, T.int64(2))), step)
            elif tile.halves:
                pairs = b.let("pairs", T.truncdiv(positions, T.int64(2)))
                _in_turns(pairs, step)
                with b.when(positions > 2 * pairs):  # what lies in the other half may be no number
                    step(pairs, single=True)
            else:
                _in_turns(positions, step)
            for r, i, start, lanes in acc:
                total = _result(tile, acc.get(r, i), weights, r, lanes)
                b.store(out, total, r, first + start, lanes=lanes)

        wide = _wide(tile, rows) * LANES
        if tile.dim // wide:
            with T.serial(tile.dim // wide) as i:
                some(b.let("first", i * wide), b.chunks(wide))
        if tile.dim % wide:
            some(T.int64(tile.dim // wide * wide), b.chunks(tile.dim % wide))

    pointers = {"weights": tile.factors, "values": tile.stored, "ahead": tile.stored, "sums": "float32"}
    return _by_height(tile, "attention_weighted", pointers, emit)


def _heights(tile: Tile) -> list[int]:
    """The numbers of rows for which a tile has functions, ascending."""
    return [*(rows for rows in _HEIGHTS if rows < tile.rows), tile.rows]


def _by_height(tile: Tile, name: str, pointers: Mapping[str, str], emit: Callable[..., None]) -> ir.GlobalVar:
    """A function (height, *pointers, left, jump, count): it calls one for as many rows or more, which `emit` writes.

    Args:
        tile: What is multiplied.
        name: What is computed.
        pointers: Names of the addresses, and what is there.
        emit: Writes the body for a number of rows.
    """

    def declared() -> list[Expr]:
        numbers = (number(name) for name in ("left", "jump", "count"))
        return [*(pointer(one, dtype) for one, dtype in pointers.items()), *numbers]

    def one(rows: int) -> ir.GlobalVar:
        def body() -> None:
            given = declared()
            with imported() if tile.bf16 else nullcontext():
                emit(rows, *given)

        return inner(f"{tile.named(name)}_rows{rows}", (tile.machine,), body, entry=False)

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

        least(_heights(tile))

    return inner(tile.named(name), (tile.machine,), choose, entry=True)


def _plus(
    tile: Tile,
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
        tile: What is multiplied.
        total: The sums.
        factors: Queries or weights, [rows, ...].
        row: Of the factors.
        step: Of the reduction.
        word: The vector of the cache.
        lanes: How long it is.
        single: Only the first of two counts.
    """
    if not tile.halves:
        return total + b.splat(factors[row, step], lanes) * word
    if tile.pairs and lanes == LANES:  # the instruction has one length
        known = T.bitwise_and(word, T.broadcast(T.int32(0xFFFF), lanes)) if single else word
        pairs = T.broadcast(factors[row, step], lanes)
        return dot_int16(total, known, pairs) if tile.integers else dot_bf16(total, known, pairs)
    widened = pair_of_integers if tile.codes else pair_of_bf16
    for which in range(1 if single else 2):
        factor = widened(factors[row, step], which) if tile.pairs else factors[row, 2 * step + which]
        other = widened(word, which, lanes)
        if tile.codes and not tile.integers:
            other = T.Cast(b.vector_type("float32", lanes), other)
        total = total + b.splat(factor, lanes) * other
    return total


def _words(tile: Tile, stored: Expr, *at: Expr, lanes: int = LANES) -> Expr:
    """Words of a cache: of codes, each in two bytes."""
    if not tile.codes:
        return b.load(stored, *at, lanes=lanes)
    codes = b.load(stored, *at[:-1], tile.word * at[-1], lanes=tile.word * lanes)
    return T.reinterpret(b.vector_type("int32", lanes), T.Cast(f"int16x{tile.word * lanes}", codes))


def _result(tile: Tile, total: Expr, factors: Expr, row: int, lanes: int = LANES) -> Expr:
    """A vector of sums as f32: those of whole numbers times the scale that lies behind a row's factors."""
    if not tile.integers:
        return total
    scale = T.reinterpret("float32", factors[row, factors.shape[1] - LANES])
    return T.Cast(b.vector_type("float32", lanes), total) * b.splat(scale, lanes)


def _wide(tile: Tile, rows: int) -> int:
    """How many vectors of each of some rows are summed at once, in registers: a power of two."""
    held = tile_for(tile.machine)
    most = min(_MOST, held.rows * held.cols // (LANES * rows))
    return 1 << most.bit_length() - 1


def _waits(tile: Tile, rows: int) -> bool:
    """Whether some rows are so few that reading what they are multiplied with takes longer than multiplying."""
    return 3 * rows <= 2 * tile.rows


def _beyond(here: Expr, jump: Expr) -> Expr:
    """How many elements further is what is asked for: see `Asked`."""
    return T.Select(here, T.int64(0), jump)


def _ask(tile: Tile, ahead: Expr, word: Expr, beyond: Expr, index: int) -> None:
    """Emit what asks for a vector of words from an address in a cache on, so much further; of one line once.

    Args:
        tile: What is multiplied.
        ahead: The address.
        word: The first of the words behind it.
        beyond: How many elements further.
        index: Of the vector among neighbours.
    """
    if index % tile.word == 0:
        b.prefetch(memory(ahead, (FAR,), tile.stored), word * tile.word + beyond, tile.machine.streams_into)


def _in_turns(count: Expr, step: Callable[[Expr, int], None]) -> None:
    """Emit a loop over steps, some of them in a turn: each is told which of these it is."""
    turns = b.let("turns", T.truncdiv(count, T.int64(_UNROLL)))
    with T.serial(turns) as turn:
        for u in range(_UNROLL):
            step(turn * _UNROLL + u, u)
    with T.serial(count - turns * _UNROLL) as rest:
        step(turns * _UNROLL + rest, 0)
