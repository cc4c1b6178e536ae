"""A tile of rows in a launch: what it sees, the queries that it takes, and the results that it leaves."""

import operator
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.attention.operands import Operands, floor_div
from relax_llm.kernels.attention.products import computed
from relax_llm.kernels.attention.tile import BLOCK, Tile
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.codes import Channels, inverse_of, largest_of, rounded, scale_of
from relax_llm.kernels.intrinsics import imported, round_bf16
from relax_llm.kernels.machine import LANES


@dataclass(frozen=True)
class Rows:
    """A tile of rows.

    Attributes:
        pair: Of a sequence and a key head, whose rows they are.
        first: Its first.
        count: How many.
        earliest: Position of the first query.
        latest: Position of the last.
        begin: The first position that one of them sees.
    """

    pair: Expr
    first: Expr
    count: Expr
    earliest: Expr
    latest: Expr
    begin: Expr

    def sees(self, block: Expr) -> Expr:
        """Whether one of them sees something of a block."""
        return T.And(block * BLOCK <= self.latest, (block + 1) * BLOCK > self.begin)


def rows_of(operands: Operands, pair: Expr, index: Expr) -> Rows:
    """A pair's tile of rows."""
    group, window, height = operands.problem.group, operands.problem.window, operands.tile.rows
    first = b.let("first", index * height)
    count = b.let("count", T.min(operands.rows - first, T.int64(height)))
    earliest = operands.past + floor_div(first, group)
    latest = operands.past + floor_div(first + count - 1, group)
    begin = T.max(earliest - (window - 1), 0) if window else T.int64(0)
    return Rows(
        pair,
        first,
        count,
        b.let("earliest", earliest),
        b.let("latest", latest),
        b.let("begin", begin),
    )


def take(operands: Operands, rows: Rows, queries: Expr, at: Expr) -> None:
    """Copy the queries of a tile, scaled, as they are multiplied; the last again for rows computed beside it.

    Args:
        operands: The arguments.
        rows: The tile.
        queries: [tiles, factors of a tile].
        at: Which of these.
    """
    with T.serial(computed(operands.tile, rows.count)) as r:
        row = b.let("row", rows.first + T.min(r, rows.count - 1))
        _take_row(operands, _place(operands, rows.pair, row), queries, at, r * operands.tile.query_factors)


def _take_row(operands: Operands, place: tuple[Expr, ...], queries: Expr, at: Expr, first: Expr) -> None:
    """Copy a query to its place from `first` on."""
    tile, dim = operands.tile, operands.problem.head_dim

    def query(start: int, n: int) -> Expr:
        return b.load(operands.q, *place, start, lanes=n) * b.splat(operands.problem.scale, n)

    if not tile.pairs:
        for start, n in b.chunks(dim):
            b.store(queries, query(start, n), at, first + start, lanes=n)
        if tile.query_factors > dim:
            b.put(queries, T.float32(0), at, first + dim)
        return
    if tile.integers:
        _encode(tile, query, queries, at, first)
        return
    whole = b.local((2 * tile.query_factors,))
    for start in range(0, 2 * tile.query_factors, LANES):
        n = min(LANES, dim - start)
        if n < LANES:
            b.store(whole, b.splat(0.0), start)
        if n > 0:
            b.store(whole, query(start, n), start, lanes=n)
    with imported():
        for word in range(0, tile.query_factors, LANES):
            low, high = (b.load(whole, 2 * word + half) for half in (0, LANES))
            b.store(queries, round_bf16(low, high), at, first + word)


def _encode(tile: Tile, query: Channels, queries: Expr, at: Expr, first: Expr) -> None:
    """Write a query as whole numbers of two bytes from `first` on, and their scale behind them."""
    largest = largest_of(tile.dim, query)
    b.put(queries, scale_of(largest, tile.most), at, first + (tile.query_factors - LANES))
    inverse = b.let("inverse", inverse_of(largest, tile.most))
    whole = b.view(queries, (queries.shape[0], 2 * queries.shape[1]), "int16")
    for start, n in b.chunks(tile.dim):
        codes = rounded(query(start, n) * b.splat(inverse, n), n)
        b.store(whole, T.Cast(b.vector_type("int16", n), codes), at, 2 * first + start, lanes=n)
    if tile.dim % 2:
        b.put(whole, T.int16(0), at, 2 * first + tile.dim)


def finish(operands: Operands, rows: Rows, partials: Expr, at: Expr) -> None:
    """Divide the sums of values in a tile's partial by those of the weights, to its results.

    Args:
        operands: The arguments.
        rows: The tile.
        partials: [partials, elements].
        at: Which of these.
    """
    tile = operands.tile
    with T.serial(rows.count) as r:
        place = _place(operands, rows.pair, b.let("row", rows.first + r))
        total = b.fold(b.let("total", b.load(partials, at, tile.weights_at(r))), operator.add)
        inverse = b.let("inverse", T.float32(1) / total)
        for start, n in b.chunks(tile.dim):
            value = b.load(partials, at, tile.values_at(r) + start, lanes=n)
            b.store(operands.out, value * b.splat(inverse, n), *place, start, lanes=n)


def _place(operands: Operands, pair: Expr, row: Expr) -> tuple[Expr, Expr, Expr]:
    """The sequence, query and head of a row."""
    group, kv_heads = operands.problem.group, operands.problem.kv_heads
    token, sequence = b.let("token", floor_div(row, group)), b.let("sequence", floor_div(pair, kv_heads))
    return (
        sequence,
        token,
        b.let("head", (pair - sequence * kv_heads) * group + (row - token * group)),
    )
