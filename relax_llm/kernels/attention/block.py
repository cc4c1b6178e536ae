"""A tile of rows and a block of positions: the partial of the one over the other."""

from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import TILE
from relax_llm.kernels import builder as b
from relax_llm.kernels.attention import products, softmax
from relax_llm.kernels.attention.operands import Asked, Operands, Stored, ceil_div, floor_div
from relax_llm.kernels.attention.rows import Rows
from relax_llm.kernels.attention.tile import BLOCK, Tile
from relax_llm.kernels.attention.unpacking import Unpacked
from relax_llm.kernels.builder import Expr


@dataclass(frozen=True)
class Memory:
    """What a task has for its tiles of rows and for a block.

    Attributes:
        queries: Of each tile, [tiles, factors].
        unpacked: For caches that are codes.
        scores: Address of those of a tile, [rows, BLOCK].
        weights: Address of the weights that they become, which is the same where these are not rounded.
    """

    queries: Expr
    unpacked: Unpacked | None
    scores: Expr
    weights: Expr

    @staticmethod
    def of(tile: Tile, tiles: int) -> "Memory":
        """New memory for as many tiles."""
        queries = b.stack((tiles, tile.rows * tile.query_factors), dtype=tile.factors)
        unpacked = Unpacked.of(tile) if tile.codes else None
        scores = weights = T.address_of(b.stack((tile.rows * BLOCK,))[0])
        if tile.pairs:
            weights = T.address_of(b.stack((tile.rows * tile.weight_factors,), dtype=tile.factors)[0])
        return Memory(queries, unpacked, scores, weights)


def attend(
    operands: Operands, rows: Rows, block: Expr, queries: Expr, memory: Memory, partials: Expr, at: Expr
) -> None:
    """The partial of a tile over what it sees of a block.

    Args:
        operands: The arguments.
        rows: The tile.
        block: Which one; where caches are codes, it is unpacked.
        queries: Address of those of the tile.
        memory: Of the task.
        partials: [partials, elements].
        at: Which of these it becomes.
    """
    tile, pair = operands.tile, rows.pair
    group, window = operands.problem.group, operands.problem.window
    scores, weights = memory.scores, memory.weights
    after = b.let("after", (block + 1) * BLOCK)
    start = b.let("start", T.max(block * BLOCK, floor_div(rows.begin, TILE) * TILE))
    positions = b.let("positions", T.min(rows.latest + 1, after) - start)
    count = b.let("tiles", ceil_div(positions, TILE))
    first_tile = b.let("first_tile", floor_div(start, TILE))

    def following(stored: Stored) -> Asked:
        return operands.following(stored, pair, first_tile, rows.begin)

    # While keys are multiplied, values are asked for, and the next keys while values are; of codes, the next block.
    key_scales, value_scales = [], []
    if memory.unpacked is None:
        key, value = operands.keys.at(pair, first_tile), operands.values.at(pair, first_tile)
        first, second = Asked(value, count, T.int64(0)), following(operands.keys)
    else:
        first, second = following(operands.keys), following(operands.values)
        slot = b.let("in_block", first_tile - block * (BLOCK // TILE))
        key, value = memory.unpacked.keys(slot), memory.unpacked.values(slot)
        key_scales, value_scales = ([T.address_of(kept[slot * TILE])] for kept in memory.unpacked.scales)

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
