"""Products of quantized weights and quantized activations, in integers: `vpdpbusd` multiplies and adds four of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tvm import ir
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm import cpu
from relax_llm.formats import FORMATS, Blocks
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.halves import from_f16
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.intrinsics import INT8, dot_int8
from relax_llm.kernels.layout import TiledGroups
from relax_llm.kernels.machine import LANES, LINE, Machine
from relax_llm.kernels.matmul.operands import Operands, Sums, write
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.quantize import BESIDE, GROUP, QUADS, ROUNDINGS, Rounding, encode_row, quantize
from relax_llm.plan.kernel import Declined

FEATURES = INT8
"""What the kernel needs of a processor."""

FORMATS_READ = frozenset(name for name, format in FORMATS.items() if isinstance(format, Blocks))

_ROWS = 6  # of a tile: with 32 columns, 12 vectors of integers and 12 of their sums
_PART = 32  # groups of a panel that are multiplied at a time; they stay in a first-level cache
_TILES = 64  # in a block of rows
_AT_ONCE = 8  # rows that are quantized by one call
_SERIAL = 1 << 14  # elements of x that one core quantizes sooner than two could begin
_AHEAD = 4096  # bytes of weight that are asked for before they are needed
_FAR = 1 << 20
_MEMORY = 25e9  # bytes a second that a core reads
_PRODUCTS = 200e9  # multiply-adds a second of a core


def integer(problem: Matmul, machine: Machine, *, planes: int) -> PrimFunc:
    """The product over groups of integers of one or two bytes for activations, as coarse as the problem allows.

    First x [M, K] is quantized, for all tasks: `quantize`. Then each task has a panel of the weight and some rows.
    Every group is summed in integers, exactly; the sums of groups are multiplied by the two scales and added in f32, in
    ascending order, so that a row's result depends neither on the rows beside it nor on how the work was cut.

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
        m, x, cols = operands.m, operands.x, operands.tile.cols
        groups, rest = layout.blocks.groups(k), k % GROUP
        width = planes * GROUP
        codes = b.view(T.alloc_buffer((m * groups * width,), "int8"), (m, groups * width), "int8")
        beside = b.view(T.alloc_buffer((m * groups * BESIDE,), "float32"), (m, groups * BESIDE))
        encode = quantize(layout.blocks, rounding, machine)

        def some_rows(index: Expr) -> None:
            """Quantize rows without a rest, whose groups follow each other."""
            row = b.let("row", index * _AT_ONCE)
            count = b.let("count", T.min(m - row, T.int64(_AT_ONCE)) * groups)
            places = (T.address_of(matrix[row, 0]) for matrix in (x, codes, beside))
            b.call(encode, *places, count)

        small = m * k <= _SERIAL
        if rest:
            b.tasks(
                m,
                lambda row: encode_row(encode, (x, codes, beside), row, k, planes),
                serial_if=small,
                name="row",
            )
        else:
            b.tasks((m + (_AT_ONCE - 1)) // _AT_ONCE, some_rows, serial_if=small, name="rows")

        parts = -(-groups // _PART)
        tiles = b.let("tiles", (m + (_ROWS - 1)) // _ROWS)
        blocks = b.let("blocks", (tiles + (_TILES - 1)) // _TILES)

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
                operands.expect(first, height, panel)
                b.call(
                    multiply_integers(layout, rounding, machine),
                    height,
                    T.address_of(codes[first, begin * width]),
                    T.address_of(beside[first, begin * BESIDE]),
                    T.address_of(
                        operands.weight[panel * operands.panel_words + begin * (layout.group_bytes // 4)]
                    ),
                    sums.address,
                    T.int64(sums.apart),
                    T.int64(groups),
                    T.min(T.int64(_PART), groups - begin),
                    T.cast(part, "int64"),
                )
                if not operands.done:
                    with b.when(part == parts - 1):
                        write(operands, sums, height, first, panel)

        b.tasks(blocks * operands.panels, task, name="panel")

    return b.prim_func(f"integer{8 * planes}__{problem.name}", emit)


_POINTERS = (("codes", "int8"), ("beside", "float32"), ("weight", "float32"), ("sums", "float32"))
_NUMBERS = ("apart", "apart_groups", "groups", "carry")


def multiply_integers(layout: TiledGroups, rounding: Rounding, machine: Machine) -> ir.GlobalVar:
    """The function that adds a tile of products of integers to sums, over some groups.

    ::

        multiply_integers(height, codes, beside, weight, sums, apart, apart_groups, groups, carry)

    A tile has `height` rows and a panel's columns. `codes` and `beside` are the addresses of what `quantize` made of
    its first row's first group, with rows `apart_groups` groups apart; `weight` that of the panel there. The sums are
    `apart` elements from row to row, and begin from what is there if `carry` is not 0.
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
    format, cols, planes = layout.blocks, layout.cols, rounding.planes
    group_bytes, lines = layout.group_bytes, -(-layout.group_bytes // LINE)

    def emit() -> None:
        given = {name: pointer(name, dtype) for name, dtype in _POINTERS}
        apart, apart_groups, groups, carry = map(number, _NUMBERS)
        quads = memory(given["codes"], (_FAR,), "int32")
        beside, begins = (memory(given["beside"], (_FAR,), dtype) for dtype in ("float32", "int32"))
        words = memory(given["weight"], (_FAR,), "uint32")
        halves = memory(given["weight"], (_FAR,), "uint16")
        ahead = memory(given["weight"], (_FAR,))
        sums = memory(given["sums"], (_FAR,))
        acc = b.Registers(rows, b.chunks(cols))
        products = b.Registers(rows, b.chunks(cols), "int32")

        def load() -> None:
            for row, index, column, lanes in acc:
                acc.set(row, index, b.load(sums, row * apart + column, lanes=lanes))

        b.either(carry == 0, acc.clear, load)
        with T.serial(groups) as group:
            for line in range(lines):
                b.prefetch(ahead, (group * group_bytes + _AHEAD + line * LINE) // 4)
            for plane in range(planes):
                for row, index, _, lanes in products:
                    start = T.int32(0)
                    if plane == planes - 1 and (rounding.powers or not format.minimum):
                        start = begins[(row * apart_groups + group) * BESIDE + (not format.minimum)]
                    value = T.broadcast(start, lanes)
                    if plane:
                        value = T.shift_left(products.get(row, index), T.broadcast(T.int32(8), lanes)) + value
                    products.set(row, index, value)
                for index, (column, _) in enumerate(b.chunks(cols)):
                    quad_at = [((row * apart_groups + group) * planes + plane) * QUADS for row in range(rows)]
                    _add_group(products, index, layout, words, quads, group, column, quad_at)
            for index, (column, lanes) in enumerate(b.chunks(cols)):
                at = group * (group_bytes // 2) + layout.code_bytes // 2 + column
                scale = T.Bind(from_f16(b.load(halves, at, lanes=lanes), lanes, machine))
                least = None
                if format.minimum:
                    least = T.Bind(from_f16(b.load(halves, at + cols, lanes=lanes), lanes, machine))
                for row in range(rows):
                    own = (row * apart_groups + group) * BESIDE
                    floats = f"float32x{lanes}"
                    if rounding.powers:
                        value = T.reinterpret(floats, products.get(row, index)) - b.splat(beside[own], lanes)
                        factor = scale
                    else:
                        value = T.Cast(floats, products.get(row, index))
                        factor = scale * b.splat(beside[own], lanes)
                    total = acc.get(row, index) + value * factor
                    if least is not None:
                        total = total + least * b.splat(beside[own + 1], lanes)
                    acc.set(row, index, total)
        for row, index, column, lanes in acc:
            b.store(sums, acc.get(row, index), row * apart + column, lanes=lanes)

    return inner(f"multiply_{rounding.name}_{layout.name}_rows{rows}", (machine,), emit, entry=False)


def _add_group(
    products: b.Registers,
    index: int,
    layout: TiledGroups,
    words: Expr,
    quads: Expr,
    group: Expr,
    column: int,
    first: Sequence[Expr],
) -> None:
    """Add a group of a vector of columns to the products of every row, whose quads begin at `first`."""
    bits = layout.blocks.code_bits

    def stored(at: int) -> Expr:
        return T.Bind(b.load(words, group * (layout.group_bytes // 4) + at * layout.cols + column))

    def splat(value: int) -> Expr:
        return T.broadcast(T.uint32(value), LANES)

    pairs = [stored(QUADS // 2 + at) for at in range(2)] if bits == 6 else []

    def high_bits(quad: int) -> Expr:
        """The two high bits of a quad's codes, where these have them; they come from bits 2 * (quad // 2) on."""
        up = 4 - 2 * (quad // 2)
        moved = pairs[quad % 2]
        if up:
            moved = (T.shift_left if up > 0 else T.shift_right)(moved, splat(abs(up)))
        return T.bitwise_and(moved, splat(0x30303030))

    for at in range(QUADS if bits == 8 else QUADS // 2):
        both = stored(at)
        vectors = [(at, both)]
        if bits < 8:
            nibbles = splat(0x0F0F0F0F)
            high = T.shift_right(both, splat(4))
            vectors = [(at, T.bitwise_and(both, nibbles)), (at + QUADS // 2, T.bitwise_and(high, nibbles))]
        for quad, weights in vectors:
            weights = T.Bind(T.bitwise_or(weights, high_bits(quad)) if pairs else weights)
            for row, start in enumerate(first):
                four = quads[start + quad]
                products.set(
                    row, index, dot_int8(products.get(row, index), weights, T.broadcast(four, LANES))
                )


def integer_cost(planes: int) -> Callable[[Matmul, Mapping[str, int]], float]:
    """Seconds of a launch: reading the weight, or multiplying, both of which were measured."""

    def cost(problem: Matmul, sizes: Mapping[str, int]) -> float:
        memory = FORMATS[problem.weight_format].nbytes(problem.n, problem.k) / _MEMORY
        products = planes * problem.n * problem.k * sizes["M"] / _PRODUCTS
        return 1e-6 + max(memory, products) / max(1, cpu.cores())

    return cost
