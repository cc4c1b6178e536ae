"""What the kernels over a packed weight share: the arguments, the micro-kernel with its prefetching, the epilogue."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.layout import Packed
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.reading import Reader, panel_words, reader
from relax_llm.kernels.matmul.shape import UNROLL, Tile, layout_for, tile_for
from relax_llm.kernels.vectormath import ACTIVATIONS

_LINE = 16
"""f32 in a cache line."""

_STREAMS = 2  # what the prefetcher of a core is made to follow at once; see `Prefetch`


@dataclass(frozen=True)
class Operands:
    """The arguments of a kernel, as matrices.

    Attributes:
        problem: What is computed.
        machine: What code is generated for.
        layout: Of the weight.
        tile: The register tile.
        m: Rows.
        x: [M, K].
        weight: In `layout`.
        bias: [N], or None.
        residual: [M, outputs], or None.
        out: [M, outputs].
    """

    problem: Matmul
    machine: Machine
    layout: Packed
    tile: Tile
    m: Expr
    x: Expr
    weight: Expr
    bias: Expr | None
    residual: Expr | None
    out: Expr

    @staticmethod
    def declare(problem: Matmul, machine: Machine, *, flat: bool) -> "Operands":
        """Declare the arguments; x is [M, K] where `flat`, else [batch, seq, K], and so are residual and out."""
        outer = (b.size("M"),) if flat else (b.size("batch"), b.size("seq"))
        x = b.argument("x", (*outer, problem.k))
        layout = layout_for(problem, machine)
        weight = b.argument("weight", layout.shape(problem.n, problem.k), layout.dtype)
        bias = b.argument("bias", (problem.n,)) if problem.bias else None
        residual = b.argument("residual", (*outer, problem.outputs)) if problem.residual else None
        out = b.argument("out", (*outer, problem.outputs))
        m = math.prod(outer[1:], start=outer[0])
        matrix = lambda tensor: b.view(tensor, (m, problem.outputs))  # noqa: E731
        return Operands(
            problem,
            machine,
            layout,
            tile_for(machine),
            m,
            b.view(x, (m, problem.k)),
            weight,
            bias,
            None if residual is None else matrix(residual),
            matrix(out),
        )

    @property
    def words(self) -> int:
        """Elements of four bytes that a panel of the weight has for one step of the reduction, rounded down."""
        return self.panel_words // self.problem.k or 1

    @property
    def panel_words(self) -> int:
        """Elements of four bytes from one panel of the weight to the next."""
        return panel_words(self.layout, self.problem.k)

    def bytes_ahead(self) -> Expr:
        """The weight as f32 [elements], for `Prefetch`, whatever it holds."""
        return b.view(self.weight, (self.panels * self.panel_words,))

    def reader(self, panel: Expr, begin: Expr) -> Reader:
        """What gives the f32 vectors of a panel from a step on, which is a multiple of four."""
        return reader(self.layout, self.weight, self.panels, self.problem.k, self.machine)(panel, begin)

    @property
    def panels(self) -> int:
        """Panels of the weight."""
        return self.layout.panels(self.problem.n)

    @property
    def per_panel(self) -> int:
        """Outputs of a panel."""
        return self.tile.cols // 2 if self.problem.gated else self.tile.cols


@dataclass(frozen=True)
class Prefetch:
    """Brings the next part of the weight into the second-level cache while this one is worked on.

    A core keeps too few misses of its own in flight to read memory at full speed, and its prefetcher looks only some
    lines ahead, which multiply-adds outlast. Two streams are asked for at once, one from each half of the next part:
    the prefetcher follows both, and keeps twice as many lines in flight as in one.

    Attributes:
        weight: The packed weight as [elements].
        start: The element where the next part begins.
        steps: Steps of the reduction in the next part.
        tiles: The tiles of rows that this part is worked on by, among whom the lines are divided.
        tile: Which of them this is.
    """

    weight: Expr
    start: Expr
    steps: int
    tiles: Expr
    tile: Expr

    def emit(self, turn: Expr, u: int, tile: Tile, rows: int, words: int) -> None:
        """Ask for what falls to step `u` of a turn of the loop over k, in a tile of so many rows.

        `words` are the elements of the weight in one step.
        """
        half = self.steps * words // _STREAMS
        lines = (
            UNROLL * tile.cols // _LINE // _STREAMS
        )  # of each stream, in one turn, where there is but one tile
        at = self.tile * (self.steps // UNROLL) + turn

        def ask(stream: int, offset: Expr) -> None:
            b.prefetch(self.weight, self.start + stream * half + offset)

        def alone() -> None:
            for line in range(u * lines // UNROLL, (u + 1) * lines // UNROLL):
                for stream in range(_STREAMS):
                    ask(stream, (at * lines + line) * _LINE)

        def shared() -> None:
            apart = T.truncdiv(self.tiles + (lines * _LINE - 1), self.tiles)
            for line in range(max(1, lines // 2)):
                for stream in range(_STREAMS):
                    if u == (line * _STREAMS + stream) * UNROLL // max(2, lines):
                        ask(stream, at * apart + line * _LINE)

        if rows <= tile.alone // 2:
            alone()
        elif rows > tile.alone:
            shared()
        else:
            b.either(self.tiles == 1, alone, shared)


def tiles_for(tile: Tile, m: Expr) -> Expr:
    """How many tiles M rows are cut into."""
    full, alone = tile.rows, tile.alone
    return T.max((m + (full - 1)) // full, T.min(T.int64(2), (m + (alone - 1)) // alone))


def micro_kernel(
    acc: b.Registers,
    x: Callable[[int, Expr], Expr],
    weight: Callable[[Expr, int, int], Expr],
    steps: Expr,
    ahead: Callable[[Expr, int], None],
    rest: int = 0,
    ends: Expr | None = None,
) -> None:
    """Add products into the accumulators, for every k in ascending order.

    Args:
        acc: rows by vectors of a tile.
        x: The element of a row at a step.
        weight: The vector at a step, given also as its place in a turn, and a column.
        steps: How many; a multiple of `UNROLL`.
        ahead: Called for every turn of the loop and each step of it, to prefetch.
        rest: Further steps, fewer than `UNROLL`.
        ends: The run-time condition under which these are to be done; None for always.
    """

    def step(k: Expr, u: int) -> None:
        for row, index, column, _ in acc:
            acc.set(row, index, acc.get(row, index) + b.splat(x(row, k)) * weight(k, u, column))

    with T.serial(T.truncdiv(steps, T.int64(UNROLL))) as turn:
        for u in range(UNROLL):
            ahead(turn, u)
            step(turn * UNROLL + u, u)
    if rest:
        with b.when(ends) if ends is not None else nullcontext():
            for u in range(rest):
                step(steps + u, u)


def write(
    operands: Operands, sums: Expr, at: tuple[Expr, ...], height: Expr, first: Expr, panel: Expr
) -> None:
    """Apply the epilogue to a tile of sums, and write it.

    Args:
        operands: The arguments.
        sums: [rows, cols], or several such.
        at: The indices of the tile's first row in `sums`.
        height: Its rows.
        first: Its first row in the result.
        panel: The panel of its columns.
    """
    problem, per_panel = operands.problem, operands.per_panel

    def element(row: Expr, offset: int, lanes: int) -> None:
        column = b.let("column", panel * per_panel + offset)

        def reduced(start: int, bias_start: Expr) -> Expr:
            value = b.load(sums, *at[:-1], at[-1] + row, start, lanes=lanes)
            return value if operands.bias is None else value + b.load(operands.bias, bias_start, lanes=lanes)

        value = b.let("value", reduced(offset, column))
        if problem.activation:
            value = b.let("activated", ACTIVATIONS[problem.activation](value))
        if problem.gated:
            value = value * reduced(per_panel + offset, column + problem.outputs)
        if operands.residual is not None:
            value = value + b.load(operands.residual, first + row, column, lanes=lanes)
        b.store(operands.out, value, first + row, column, lanes=lanes)

    def rows(width: int) -> None:
        with T.serial(height) as row:
            for offset, lanes in b.chunks(width, min(LANES, per_panel)):
                element(row, offset, lanes)

    rest = problem.outputs % per_panel
    if rest:
        full = problem.outputs // per_panel
        b.either(panel < full, lambda: rows(per_panel), lambda: rows(rest))
    else:
        rows(per_panel)
