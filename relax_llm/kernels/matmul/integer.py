"""Products of quantized weights and quantized activations, in integers: `vpdpbusd` multiplies and adds four of each."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from tvm import ir
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm import cpu
from relax_llm.formats import FORMATS, Blocks
from relax_llm.formats.activations import GROUP, ROUNDINGS, Rounding
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.halves import from_f16
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.intrinsics import INT8, dot_int8
from relax_llm.kernels.layout import TiledGroups
from relax_llm.kernels.machine import LANES, LINE, Machine
from relax_llm.kernels.matmul.operands import Operands, Sums, cut, write
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.quantize import BESIDE, QUADS, encode_row, quantize
from relax_llm.plan.kernel import Declined

FEATURES = INT8
"""What the kernel needs of a processor."""

FORMATS_READ = frozenset(name for name, format in FORMATS.items() if isinstance(format, Blocks))

_ROWS = 6  # of a tile: with 32 columns, 12 vectors of integers and 12 of their sums
_PART = 32  # groups of a panel that are multiplied at a time; they stay in a first-level cache
_TILES = 32  # in a block of rows
_AT_ONCE = 8  # rows that are quantized by one call
_SERIAL = 1 << 14  # elements of x that one core quantizes sooner than two could begin
_SUMS = 24  # vectors of them that there are registers for
_APART = 4  # elements between what turns ask for, at least, where tiles are few
_FAR = 1 << 20
_MEMORY = 25e9  # bytes a second that a core reads
_PRODUCTS = 200e9  # multiply-adds a second of a core


def integer(problem: Matmul, machine: Machine, *, planes: int) -> PrimFunc:
    """The product over groups of integers of one or two bytes for activations, as coarse as the problem allows.

    First x [M, K] goes through the norm, where there is one, and is quantized, for all tasks: `quantize`. Then each
    task has a panel of the weight and some rows. Every group is summed in integers, exactly; the sums of groups are
    multiplied by the two scales and added in f32, in ascending order, so that a row's result depends neither on the
    rows beside it nor on how the work was cut.

    Raises:
        Declined: The problem does not allow to round its activations so.
    """
    allowed = ROUNDINGS.get(problem.activations or "")
    if allowed is None or allowed.planes > planes:
        wanted = problem.activations or "f32"
        raise Declined(f"rounds activations to int{8 * planes}, and the problem wants them in {wanted}")
    rounding = allowed if allowed.planes == planes else ROUNDINGS["int16"]
    k = problem.k

    def emit() -> None:
        operands = Operands.declare(problem, machine, flat=True)
        layout = operands.layout
        assert isinstance(layout, TiledGroups)
        m, cols = operands.m, operands.tile.cols
        groups, rest = layout.blocks.groups(k), k % GROUP
        width, group_words = planes * GROUP, layout.group_bytes // 4
        codes = b.view(T.alloc_buffer((m * groups * width,), "int8"), (m, groups * width), "int8")
        beside = b.view(T.alloc_buffer((m * groups * BESIDE,), "float32"), (m, groups * BESIDE))
        encode = quantize(layout.blocks, rounding, machine)

        def some_rows(index: Expr) -> None:
            """Quantize rows without a rest, whose groups follow each other."""
            row = b.let("row", index * _AT_ONCE)
            count = b.let("count", T.min(m - row, T.int64(_AT_ONCE)))
            x, first = operands.some_normalized(row, count, _AT_ONCE)
            places = [T.address_of(matrix[row, 0]) for matrix in (codes, beside)]
            b.call(encode, T.address_of(x[first, 0]), *places, count * groups, m)

        def with_rest(row: Expr) -> None:
            x, first = operands.some_normalized(row, T.int64(1), 1)
            encode_row(encode, (x, first), (codes, beside), row, m, k, planes)

        small = m * k <= _SERIAL
        if rest:
            b.tasks(m, with_rest, serial_if=small, name="row")
        else:
            b.tasks((m + (_AT_ONCE - 1)) // _AT_ONCE, some_rows, serial_if=small, name="rows")

        parts = -(-groups // _PART)
        tiles, blocks = cut(m, b.let("fewest", (m + (_ROWS - 1)) // _ROWS), _TILES)

        def task(index: Expr) -> None:
            block = b.let("block", index // operands.panels)
            panel = b.let("panel", index % operands.panels)
            start = b.let("start", tiles * block // blocks)
            own = b.let("own", tiles * (block + 1) // blocks - start)
            top = b.let("top", m * start // tiles)
            kept = None
            if not operands.direct:
                kept = b.stack((_TILES * _ROWS if parts > 1 else _ROWS, cols))
            with T.serial(parts) as part, T.serial(own) as i:
                first = b.let("first", m * (start + i) // tiles)
                height = b.let("height", m * (start + i + 1) // tiles - first)
                at = b.let("at", first - top) if parts > 1 else T.int64(0)
                sums = operands.in_place(first, panel) if kept is None else Sums(kept, (at, T.int64(0)), cols)
                begin = b.let("begin", part * _PART)
                count = b.let("count", T.min(T.int64(_PART), groups - begin))
                place = b.let("place", panel * operands.panel_words + begin * group_words)
                # All tiles that work on these groups ask for those behind them, each for its share, so that memory is
                # read all the time, and not while the first tile of a panel is multiplied. One that is alone asks for
                # what it needs itself soon.
                turns = T.int64(turns_of(layout))
                spacing = b.let("spacing", spacing_of(layout, own))
                behind = count * (group_words + i * turns * spacing)
                ahead = b.let("ahead", place + T.if_then_else(own == 1, T.int64(ahead_of(machine)), behind))
                operands.expect(first, height, panel)
                b.call(
                    multiply_integers(layout, rounding, machine),
                    height,
                    T.address_of(codes[first, begin * width]),
                    T.address_of(beside[first, begin * BESIDE]),
                    T.address_of(operands.weight[place]),
                    sums.address,
                    T.address_of(operands.weight[ahead]),
                    T.int64(sums.apart),
                    T.int64(groups),
                    count,
                    turns,
                    spacing,
                    T.cast(part, "int64"),
                )
                if not operands.done:
                    with b.when(part == parts - 1):
                        write(operands, sums, height, first, panel)

        b.tasks(blocks * operands.panels, task, name="panel")

    return b.prim_func(f"integer{8 * planes}__{problem.name}", emit)


def ahead_of(machine: Machine) -> int:
    """How far ahead of itself a tile asks for its weight that works on it alone, in elements of four bytes.

    Into a first-level cache not as far as into the second one.
    """
    return 1024 * machine.streams_into


def turns_of(layout: TiledGroups) -> int:
    """Turns of a micro-kernel's loop in a group; see `_add_quads`."""
    return QUADS // (4 if layout.blocks.code_bits == 6 else 2)


def spacing_of(layout: TiledGroups, tiles: Expr) -> Expr:
    """How far apart the places are that turns ask for, so that some tiles together ask for as much as they read."""
    return T.truncdiv(tiles + (layout.group_bytes // 4 // turns_of(layout) - 1), tiles)


_POINTERS = (
    ("codes", "int8"),
    *((name, "float32") for name in ("beside", "weight", "sums", "ahead")),
)
_NUMBERS = ("apart", "apart_groups", "groups", "turns", "spacing", "carry")


def multiply_integers(layout: TiledGroups, rounding: Rounding, machine: Machine) -> ir.GlobalVar:
    """The function that adds a tile of products of integers to sums, over some groups.

    ::

        multiply_integers(
            height, codes, beside, weight, sums, ahead, apart, apart_groups, groups, turns, spacing, carry
        )

    A tile has `height` rows and a panel's columns. `codes` and `beside` are the addresses of what `quantize` made of
    its first row's first group, with rows `apart_groups` groups apart; `weight` that of the panel there. The sums are
    `apart` elements from row to row, and begin from what is there if `carry` is not 0. Each group takes
    `turns_of(layout)` turns of a loop, each of which asks for lines from `ahead` on, `spacing` elements of four bytes
    behind those of the turn before.
    """
    layout = replace(layout, gated=False)

    def emit() -> None:
        height = number("height")
        given = [pointer(name, dtype) for name, dtype in _POINTERS] + [number(name) for name in _NUMBERS]
        for rows in range(1, _ROWS + 1):
            with b.when(height == rows):
                b.call(_tile(layout, rounding, rows, machine), *given)

    return inner(f"multiply_{rounding.name}_{layout.name}", (machine,), emit)


def _tile(layout: TiledGroups, rounding: Rounding, rows: int, machine: Machine) -> ir.GlobalVar:
    """The function for one height, without that argument."""
    format, cols, planes, group_bytes = layout.blocks, layout.cols, rounding.planes, layout.group_bytes

    # What a turn asks for. Of many tall tiles each asks for a half. To take codes apart takes as long as to multiply.
    level = machine.streams_into
    lines = -(-group_bytes // (LINE * turns_of(layout)))
    whole = group_bytes // 4 // turns_of(layout)  # elements of a turn; a tile that asks for all is alone
    work = rows * planes * len(b.chunks(cols)) * QUADS  # products in a group
    sparse = format.code_bits == 8 and machine.reads_ahead(work, group_bytes // LINE)
    of_many = lines if rows <= _ROWS // 2 else -(-lines // 2)

    def emit() -> None:
        given = {name: pointer(name, dtype) for name, dtype in _POINTERS}
        apart, apart_groups, groups, turns, spacing, carry = map(number, _NUMBERS)
        quads = memory(given["codes"], (_FAR,), "int32")
        beside, begins = (memory(given["beside"], (_FAR,), dtype) for dtype in ("float32", "int32"))
        words = memory(given["weight"], (_FAR,), "uint32")
        halves = memory(given["weight"], (_FAR,), "uint16")
        ahead = memory(given["ahead"], (_FAR,))
        sums = memory(given["sums"], (_FAR,))
        acc = b.Registers(rows, b.chunks(cols))
        products = [b.Registers(rows, b.chunks(cols), "int32") for _ in range(planes)]
        # All planes at once, where they have registers: then each weight is loaded, and taken apart, once.
        at_once = (planes + 1) * rows * len(b.chunks(cols)) <= _SUMS
        passes = [range(planes)] if at_once else [range(plane, plane + 1) for plane in range(planes)]

        def higher(row: int, index: int, lanes: int) -> Expr:
            """What the products of higher bytes add to those of lower ones."""
            return T.shift_left(products[0].get(row, index), T.broadcast(T.int32(8), lanes))

        def ask(turn: Expr, which: Iterable[int]) -> None:
            for line in which:
                b.prefetch(ahead, turn * spacing + line * (LINE // 4), level)

        def load() -> None:
            for row, index, column, lanes in acc:
                acc.set(row, index, b.load(sums, row * apart + column, lanes=lanes))

        b.either(carry == 0, acc.clear, load)
        with T.serial(groups) as group:
            for these in passes:
                for plane in these:
                    for row, index, _, lanes in products[plane]:
                        start = T.int32(0)
                        if plane == planes - 1 and (rounding.powers or not format.minimum):
                            start = begins[(row * apart_groups + group) * BESIDE + (not format.minimum)]
                        value = T.broadcast(start, lanes)
                        if plane and not at_once:
                            value = value + higher(row, index, lanes)
                        products[plane].set(row, index, value)
                into = [
                    (products[plane], row, ((row * apart_groups + group) * planes + plane) * QUADS)
                    for row in range(rows)
                    for plane in these
                ]
                if 0 in these and of_many < lines:
                    few = spacing >= _APART
                    with b.when(T.And(few, spacing < whole) if sparse else few):
                        for index in range(turns_of(layout)):
                            ask(group * turns + index, range(of_many, lines))
                for turn in _each_turn(layout, turns):
                    if 0 in these:
                        ask(group * turns + turn, range(1 if sparse else of_many))
                        if sparse:
                            with b.when(spacing < whole):
                                ask(group * turns + turn, range(1, of_many))
                    _add_quads(into, layout, words, quads, group, turn)
            for index, (column, lanes) in enumerate(b.chunks(cols)):
                at = group * (group_bytes // 2) + layout.code_bytes // 2 + column
                scale = T.Bind(from_f16(b.load(halves, at, lanes=lanes), lanes, machine))
                least = None
                if format.minimum:
                    least = T.Bind(from_f16(b.load(halves, at + cols, lanes=lanes), lanes, machine))
                for row in range(rows):
                    own = (row * apart_groups + group) * BESIDE
                    total = products[-1].get(row, index)
                    if planes > 1 and at_once:
                        total = total + higher(row, index, lanes)
                    floats = f"float32x{lanes}"
                    if rounding.powers:
                        value = T.reinterpret(floats, total) - b.splat(beside[own], lanes)
                        factor = scale
                    else:
                        value = T.Cast(floats, total)
                        factor = scale * b.splat(beside[own], lanes)
                    result = acc.get(row, index) + value * factor
                    if least is not None:
                        result = result + least * b.splat(beside[own + 1], lanes)
                    acc.set(row, index, result)
        for row, index, column, lanes in acc:
            b.store(sums, acc.get(row, index), row * apart + column, lanes=lanes)

    return inner(f"multiply_{rounding.name}_{layout.name}_rows{rows}", (machine,), emit, entry=False)


def _each_turn(layout: TiledGroups, turns: Expr) -> Iterator[Expr]:
    """Gives the turns of a group, as one that stands for all in a loop of codes of a byte.

    All of these one after the other are so much alike that LLVM asks for the quads of some rows long before they are
    needed, and has no registers for the sums.
    """
    if layout.blocks.code_bits == 8:
        with T.serial(turns) as turn:
            yield turn
    else:
        yield from map(T.int64, range(turns_of(layout)))


def _add_quads(
    into: Sequence[tuple[b.Registers, int, Expr]],
    layout: TiledGroups,
    words: Expr,
    quads: Expr,
    group: Expr,
    turn: Expr,
) -> None:
    """Add a turn of a group to products: for each row its registers, its place in them, and where its quads begin.

    A turn has two quads of codes of a byte, or what is in one word of such of four bits: a quad, and the one that is
    half a group further on. Of six bits it has two such words, and what two more words have for them: the high bits.
    """
    bits, columns = layout.blocks.code_bits, [column for column, _ in b.chunks(layout.cols)]

    def stored(at: Expr) -> list[Expr]:
        start = group * (layout.group_bytes // 4) + at * layout.cols
        return [T.Bind(b.load(words, start + column)) for column in columns]

    def splat(value: int) -> Expr:
        return T.broadcast(T.uint32(value), LANES)

    def add(quad: Expr, weights: list[Expr]) -> None:
        weights = list(map(T.Bind, weights))
        for products, row, start in into:
            four = T.Bind(T.broadcast(quads[start + quad], LANES))
            for index, vector in enumerate(weights):
                products.set(row, index, dot_int8(products.get(row, index), vector, four))

    if bits == 8:
        for u in range(2):
            add(turn * 2 + u, stored(turn * 2 + u))
        return
    nibbles = splat(0x0F0F0F0F)
    count = 2 if bits == 6 else 1
    for u in range(count):
        at = turn * count + u
        held = stored(at)
        low = [T.bitwise_and(word, nibbles) for word in held]
        high = [T.bitwise_and(T.shift_right(word, splat(4)), nibbles) for word in held]
        if bits == 6:
            pairs, by = stored(T.int64(QUADS // 2 + u)), T.cast(turn * 2, "uint32")

            def joined(codes: list[Expr], moved: list[Expr]) -> list[Expr]:
                mask = splat(0x30303030)
                return [
                    T.bitwise_or(*both)
                    for both in zip(codes, (T.bitwise_and(m, mask) for m in moved), strict=True)
                ]

            low = joined(low, [T.shift_left(word, T.broadcast(T.uint32(4) - by, LANES)) for word in pairs])
            high = joined(high, [T.shift_right(word, T.broadcast(by, LANES)) for word in pairs])
        add(at, low)
        add(at + QUADS // 2, high)


def integer_cost(planes: int) -> Callable[[Matmul, Mapping[str, int]], float]:
    """Seconds of a launch: reading the weight, or multiplying, both of which were measured."""

    def cost(problem: Matmul, sizes: Mapping[str, int]) -> float:
        memory = FORMATS[problem.weight_format].nbytes(problem.n, problem.k) / _MEMORY
        products = planes * problem.n * problem.k * sizes["M"] / _PRODUCTS
        return 1e-6 + max(memory, products) / max(1, cpu.cores())

    return cost
