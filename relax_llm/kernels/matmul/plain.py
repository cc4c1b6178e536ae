"""Matrix products over a weight as it is in the checkpoint.

They serve the sizes that kernels of yours, which read it so, leave over. The packed layout is faster; these keep the
weight from being stored twice.
"""

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.tiled import tile_for


def plain_rows(problem: Matmul, machine: Machine) -> PrimFunc:
    """x [M, K], weight [N, K], out [M, N]: dot products along K, a block of outputs to a task. For small M."""
    block = 8

    def emit() -> None:
        rows = b.size("M")
        x, weight = b.argument("x", (rows, problem.k)), b.argument("weight", (problem.n, problem.k))
        out = b.argument("out", (rows, problem.n))

        def outputs(first: Expr, count: int) -> None:
            with T.serial(rows) as row:
                sums = [b.local((LANES,)) for _ in range(count)]
                for partial in sums:
                    b.store(partial, b.splat(0.0), 0)

                def add(at: Expr, n: int) -> None:
                    for i, partial in enumerate(sums):
                        product = b.load(x, row, at, lanes=n) * b.load(weight, first + i, at, lanes=n)
                        b.store(partial, b.load(partial, 0, lanes=n) + product, 0, lanes=n)

                b.sweep(problem.k, add)
                for i, partial in enumerate(sums):
                    b.put(out, b.reduce_lanes(partial, (), lambda one, other: one + other), row, first + i)

        full, rest = divmod(problem.n, block)
        if full:
            b.tasks(full, lambda index: outputs(index * block, block), name="block")
        if rest:
            outputs(T.int64(full * block), rest)

    return b.prim_func(f"plain_rows__{problem.name}", emit)


def plain_panels(problem: Matmul, machine: Machine) -> PrimFunc:
    """x [M, K], weight [N, K], out [M, N]: each task transposes a panel of the weight, then works register-tiled.

    The transposition pays from a few rows on.
    """
    tile = tile_for(machine)

    def emit() -> None:
        m = b.size("M")
        x, weight = b.argument("x", (m, problem.k)), b.argument("weight", (problem.n, problem.k))
        out = b.argument("out", (m, problem.n))

        def work(first_column: Expr, width: int) -> None:
            panel = T.alloc_buffer((problem.k, tile.cols), "float32")
            with T.serial(width) as column, T.serial(problem.k) as k:
                b.put(panel, weight[first_column + column, k], k, column)
            if width < tile.cols:
                with T.serial(problem.k) as k, T.serial(tile.cols - width) as column:
                    b.put(panel, T.float32(0), k, width + column)
            tiles = b.let("tiles", (m + (tile.rows - 1)) // tile.rows)
            with T.serial(tiles) as i:
                first = b.let("first", m * i // tiles)
                height = b.let("height", m * (i + 1) // tiles - first)
                for rows in range(1, tile.rows + 1):
                    with b.when(height == rows):
                        acc = b.Registers(rows, b.chunks(tile.cols))
                        acc.clear()
                        with T.serial(problem.k) as k:
                            for row, index, column, _ in acc:
                                product = b.splat(x[first + row, k]) * b.load(panel, k, column)
                                acc.set(row, index, acc.get(row, index) + product)
                        for row, index, column, lanes in acc:
                            kept = min(lanes, width - column)
                            if kept == lanes:
                                b.store(out, acc.get(row, index), first + row, first_column + column)
                            elif kept > 0:
                                value = acc.part(row, index, kept)
                                b.store(out, value, first + row, first_column + column, lanes=kept)

        full, rest = divmod(problem.n, tile.cols)
        if full:
            b.tasks(full, lambda index: work(index * tile.cols, tile.cols), name="panel")
        if rest:
            work(T.int64(full * tile.cols), rest)

    return b.prim_func(f"plain_panels__{problem.name}", emit)
