"""The arguments of kernels over a packed weight, as matrices, and what is done with a tile of sums."""

import math
from dataclasses import dataclass
from functools import cached_property

from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.layout import Packed
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.multiply import STREAMS, multiply
from relax_llm.kernels.matmul.problem import Matmul, norm_arguments
from relax_llm.kernels.matmul.reading import panel_words
from relax_llm.kernels.matmul.shape import TOGETHER, UNROLL, Blocking, Tile, layout_for, tile_for
from relax_llm.kernels.norm import normalize_row, normalize_rows
from relax_llm.kernels.vectormath import ACTIVATIONS


@dataclass(frozen=True)
class Operands:
    """The arguments of a kernel, as matrices.

    Attributes:
        problem: What is computed.
        machine: What code is generated for.
        layout: Of the weight.
        m: Rows.
        x: [M, K], before the norm.
        weight: The packed weight as elements of four bytes, one panel after the other.
        bias: [N], or None.
        residual: [M, outputs], or None.
        norm: What the norm takes, each [K]; empty where there is none.
        out: [M, outputs].
    """

    problem: Matmul
    machine: Machine
    layout: Packed
    m: Expr
    x: Expr
    weight: Expr
    bias: Expr | None
    residual: Expr | None
    norm: tuple[Expr, ...]
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
        norm = tuple(b.argument(name, (problem.k,)) for name in norm_arguments(problem))
        out = b.argument("out", (*outer, problem.outputs))
        m = math.prod(outer[1:], start=outer[0])
        matrix = lambda tensor: b.view(tensor, (m, problem.outputs))  # noqa: E731
        words = layout.panels(problem.n) * panel_words(layout, problem.k)
        return Operands(
            problem,
            machine,
            layout,
            m,
            b.view(x, (m, problem.k)),
            b.view(weight, (words,)),
            bias,
            None if residual is None else matrix(residual),
            norm,
            matrix(out),
        )

    def normalized(self) -> Expr:
        """Emit the norm of all rows, where there is one: [M, K]."""
        norm, k = self.problem.norm, self.problem.k
        if norm is None:
            return self.x
        rows = b.view(T.alloc_buffer((self.m * k,), "float32"), (self.m, k))
        normalize_rows(norm, self.machine, self.m, self.x, self.norm, rows)
        return rows

    def some_normalized(self, first: Expr, count: Expr, most: int) -> tuple[Expr, Expr]:
        """Emit the norm of some rows, at most as many as are said, in a task: a matrix, and where they begin in it."""
        norm, k = self.problem.norm, self.problem.k
        if norm is None:
            return self.x, first
        rows = b.scratch((most, k))
        with T.serial(count) as row:
            normalize_row(norm, self.machine, self.m, (self.x, first + row), self.norm, (rows, row))
        return rows, T.int64(0)

    @property
    def tile(self) -> Tile:
        """The register tile."""
        return tile_for(self.machine)

    @property
    def panels(self) -> int:
        """Panels of the weight."""
        return self.layout.panels(self.problem.n)

    @property
    def per_panel(self) -> int:
        """Outputs of a panel."""
        return self.tile.cols // 2 if self.problem.gated else self.tile.cols

    @cached_property
    def panel_words(self) -> int:
        """Elements of four bytes from one panel of the weight to the next."""
        return panel_words(self.layout, self.problem.k)

    @property
    def direct(self) -> bool:
        """Whether sums are kept where results will be: each of a panel's columns is one of an output."""
        return not self.problem.gated and self.problem.outputs % self.tile.cols == 0

    def in_place(self, first: Expr, panel: Expr) -> "Sums":
        """The sums of a tile in the result, where that is possible."""
        return Sums(self.out, (first, panel * self.tile.cols), self.problem.outputs)

    def expect(self, first: Expr, height: Expr, panel: Expr) -> None:
        """Ask for what a tile's results go to and are added to, long before the tile is done.

        Rows lie far apart, so that no prefetcher finds them, and a tile would wait for the lines of all its rows. Few
        rows stay in a first-level cache.
        """
        matrices = [self.out] if self.residual is None else [self.out, self.residual]
        with T.serial(T.if_then_else(self.m > self.tile.rows, height, T.int64(0))) as row:
            for matrix in matrices:
                flat = b.view(matrix, (self.m * self.problem.outputs,))
                start = (first + row) * self.problem.outputs + panel * self.per_panel
                for line in range(0, self.per_panel, LANES):
                    b.prefetch(flat, start + line)

    @property
    def done(self) -> bool:
        """Whether the sums are the results: there is no epilogue."""
        return self.direct and not (self.problem.bias or self.problem.activation or self.problem.residual)


@dataclass(frozen=True)
class Sums:
    """Where a tile's sums are: in the result itself, or in memory of the task.

    Attributes:
        memory: The matrix, or several such.
        at: The indices of the tile's first sum.
        apart: Elements from row to row.
    """

    memory: Expr
    at: tuple[Expr, ...]
    apart: int

    @property
    def address(self) -> Expr:
        """Of the first sum."""
        return T.address_of(self.memory[self.at])

    def vector(self, row: Expr, column: int, lanes: int) -> Expr:
        """The sums of a row of the tile, from a column on."""
        *matrix, first_row, first_column = self.at
        return b.load(self.memory, *matrix, first_row + row, first_column + column, lanes=lanes)


@dataclass(frozen=True)
class Parts:
    """The reduction cut into parts, of which a kernel works on one at a time.

    Attributes:
        operands: The arguments.
        blocking: The cuts; steps are pairs of bf16 where `pairs`.
        stride: Elements between rows of what is multiplied.
        pairs: Whether x comes as words of two bf16.
    """

    operands: Operands
    blocking: Blocking
    stride: int
    pairs: bool = False

    @property
    def words(self) -> int:
        """Elements of four bytes that a panel has for a part."""
        steps = self.blocking.steps
        return steps * self.operands.tile.cols if self.pairs else panel_words(self.operands.layout, steps)

    def at(self, panel: Expr, part: Expr) -> Expr:
        """Where a part of a panel begins in the weight."""
        return panel * self.operands.panel_words + part * self.words

    def tile(
        self,
        part: Expr,
        panel: Expr,
        height: Expr,
        x: Expr,
        sums: Sums,
        following: Expr,
        share: tuple[Expr, Expr],
    ) -> None:
        """Add the products of a tile to its sums.

        Args:
            part: Of the reduction.
            panel: Of the weight.
            height: Rows of the tile.
            x: Address of the first row's first element in the part.
            sums: Where they are.
            following: Where in the weight the part begins that is worked on next.
            share: Which of the tiles this is that work on the part, and how many they are: each asks for its share.
        """
        operands, blocking = self.operands, self.blocking
        count, steps, turns = blocking.parts, blocking.steps, blocking.steps // UNROLL
        rest = blocking.k % UNROLL
        index, tiles = share
        length = T.min(T.int64(steps), blocking.k - rest - part * steps)
        apiece = -(-self.words // (STREAMS * turns))
        spacing = b.let("spacing", T.truncdiv(tiles + (apiece - 1), tiles))
        ahead = b.let("ahead", following + index * turns * spacing)
        last = T.if_then_else(part == count - 1, T.int64(rest), T.int64(0))
        b.call(
            multiply(operands.layout, self.stride, operands.machine, pairs=self.pairs),
            height,
            x,
            T.address_of(operands.weight[self.at(panel, part)]),
            sums.address,
            T.address_of(operands.weight[ahead]),
            T.address_of(operands.weight[ahead + self.words // STREAMS]),
            T.int64(sums.apart),
            T.truncdiv(length, T.int64(UNROLL)),
            last if rest and count > 1 else T.int64(rest),
            T.cast(part, "int64"),
            spacing,
        )


def tiles_for(tile: Tile, m: Expr) -> Expr:
    """How many tiles M rows are cut into."""
    full, alone = tile.rows, tile.alone
    return T.max((m + (full - 1)) // full, T.min(T.int64(2), (m + (alone - 1)) // alone))


def cut(m: Expr, tiles: Expr, most: int) -> tuple[Expr, Expr]:
    """Tiles and blocks of rows: one block, up to `TOGETHER` rows and as many tiles as it may have, or an even number.

    Where tasks go through all of the first half of the blocks before the others, half of the cores, or the one of two,
    have just half of the rows, as in kernels of single rows. Their caches may be far apart: in a virtual machine of two
    cores moving rows from one to the other was seen to take ten times as long as reading them again, where a processor
    has several third-level caches.

    Args:
        m: Rows.
        tiles: So many there are at least.
        most: Tiles of a block.
    """
    whole = T.And(m <= TOGETHER, tiles <= most)
    even = b.let("tiles", T.if_then_else(whole, tiles, T.truncdiv(tiles + 1, T.int64(2)) * 2))
    pairs = T.truncdiv(even + (2 * most - 1), T.int64(2 * most))
    return even, b.let("blocks", T.if_then_else(whole, T.int64(1), pairs * 2))


def write(operands: Operands, sums: Sums, height: Expr, first: Expr, panel: Expr) -> None:
    """Apply the epilogue to a tile of sums, and write it.

    Args:
        operands: The arguments.
        sums: Of the tile.
        height: Rows of the tile.
        first: Its first row in the result.
        panel: The panel of its columns.
    """
    problem, per_panel = operands.problem, operands.per_panel

    def element(row: Expr, offset: int, lanes: int) -> None:
        column = b.let("column", panel * per_panel + offset)

        def reduced(start: int, bias_start: Expr) -> Expr:
            value = sums.vector(row, start, lanes)
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
