"""The register-tiled product over a packed weight: the family that serves a model where no kernel of the user does."""

import math
from dataclasses import dataclass

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.layout import Layout, Plain, Tiled
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.problem import tag
from relax_llm.kernels.vectormath import ACTIVATIONS


@dataclass(frozen=True)
class Tile:
    """The register tile of a micro-kernel: `rows` of x by `cols` outputs, all held in vector registers."""

    rows: int
    cols: int


def tile_for(machine: Machine) -> Tile:
    """The tile that fills this machine's registers."""
    cols = 32 if machine.accumulators >= 8 else 16
    return Tile(max(1, machine.accumulators * LANES // cols), cols)


def layout_for(problem: Matmul, machine: Machine) -> Tiled:
    """The weight layout of this machine's kernels."""
    return Tiled(tile_for(machine).cols, problem.gated)


def layout_named(name: str, problem: Matmul, machine: Machine) -> Layout:
    """The layout that a kernel's record names: "plain", or "tiled" for this machine's own."""
    return Plain() if name == "plain" else layout_for(problem, machine)


def tiled(problem: Matmul, machine: Machine, *, flat: bool = False) -> PrimFunc:
    """A register-tiled product over a packed weight, exact for every M.

    Each task owns one panel of the weight, which stays in its core's cache while the rows of x stream by. The rows
    are cut into tiles of equal height, give or take one, and every height has its own unrolled micro-kernel: no row
    is padded, and none is left to a slow tail.

    The weight argument has the shape of `layout_for(problem, machine)`; x is [batch, seq, K], or [M, K] where `flat`.
    """
    tile = tile_for(machine)
    layout = layout_for(problem, machine)
    panels = layout.panels(problem.n)
    outputs = problem.outputs
    per_panel = tile.cols // 2 if problem.gated else tile.cols

    def emit() -> None:
        outer = (b.size("M"),) if flat else (b.size("batch"), b.size("seq"))
        x_arg = b.argument("x", (*outer, problem.k))
        weight = b.argument("weight", layout.shape(problem.n, problem.k))
        bias = b.argument("bias", (problem.n,)) if problem.bias else None
        residual_arg = b.argument("residual", (*outer, outputs)) if problem.residual else None
        out_arg = b.argument("out", (*outer, outputs))
        m = math.prod(outer[1:], start=outer[0])
        x, out = b.view(x_arg, (m, problem.k)), b.view(out_arg, (m, outputs))
        residual = b.view(residual_arg, (m, outputs)) if problem.residual else None

        def micro_kernel(rows: int, first: Expr, panel: Expr, staged: list[Expr]) -> None:
            acc = b.Registers(rows, b.chunks(tile.cols))
            acc.clear()
            with T.serial(problem.k) as k:
                for row, index, column, _ in acc:
                    product = b.splat(x[first + row, k]) * b.load(weight, panel, k, column)
                    acc.set(row, index, acc.get(row, index) + product)
            for row, index, _, _ in acc:
                b.store(staged[index], acc.get(row, index), row, 0)

        def epilogue(staged: list[Expr], row: Expr, at: Expr, panel: Expr, offset: int, lanes: int) -> None:
            column = b.let("column", panel * per_panel + offset)

            def reduced(start: int, bias_start: Expr) -> Expr:
                value = b.load(staged[start // LANES], row, start % LANES, lanes=lanes)
                return value if bias is None else value + b.load(bias, bias_start, lanes=lanes)

            value = b.let("value", reduced(offset, column))
            if problem.activation:
                value = b.let("activated", ACTIVATIONS[problem.activation](value))
            if problem.gated:
                value = value * reduced(per_panel + offset, column + outputs)
            if residual is not None:
                value = value + b.load(residual, at, column, lanes=lanes)
            b.store(out, value, at, column, lanes=lanes)

        def write(width: int, staged: list[Expr], height: Expr, first: Expr, panel: Expr) -> None:
            with T.serial(height) as row:
                for offset, lanes in b.chunks(width, min(LANES, per_panel)):
                    epilogue(staged, row, first + row, panel, offset, lanes)

        def task(panel: Expr) -> None:
            staged = [b.local((tile.rows, LANES)) for _ in b.chunks(tile.cols)]
            tiles = b.let("tiles", (m + (tile.rows - 1)) // tile.rows)
            with T.serial(tiles) as i:
                first = b.let("first", m * i // tiles)
                height = b.let("height", m * (i + 1) // tiles - first)
                for rows in range(1, tile.rows + 1):
                    with b.when(height == rows):
                        micro_kernel(rows, first, panel, staged)
                rest = outputs % per_panel
                if rest:
                    b.either(
                        panel < outputs // per_panel,
                        lambda: write(per_panel, staged, height, first, panel),
                        lambda: write(rest, staged, height, first, panel),
                    )
                else:
                    write(per_panel, staged, height, first, panel)

        b.tasks(panels, task, name="panel")

    return tag(b.prim_func(problem.name, emit), problem)
