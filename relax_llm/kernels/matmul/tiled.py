"""The register-tiled product over a packed weight: the family that serves a model where no kernel of the user does."""

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.layout import Layout, Plain
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.operands import Operands, Parts, Sums, tiles_for, write
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.shape import Tile, layout_for, tile_for, tiled_blocking
from relax_llm.kernels.problem import tag

__all__ = ["Tile", "layout_for", "layout_named", "tile_for", "tiled"]


def layout_named(name: str, problem: Matmul, machine: Machine) -> Layout:
    """The layout that a kernel's record names: "plain", or "tiled" for this machine's own."""
    if name == "plain":
        return Plain(problem.weight_format)
    return layout_for(problem, machine)


def tiled(problem: Matmul, machine: Machine, *, flat: bool = False) -> PrimFunc:
    """A register-tiled product over a packed weight, exact for every M.

    Each task owns one panel of the weight, which stays in its core's cache while the rows of x stream by. The rows
    are cut into tiles of equal height, give or take one, and every height has its own micro-kernel: no row is padded,
    and none is left to a slow tail. Where x is large, a task has a block of rows.

    Every output is summed over k in ascending order, whatever M is, so a row's result does not depend on the rows
    beside it. A long reduction is cut into parts, whose sums are carried on from one to the next.

    The weight argument has the shape of `layout_for(problem, machine)`; x is [batch, seq, K], or [M, K] where `flat`.
    """
    blocking = tiled_blocking(problem, machine)
    tile, most, count = blocking.tile, blocking.tiles, blocking.parts

    def emit() -> None:
        operands = Operands.declare(problem, machine, flat=flat)
        parts = Parts(operands, blocking, stride=problem.k)
        m, x = operands.m, operands.x
        tiles = b.let("tiles", tiles_for(tile, m))
        blocks = b.let("blocks", (tiles + (most - 1)) // most)

        def task(index: Expr) -> None:
            block = b.let("block", index // operands.panels)
            panel = b.let("panel", index % operands.panels)
            start = b.let("start", tiles * block // blocks)
            own = b.let("own", tiles * (block + 1) // blocks - start)
            top = b.let("top", m * start // tiles)
            memory = None
            if not operands.direct:
                memory = b.local((most * tile.rows if count > 1 else tile.rows, tile.cols))

            with T.serial(count) as part, T.serial(own) as i:
                first = b.let("first", m * (start + i) // tiles)
                height = b.let("height", m * (start + i + 1) // tiles - first)
                at = b.let("at", first - top) if count > 1 else T.int64(0)
                sums = (
                    operands.in_place(first, panel)
                    if memory is None
                    else Sums(memory, (at, T.int64(0)), tile.cols)
                )
                parts.tile(
                    part,
                    panel,
                    height,
                    T.address_of(x[first, part * blocking.steps]),
                    sums,
                    following=parts.at(panel, part + 1),
                    share=(i, own),
                )
                if not operands.done:
                    with b.when(part == count - 1):
                        write(operands, sums, height, first, panel)

        b.tasks(blocks * operands.panels, task, name="panel")

    return tag(b.prim_func(problem.name, emit), problem)
