"""The micro-kernels: a tile of results kept in registers, in one function for each height.

They know nothing of a product but how its weight is stored and how far apart the rows of x lie. All kernels of a
library that agree in these share them.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from tvm import ir
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.intrinsics import dot_bf16, imported
from relax_llm.kernels.layout import Packed, Tiled, TiledGroups
from relax_llm.kernels.machine import LINE, Machine
from relax_llm.kernels.matmul.reading import Reader, panel_words, reader
from relax_llm.kernels.matmul.shape import UNROLL, tile_for

STREAMS = 2
"""Places that are read ahead of at once; see `multiply`."""

_WORDS = LINE // 4  # elements of four bytes in a cache line
_FAR = 1 << 20  # steps: micro-kernels do not know how many a panel has
_FEW_ROWS = 4  # of a tile that has little to do in a step

_POINTERS = ("x", "weight", "sums", "ahead", "beyond")
_NUMBERS = ("apart", "turns", "rest", "carry", "spacing")


def multiply(layout: Packed, stride: int, machine: Machine, *, pairs: bool = False) -> ir.GlobalVar:
    """The function that adds a tile of products to sums, over a part of the reduction.

    ::

        multiply(height, x, weight, sums, apart, turns, rest, carry, ahead, beyond, spacing)

    A tile has `height` rows, at most those of `tile_for(machine)`, and a panel's columns. `x` is the address of its
    first row at the part's first step, with rows `stride` elements apart; `weight` that of the panel there, at the
    start of a group where the format has some. The sums are `apart` elements from row to row; they begin from what is
    there if `carry` is not 0. The part has `turns` times `UNROLL` steps, and `rest` more. Every output is summed over
    k in ascending order, so that its bits depend neither on the height nor on where parts end.

    While it multiplies it asks for what is worked on next to come to the first-level cache: a core keeps too few
    misses of its own in flight to read memory at full speed, and its prefetcher looks only some lines ahead. From two
    places at once, `ahead` and `beyond`, the prefetcher follows both, with twice as many lines in flight. Each turn
    asks for lines `spacing` elements of four bytes further on. Few rows ask for a line of a turn, and from one
    place alone, where `Machine.reads_ahead`.

    With `pairs`, elements of x are words of two bf16, as those of the weight are, and a step of the reduction is one.
    """
    tile = tile_for(machine)
    layout = replace(layout, gated=False)  # which outputs the columns are is not known here

    def emit() -> None:
        height = number("height")
        given = [pointer(name, dtype) for name, dtype in _pointers(layout, pairs)]
        given += [number(name) for name in _NUMBERS]
        for rows in range(1, tile.rows + 1):
            with b.when(height == rows):
                b.call(_tile(layout, stride, rows, machine, pairs), *given)

    return inner(f"{_name(layout, pairs)}_stride{stride}", (machine,), emit)


def steps_of_loop(layout: Packed, rows: int, *, pairs: bool = False) -> int:
    """Steps of the reduction in a pass of a micro-kernel's loop.

    All of a turn where its rows are few, or its code depends on a step's place in the turn; else two, which is work
    enough to hide the loop behind.
    """
    if rows <= _FEW_ROWS or isinstance(layout, TiledGroups):
        return UNROLL
    return 2


def _is_uniform(layout: Packed, *, pairs: bool) -> bool:
    """Whether all steps of a turn have the same code."""
    return pairs or isinstance(layout, Tiled)


def _name(layout: Packed, pairs: bool) -> str:
    return f"multiply_{'pairs_' if pairs else ''}{layout.name}"


def _pointers(layout: Packed, pairs: bool) -> list[tuple[str, str]]:
    """The addresses that a micro-kernel takes, and what is there."""
    known = {"x": "int32" if pairs else "float32", "weight": layout.dtype}
    return [(name, known.get(name, "float32")) for name in _POINTERS]


def _tile(layout: Packed, stride: int, rows: int, machine: Machine, pairs: bool) -> ir.GlobalVar:
    """The function for one height, without that argument."""
    tile = tile_for(machine)
    unroll = steps_of_loop(layout, rows, pairs=pairs)
    # A pass of the loop asks for this many lines of each stream; tall tiles come in pairs, which share the work.
    words = layout.cols if pairs else panel_words(layout, 32) / 32  # of the weight in a step
    lines = math.ceil(unroll * words / (STREAMS * _WORDS))
    lines = lines if rows <= tile.alone else -(-lines // 2)
    whole = int(UNROLL * words) // STREAMS  # elements of a turn from each; a tile that asks for all is alone
    products = rows * len(b.chunks(layout.cols))  # of vectors, in a step
    sparse = machine.reads_ahead(products, words / _WORDS) and not isinstance(layout, TiledGroups)

    def emit() -> None:
        given = {name: pointer(name, dtype) for name, dtype in _pointers(layout, pairs)}
        apart, turns, rest, carry, spacing = map(number, _NUMBERS)
        x = memory(given["x"], (rows * stride,), "int32" if pairs else "float32")
        sums = memory(given["sums"], (_FAR,))
        streams = [memory(given[name], (_FAR,)) for name in ("ahead", "beyond")]
        vectors = (
            _pairs_at(given["weight"], layout.cols) if pairs else _floats_at(layout, given["weight"], machine)
        )
        acc = b.Registers(rows, b.chunks(layout.cols))

        def step(k: Expr, u: int) -> None:
            for row, index, column, lanes in acc:
                total, own, weights = acc.get(row, index), x[row * stride + k], vectors(k, u, column)
                own = T.broadcast(own, lanes)
                acc.set(row, index, dot_bf16(total, weights, own) if pairs else total + own * weights)

        passes = UNROLL // unroll  # of the loop in a turn
        alone = b.let("alone", spacing >= whole) if sparse else None

        def ask(turn: Expr, u: int, places: int, lines: int) -> None:
            """In a step of a pass, for its share of so many lines from each of some places."""
            begin = T.truncdiv(turn * (spacing * (STREAMS // places)), T.int64(passes))
            for at in range(u * lines * places // unroll, (u + 1) * lines * places // unroll):
                b.prefetch(streams[at % places], begin + at // places * _WORDS, machine.streams_into)

        def place(row: int, column: int) -> Expr:
            return row * apart + column

        def load() -> None:
            for row, index, column, lanes in acc:
                acc.set(row, index, b.load(sums, place(row, column), lanes=lanes))

        with imported() if pairs else nullcontext():
            b.either(carry == 0, acc.clear, load)
            with T.serial(turns * passes) as turn:
                for u in range(unroll):
                    if alone is not None:
                        b.either(alone, partial(ask, turn, u, 1, 1), partial(ask, turn, u, STREAMS, lines))
                    else:
                        ask(turn, u, STREAMS, lines)
                    step(turn * unroll + u, u)
            if _is_uniform(layout, pairs=pairs):
                with T.serial(rest) as more:
                    step(turns * UNROLL + more, 0)
            else:
                for u in range(UNROLL - 1):
                    with b.when(rest > u):
                        step(turns * UNROLL + u, u)
            for row, index, column, lanes in acc:
                b.store(sums, acc.get(row, index), place(row, column), lanes=lanes)

    name = f"{_name(layout, pairs)}_stride{stride}_rows{rows}"
    return inner(name, (machine,), emit, entry=False)


def _floats_at(layout: Packed, address: Expr, machine: Machine) -> Reader:
    """Gives vectors of the weight, as f32."""
    weight = memory(address, layout.shape(layout.cols, _FAR), layout.dtype)
    return reader(layout, weight, 1, _FAR, machine)(T.int64(0), T.int64(0))


def _pairs_at(address: Expr, cols: int) -> Reader:
    """Gives vectors of the weight, as words of two bf16."""
    words = memory(address, (_FAR, cols), "int32")
    return lambda pair, _, column: b.load(words, pair, column)
