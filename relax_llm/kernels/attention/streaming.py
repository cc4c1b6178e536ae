"""How a launch is cut into tasks: tiles of rows go through blocks of positions, or each block is a task of its own.

Positions are cut into blocks at the same places whatever the queries are, a block's partial is computed from nothing
but the block, and partials are merged in ascending order, by one function. So a row's result has the same bits
whichever rows are beside it, and whichever core works on which block.
"""

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.attention import softmax
from relax_llm.kernels.attention.block import Memory, attend
from relax_llm.kernels.attention.operands import Operands, ceil_div, floor_div
from relax_llm.kernels.attention.problem import Attention
from relax_llm.kernels.attention.rows import finish, rows_of, take
from relax_llm.kernels.attention.tile import BLOCK
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.problem import tag

_TOGETHER = 4
"""Tiles of rows, at most, that a task takes through the cache together: a block comes from memory once for all."""

_TASKS = 16
"""Tasks have fewer tiles where there would be fewer tasks than this."""

_FEW = 16
"""Up to this many tiles in a launch, a task has one block of one tile."""

_SERIAL = 3000
"""One core does all up to this many products of a position and a row; of loading a position, as long as 8 rows take."""

_SERIAL_MERGES = 200
"""One core does all up to this many merges of a row."""


def streaming(problem: Attention, machine: Machine) -> PrimFunc:
    """q [batch, seq, heads, head_dim], the cache, kv_len -> out [batch, seq, heads * head_dim].

    Rows are pairs of a query and a head of those that share a key head. They are cut into tiles, and positions into
    blocks. Where tiles are many, a task takes some of them through all blocks that they see. Where they are few, as in
    decoding, a task has one block of one tile, and what tasks leave is merged in the order of the blocks. Both ways
    give the same bits.
    """

    def emit() -> None:
        operands = Operands.declare(problem, machine)
        b.either(
            operands.pairs * operands.row_tiles <= _FEW,
            lambda: _each_block_alone(operands),
            lambda: _through_all_blocks(operands),
        )

    return tag(b.prim_func(problem.name, emit), problem)


def _through_all_blocks(operands: Operands) -> None:
    """Emit tasks of some tiles of rows, each through all blocks that they see."""
    tile, pairs, row_tiles = operands.tile, operands.pairs, operands.row_tiles
    wanted = T.max(ceil_div(row_tiles, _TOGETHER), T.truncdiv(pairs + (_TASKS - 1), pairs))
    groups = b.let("groups", T.min(row_tiles, ceil_div(wanted, 2) * 2))

    def task(index: Expr) -> None:
        # Rows before heads: a core has the rows that it has in the products before and behind.
        part = b.let("part", T.truncdiv(index, pairs))
        pair = b.let("pair", index - part * pairs)
        start = b.let("start", T.truncdiv(row_tiles * part, groups))
        own = b.let("own", T.truncdiv(row_tiles * (part + 1), groups) - start)
        memory = Memory.of(tile, _TOGETHER)
        partials = b.stack((_TOGETHER + 1, tile.partial))  # one for each tile, and one to be merged
        with T.serial(own) as i:
            take(operands, rows_of(operands, pair, start + i), memory.queries, i)
        begin = rows_of(operands, pair, start).begin
        latest = rows_of(operands, pair, start + own - 1).latest
        first, last = b.let("first", floor_div(begin, BLOCK)), b.let("last", floor_div(latest, BLOCK))
        with T.serial(last + 1 - first) as number:
            block = b.let("block", first + number)
            with T.serial(own) as i:
                rows = rows_of(operands, pair, start + i)
                with b.when(rows.sees(block)):
                    opens = rows.begin >= block * BLOCK
                    slot = b.let("slot", T.if_then_else(opens, i, T.int64(_TOGETHER)))
                    queries = T.address_of(memory.queries[i, 0])
                    attend(operands, rows, block, queries, memory, partials, slot)
                    with b.when(slot != i):
                        before, partial = (T.address_of(partials[at, 0]) for at in (i, slot))
                        b.call(softmax.merge(tile), before, partial, rows.count)
        with T.serial(own) as i:
            finish(operands, rows_of(operands, pair, start + i), partials, i)

    b.tasks(pairs * groups, task)


def _each_block_alone(operands: Operands) -> None:
    """Emit tasks of a block and a tile of rows, and then those that merge what they left."""
    tile, pairs, row_tiles = operands.tile, operands.pairs, operands.row_tiles
    first_block, blocks = operands.first_block, operands.blocks
    # Memory is taken before anything else, so its size follows from the arguments alone.
    wanted = pairs * ceil_div(operands.seq * operands.problem.group, tile.rows)
    count = T.Select(wanted <= _FEW, wanted * ceil_div(operands.kv_len, BLOCK), T.int64(1))
    partials = b.scratch((count, tile.partial))

    def work(index: Expr) -> None:
        pair_block = b.let("pair_block", T.truncdiv(index, row_tiles))
        pair = b.let("pair", T.truncdiv(pair_block, blocks))
        block = b.let("block", first_block + pair_block - pair * blocks)
        memory = Memory.of(tile, 1)
        rows = rows_of(operands, pair, index - pair_block * row_tiles)
        with b.when(rows.sees(block)):
            take(operands, rows, memory.queries, T.int64(0))
            attend(operands, rows, block, T.address_of(memory.queries[0, 0]), memory, partials, index)

    def merge(index: Expr) -> None:
        pair = b.let("pair", T.truncdiv(index, row_tiles))
        tile_index = b.let("tile", index - pair * row_tiles)
        rows = rows_of(operands, pair, tile_index)
        begin, last = b.let("begin", floor_div(rows.begin, BLOCK)), floor_div(rows.latest, BLOCK)
        at = b.let("at", (pair * blocks + begin - first_block) * row_tiles + tile_index)
        with T.serial(last - begin) as number:
            following = b.let("following", at + (number + 1) * row_tiles)
            before, partial = (T.address_of(partials[one, 0]) for one in (at, following))
            b.call(softmax.merge(tile), before, partial, rows.count)
        finish(operands, rows, partials, at)

    small = pairs * operands.kv_len * (operands.rows + 8) <= _SERIAL
    b.tasks(pairs * blocks * row_tiles, work, serial_if=small)
    b.tasks(pairs * row_tiles, merge, serial_if=pairs * operands.rows * blocks <= _SERIAL_MERGES)
