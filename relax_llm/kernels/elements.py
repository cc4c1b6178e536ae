"""One element of a stored matrix as f32, whatever its layout and format: for lookups, and for plain loops."""

from collections.abc import Callable

from tvm import tirx

from relax_llm.formats import Blocks, format_named
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.halves import from_bf16, from_f16
from relax_llm.kernels.layout import Packed, Plain, TiledGroups, TiledPairs


def element(layout: Plain | Packed, stored: Expr, row: Expr, column: Expr) -> Expr:
    """The element of a matrix [N, K] at a row and a column, from its buffer or te tensor in this layout."""
    if isinstance(layout, Plain):
        format = format_named(layout.format)
        if not isinstance(format, Blocks):
            return _float(layout.format, stored[row, column])
        start = column // format.group * format.block_bytes
        step = column % format.group
        head = format.block_bytes - format.code_bytes
        code = _code(format, lambda at: stored[row, start + head + at], step)
        if format.code_bits == 8:  # signed in a block of a file, unsigned in a panel
            code = code ^ tirx.const(format.zero, "int32")
        halves = [_half(stored[row, start + at], stored[row, start + at + 1]) for at in range(0, head, 2)]
        return _value(format, code, halves)
    panel, place = row // layout.cols, row % layout.cols
    if isinstance(layout, TiledPairs):
        return from_bf16(stored[panel, column // 2, place, column % 2])
    if isinstance(layout, TiledGroups):
        format = layout.blocks
        group, step = column // format.group, column % format.group

        def byte(at: Expr) -> Expr:
            return stored[panel, group, (at // 4 * layout.cols + place) * 4 + at % 4]

        code = _code(format, byte, step)
        starts = [
            layout.code_bytes + (which * layout.cols + place) * 2 for which in range(1 + format.minimum)
        ]
        halves = [_half(stored[panel, group, start], stored[panel, group, start + 1]) for start in starts]
        return _value(format, code, halves)
    return _float(layout.format, stored[panel, column, place])


def _float(format: str, stored: Expr) -> Expr:
    if format == "f32":
        return stored
    return from_bf16(stored) if format == "bf16" else from_f16(stored)


def _code(format: Blocks, byte: Callable[[Expr], Expr], step: Expr) -> Expr:
    """The code of a step, as int32, from the bytes of a group's codes."""

    def bits(first: int, count: int, width: int) -> Expr:
        """Those of the step in `count` bytes from the first on, each of which has some of several steps."""
        wide = tirx.Cast("int32", byte(first + step % count))
        return (wide >> tirx.Cast("int32", step // count * width)) & tirx.const((1 << width) - 1, "int32")

    if format.code_bits == 8:
        return tirx.Cast("int32", byte(step))
    half = format.group // 2
    low = bits(0, half, 4)
    return low if format.code_bits == 4 else low | bits(half, half // 2, 2) << tirx.const(4, "int32")


def _half(low: Expr, high: Expr) -> Expr:
    return from_f16(tirx.Cast("uint16", low) | (tirx.Cast("uint16", high) << tirx.const(8, "uint16")))


def _value(format: Blocks, code: Expr, halves: list[Expr]) -> Expr:
    value = tirx.Cast("float32", code - tirx.const(format.zero, "int32")) * halves[0]
    return value + halves[1] if format.minimum else value
