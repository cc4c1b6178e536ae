"""The register-tiled product over a packed weight: the family that serves a model where no kernel of the user does."""

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.layout import Layout, Plain
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.operands import Operands, Parts
from relax_llm.kernels.matmul.panels import by_panel
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

    def emit() -> None:
        operands = Operands.declare(problem, machine, flat=flat)
        parts = Parts(operands, blocking, stride=problem.k)
        x, steps = operands.normalized(), blocking.steps
        by_panel(parts, lambda part, first: T.address_of(x[first, part * steps]))

    return tag(b.prim_func(problem.name, emit), problem)
