"""The micro-kernels: a tile of results kept in registers, in one function for each height.

They know nothing of a product but how its weight is stored and how far apart the rows of x lie. All kernels of a
library that agree in these share them.
"""

from dataclasses import replace

from tvm import ir
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.layout import Packed
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.reading import panel_words, reader
from relax_llm.kernels.matmul.shape import UNROLL, tile_for

STREAMS = 2
"""Places that are read ahead of at once; see `multiply`."""

_LINE = 16  # elements of four bytes in a cache line
_FAR = 1 << 20  # steps: micro-kernels do not know how many a panel has

_POINTERS = ("x", "weight", "sums", "ahead", "beyond")
_NUMBERS = ("apart", "turns", "rest", "carry", "spacing")


def multiply(layout: Packed, stride: int, machine: Machine) -> ir.GlobalVar:
    """The function that adds a tile of products to sums, over a part of the reduction.

    ::

        multiply(height, x, weight, sums, apart, turns, rest, carry, ahead, beyond, spacing)

    A tile has `height` rows, at most those of `tile_for(machine)`, and a panel's columns. `x` is the address of its
    first row at the part's first step, with rows `stride` elements apart; `weight` that of the panel there, at the
    start of a group where the format has some. The sums are `apart` elements from row to row; they begin from what is
    there if `carry` is not 0. The part has `turns` times `UNROLL` steps, and `rest` more. Every output is summed over
    k in ascending order, so that its bits depend neither on the height nor on where parts end.

    While it multiplies it asks for what is worked on next to come to the second-level cache: a core keeps too few
    misses of its own in flight to read memory at full speed, and its prefetcher looks only some lines ahead. From two
    places at once, `ahead` and `beyond`, the prefetcher follows both, with twice as many lines in flight. Each turn
    asks for lines `spacing` elements of four bytes further on.
    """
    tile = tile_for(machine)
    layout = replace(layout, gated=False)  # which outputs the columns are is not known here

    def emit() -> None:
        height = number("height")
        given = [pointer(name, layout.dtype if name == "weight" else "float32") for name in _POINTERS]
        given += [number(name) for name in _NUMBERS]
        for rows in range(1, tile.rows + 1):
            with b.when(height == rows):
                b.call(_tile(layout, stride, rows, machine), *given)

    return inner(f"multiply_{layout.name}_stride{stride}", (machine,), emit)


def _tile(layout: Packed, stride: int, rows: int, machine: Machine) -> ir.GlobalVar:
    """The function for one height, without that argument."""
    tile = tile_for(machine)
    # A turn reads this many lines from each stream; tall tiles come in pairs, which share the work of asking.
    lines = -(-UNROLL * panel_words(layout, 32) // (32 * STREAMS * _LINE))
    lines = lines if rows <= tile.alone else -(-lines // 2)

    def emit() -> None:
        given = {name: pointer(name, layout.dtype if name == "weight" else "float32") for name in _POINTERS}
        apart, turns, rest, carry, spacing = map(number, _NUMBERS)
        x = memory(given["x"], (rows * stride,))
        weight = memory(given["weight"], layout.shape(tile.cols, _FAR), layout.dtype)
        sums = memory(given["sums"], (_FAR,))
        streams = [memory(given[name], (_FAR,)) for name in ("ahead", "beyond")]
        vectors = reader(layout, weight, 1, _FAR, machine)(T.int64(0), T.int64(0))
        acc = b.Registers(rows, b.chunks(tile.cols))

        def step(k: Expr, u: int) -> None:
            for row, index, column, _ in acc:
                product = b.splat(x[row * stride + k]) * vectors(k, u, column)
                acc.set(row, index, acc.get(row, index) + product)

        def place(row: int, column: int) -> Expr:
            return row * apart + column

        def load() -> None:
            for row, index, column, lanes in acc:
                acc.set(row, index, b.load(sums, place(row, column), lanes=lanes))

        b.either(carry == 0, acc.clear, load)
        with T.serial(turns) as turn:
            for u in range(UNROLL):
                for at in range(u * lines * STREAMS // UNROLL, (u + 1) * lines * STREAMS // UNROLL):
                    b.prefetch(streams[at % STREAMS], turn * spacing + at // STREAMS * _LINE)
                step(turn * UNROLL + u, u)
        for u in range(UNROLL - 1):
            with b.when(rest > u):
                step(turns * UNROLL + u, u)
        for row, index, column, lanes in acc:
            b.store(sums, acc.get(row, index), place(row, column), lanes=lanes)

    return inner(f"multiply_{layout.name}_stride{stride}_rows{rows}", (machine,), emit, entry=False)
