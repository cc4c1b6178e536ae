"""A product in tasks of a panel of the weight and a block of rows."""

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.matmul.operands import Parts, Sums, cut, tiles_for, write


def by_panel(parts: Parts, x_at: Callable[[Expr, Expr], Expr]) -> None:
    """Emit the loops of a product, its epilogue included.

    A panel stays in its core's cache while the rows of a block stream by, for each part of the reduction.

    Args:
        parts: The operands and how they are cut.
        x_at: Gives the address of a row's first element in a part of the reduction, from the part and the row.
    """
    operands, blocking = parts.operands, parts.blocking
    tile, most, count, m = blocking.tile, blocking.tiles, blocking.parts, operands.m
    tiles, blocks = cut(m, tiles_for(tile, m), most)

    def task(index: Expr) -> None:
        block = b.let("block", index // operands.panels)
        panel = b.let("panel", index % operands.panels)
        start = b.let("start", tiles * block // blocks)
        own = b.let("own", tiles * (block + 1) // blocks - start)
        top = b.let("top", m * start // tiles)
        memory = None
        if not operands.direct:
            memory = b.stack((most * tile.rows if count > 1 else tile.rows, tile.cols))

        with T.serial(count) as part, T.serial(own) as i:
            first = b.let("first", m * (start + i) // tiles)
            height = b.let("height", m * (start + i + 1) // tiles - first)
            at = b.let("at", first - top) if count > 1 else T.int64(0)
            sums = (
                operands.in_place(first, panel)
                if memory is None
                else Sums(memory, (at, T.int64(0)), tile.cols)
            )
            operands.expect(first, height, panel)
            following, share = parts.at(panel, part + 1), (i, own)
            parts.tile(part, panel, height, x_at(part, first), sums, following, share)
            if not operands.done:
                with b.when(part == count - 1):
                    write(operands, sums, height, first, panel)

    b.tasks(blocks * operands.panels, task, name="panel")
