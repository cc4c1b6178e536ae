"""A tile of rows and a block of positions: the partial of the one over the other."""

from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import TILE
from relax_llm.kernels import builder as b
from relax_llm.kernels.attention import products, softmax
from relax_llm.kernels.attention.operands import Asked, Operands, ceil_div, floor_div
from relax_llm.kernels.attention.rows import Rows
from relax_llm.kernels.attention.tile import BLOCK, FAR, Tile
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.inner import memory


@dataclass(frozen=True)
class Memory:
    """What a task has for its tiles of rows and for a block.

    Attributes:
        queries: Of each tile, [tiles, factors].
        scores: Address of those of a tile, [rows, BLOCK].
        weights: Address of the weights that they become, which is the same where these are not rounded.
    """

    queries: Expr
    scores: Expr
    weights: Expr

    @staticmethod
    def of(tile: Tile, tiles: int) -> "Memory":
        """New memory for as many tiles."""
        queries = b.stack((tiles, tile.rows * tile.query_factors), dtype=tile.factors)
        scores = weights = T.address_of(b.stack((tile.rows * BLOCK,))[0])
        if tile.pairs:
            weights = T.address_of(b.stack((tile.rows * tile.weight_factors,), dtype=tile.factors)[0])
        return Memory(queries, scores, weights)


def attend(
    operands: Operands, rows: Rows, block: Expr, queries: Expr, own: Memory, partials: Expr, at: Expr
) -> None:
    """The partial of a tile over what it sees of a block.

    Args:
        operands: The arguments.
        rows: The tile.
        block: Which one.
        queries: Address of those of the tile.
        own: Memory of the task.
        partials: [partials, elements].
        at: Which of these it becomes.
    """
    tile, pair = operands.tile, rows.pair
    group, window = operands.problem.group, operands.problem.window
    scores, weights = own.scores, own.weights
    after = b.let("after", (block + 1) * BLOCK)
    start = b.let("start", T.max(block * BLOCK, floor_div(rows.begin, TILE) * TILE))
    positions = b.let("positions", T.min(rows.latest + 1, after) - start)
    count = b.let("tiles", ceil_div(positions, TILE))
    first_tile = b.let("first_tile", floor_div(start, TILE))

    # While keys are multiplied, values are asked for, and the next keys while values are.
    key, value = operands.keys.at(pair, first_tile), operands.values.at(pair, first_tile)
    first, second = (
        Asked(value, count, T.int64(0)),
        operands.following(operands.keys, pair, first_tile, rows.begin),
    )
    scales = [stored.at(pair, first_tile) for stored in operands.scales]
    key_scales, value_scales = scales[:1], scales[1:]
    for stored in operands.scales:
        _ask(operands.following(stored, pair, first_tile, rows.begin))

    asked = [first.left, first.jump]
    b.call(products.scores(tile), rows.count, queries, key, first.at, *key_scales, scores, *asked, count)
    hidden = rows.earliest - start < count * TILE - 1
    if window:
        hidden = T.Or(hidden, rows.latest - start >= window)
    with b.when(hidden):
        offset = operands.past - start
        b.call(softmax.mask(tile, group, window), rows.count, scores, rows.first, offset, count)
    places = [scores, weights] if tile.pairs else [scores]
    partial = T.address_of(partials[at, 0])
    b.call(softmax.weights(tile), rows.count, *places, *value_scales, partial, count)
    sums = T.address_of(partials[at, tile.values_at(0)])
    asked = [second.left, second.jump]
    b.call(products.weighted(tile), rows.count, weights, value, second.at, sums, *asked, positions)


def _ask(scales: Asked) -> None:
    """Ask for the scales of a block."""
    whole = memory(scales.at, (FAR,))
    for tile in range(BLOCK // TILE):
        beyond = T.Select(scales.left > tile, T.int64(0), scales.jump)
        b.prefetch(whole, beyond + tile * TILE)
