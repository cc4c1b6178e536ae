"""The register-tiled product over a packed weight: the family that serves a model where no kernel of the user does."""

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.layout import Layout, Plain
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.micro import Operands, Prefetch, micro_kernel, tiles_for, write
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.shape import UNROLL, Tile, layout_for, tile_for, tiled_blocking
from relax_llm.kernels.problem import tag

__all__ = ["Tile", "layout_for", "layout_named", "tile_for", "tiled"]

_STEPS = (
    640  # of the reduction at a time: a part of a panel and the next one leave room in a second-level cache
)


def layout_named(name: str, problem: Matmul, machine: Machine) -> Layout:
    """The layout that a kernel's record names: "plain", or "tiled" for this machine's own."""
    if name == "plain":
        return Plain(problem.weight_format)
    return layout_for(problem, machine)


def tiled(problem: Matmul, machine: Machine, *, flat: bool = False) -> PrimFunc:
    """A register-tiled product over a packed weight, exact for every M.

    Each task owns one panel of the weight, which stays in its core's cache while the rows of x stream by. The rows
    are cut into tiles of equal height, give or take one, and every height has its own unrolled micro-kernel: no row
    is padded, and none is left to a slow tail. Where x is large, a task has a block of rows.

    Every output is summed over k in ascending order, whatever M is, so a row's result does not depend on the rows
    beside it. A long reduction is cut into parts, whose sums are carried on from one to the next.

    The weight argument has the shape of `layout_for(problem, machine)`; x is [batch, seq, K], or [M, K] where `flat`.
    """
    blocking = tiled_blocking(problem, machine)
    k, tile, steps, most = problem.k, blocking.tile, blocking.steps, blocking.tiles
    count, rest = blocking.parts, problem.k % UNROLL

    def emit() -> None:
        operands = Operands.declare(problem, machine, flat=flat)
        m, x = operands.m, operands.x
        elements = operands.bytes_ahead()
        tiles = b.let("tiles", tiles_for(tile, m))
        blocks = b.let("blocks", (tiles + (most - 1)) // most)

        def task(index: Expr) -> None:
            block = b.let("block", index // operands.panels)
            panel = b.let("panel", index % operands.panels)
            start = b.let("start", tiles * block // blocks)
            own = b.let("own", tiles * (block + 1) // blocks - start)
            top = b.let("top", m * start // tiles)
            sums = b.local((most * tile.rows if count > 1 else tile.rows, tile.cols))

            def work(rows: int, part: Expr, i: Expr, first: Expr, at: Expr) -> None:
                acc = b.Registers(rows, b.chunks(tile.cols))
                if count > 1:
                    b.either(part == 0, acc.clear, lambda: acc.load(sums, at))
                else:
                    acc.clear()
                begin = b.let("begin", part * steps)
                following = b.let(
                    "following", panel * operands.panel_words + (begin + steps) * operands.words
                )
                prefetch = Prefetch(elements, following, steps, own, i)
                length = b.let("length", T.min(T.int64(steps), k - rest - begin))
                micro_kernel(
                    acc,
                    lambda row, at_k: x[first + row, begin + at_k],
                    operands.reader(panel, begin),
                    length,
                    lambda turn, u: prefetch.emit(turn, u, tile, rows, operands.words),
                    rest,
                    None if count == 1 else part == count - 1,
                )
                acc.store(sums, at)

            with T.serial(count) as part, T.serial(own) as i:
                first = b.let("first", m * (start + i) // tiles)
                height = b.let("height", m * (start + i + 1) // tiles - first)
                at = b.let("at", first - top) if count > 1 else T.int64(0)
                for rows in range(1, tile.rows + 1):
                    with b.when(height == rows):
                        work(rows, part, i, first, at)
                with b.when(part == count - 1):
                    write(operands, sums, (at,), height, first, panel)

        b.tasks(blocks * operands.panels, task, name="panel")

    return tag(b.prim_func(problem.name, emit), problem)
