"""The product for many rows: blocks of x are copied next to each other, and used by many panels before the next."""

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.operands import Operands, Parts, Sums, cut, tiles_for, write
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.shape import PIECE, blocked_blocking


def blocked(problem: Matmul, machine: Machine) -> PrimFunc:
    """The product over a packed weight for more rows than a tile has, x [M, K].

    A task owns a block of rows and a group of panels. For each part of the reduction it copies the block's piece of x
    to memory of its own, where rows lie an odd number of cache lines apart: in x itself they are often a multiple of a
    page apart, and compete for a few places of the first-level cache. The piece stays in the second-level cache for
    all panels of the group, and each part of a panel for all rows of the block. A core goes through the blocks of half
    the rows for a group of panels before the next group. Sums are carried from one part to the next; every output is
    summed over k in ascending order, as in `tiled`, and so the results are the same.
    """
    blocking = blocked_blocking(problem, machine)
    k, tile, steps, most, count = problem.k, blocking.tile, blocking.steps, blocking.tiles, blocking.parts

    def emit() -> None:
        operands = Operands.declare(problem, machine, flat=True)
        parts = Parts(operands, blocking, PIECE)
        m, x, panels = operands.m, operands.normalized(), operands.panels
        tiles, blocks = cut(m, tiles_for(tile, m), most)
        in_half = b.let("in_half", (blocks + 1) // 2)
        groups = blocking.groups(panels)
        widest = -(-panels // groups)

        def task(index: Expr) -> None:
            before = b.let("before", T.truncdiv(index, in_half))
            half = b.let("half", T.truncdiv(before, T.int64(groups)))
            group = b.let("group", before - half * groups)
            block = b.let("block", half * in_half + (index - before * in_half))
            start = b.let("start", tiles * block // blocks)
            own = b.let("own", tiles * (block + 1) // blocks - start)
            top = b.let("top", m * start // tiles)
            height_all = b.let("rows", m * (start + own) // tiles - top)
            first_panel = b.let("first_panel", group * panels // groups)
            after = b.let("after", (group + 1) * panels // groups)
            piece = b.scratch((most * tile.rows, PIECE))
            memory = None
            if not operands.direct:
                memory = b.scratch((widest if count > 1 else 1, most * tile.rows, tile.cols))

            with T.serial(count) as part:
                begin = b.let("begin", part * steps)
                length = b.let("length", T.min(T.int64(steps), k - begin))
                with T.serial(height_all) as row:
                    with T.serial(length // LANES) as at:
                        b.store(piece, b.load(x, top + row, begin + at * LANES), row, at * LANES)
                    if k % LANES:
                        with T.serial(length % LANES) as at:
                            last = length // LANES * LANES + at
                            b.put(piece, x[top + row, begin + last], row, last)

                with T.serial(after - first_panel) as slot:
                    panel = b.let("panel", first_panel + slot)
                    # What is worked on next: this part of the next panel, or the next part of the first one.
                    following = b.let(
                        "following",
                        T.if_then_else(
                            panel + 1 < after, parts.at(panel + 1, part), parts.at(first_panel, part + 1)
                        ),
                    )
                    place = b.let("place", slot if count > 1 else slot * 0)
                    with T.serial(own) as i:
                        first = b.let("first", m * (start + i) // tiles)
                        height = b.let("height", m * (start + i + 1) // tiles - first)
                        at = b.let("at", first - top)
                        sums = operands.in_place(first, panel)
                        if memory is not None:
                            sums = Sums(memory, (place, at, T.int64(0)), tile.cols)
                        x_at = T.address_of(piece[at, 0])
                        operands.expect(first, height, panel)
                        parts.tile(part, panel, height, x_at, sums, following, share=(i, own))
                        if not operands.done:
                            with b.when(part == count - 1):
                                write(operands, sums, height, first, panel)

        b.tasks(blocks * groups, task, name="piece")

    return b.prim_func(f"blocked__{problem.name}", emit)
