"""A packed weight as vectors of f32: what every format's panels give to a kernel that multiplies floats.

Nothing is rounded on the way: each vector has the bits of `decode`, so a product has those of the f32 kernel on the
decoded weight.
"""

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.halves import from_f16
from relax_llm.kernels.layout import Packed, TiledGroups, TiledPairs
from relax_llm.kernels.machine import LANES, Machine

Reader = Callable[[Expr, int, int], Expr]
"""Gives the vector at (step after the beginning, the step's place in its turn of four, column)."""


def panel_words(layout: Packed, k: int) -> int:
    """Elements of four bytes from one panel of the weight to the next."""
    if isinstance(layout, TiledGroups):
        return layout.blocks.groups(k) * layout.group_bytes // 4
    if isinstance(layout, TiledPairs):
        return layout.cols * -(-k // 2)
    return layout.cols * k // (1 if layout.format == "f32" else 2)


def reader(
    layout: Packed, weight: Expr, panels: int, k: int, machine: Machine
) -> Callable[[Expr, Expr], Reader]:
    """What reads a panel from a step on.

    Args:
        layout: Of the weight.
        weight: The argument.
        panels: How many the weight has.
        k: The reduction length.
        machine: What code is generated for.

    Returns:
        A function of (panel, first step), a multiple of four.
    """
    if isinstance(layout, TiledGroups):
        return _groups(layout, weight, panels, k, machine)
    if isinstance(layout, TiledPairs):
        return _pairs(layout, weight, panels, k)
    if layout.format == "f16":
        return lambda panel, begin: (
            lambda step, _, column: from_f16(b.load(weight, panel, begin + step, column), LANES, machine)
        )
    return lambda panel, begin: lambda step, _, column: b.load(weight, panel, begin + step, column)


def _pairs(layout: TiledPairs, weight: Expr, panels: int, k: int) -> Callable[[Expr, Expr], Reader]:
    pairs = b.view(weight, (panels, panel_words(layout, k)), "uint32")

    def from_step(panel: Expr, begin: Expr) -> Reader:
        def widened(step: Expr, u: int, column: int) -> Expr:
            both = b.load(pairs, panel, (begin + (step - u % 2)) // 2 * layout.cols + column)
            bits = T.shift_left(both, T.broadcast(T.uint32(16), LANES))
            if u % 2:
                bits = T.bitwise_and(both, T.broadcast(T.uint32(0xFFFF0000), LANES))
            return T.reinterpret(f"float32x{LANES}", bits)

        return widened

    return from_step


def _groups(
    layout: TiledGroups, weight: Expr, panels: int, k: int, machine: Machine
) -> Callable[[Expr, Expr], Reader]:
    format, cols = layout.blocks, layout.cols
    groups = format.groups(k)
    shape = (panels, groups, layout.group_bytes)
    words = b.view(weight, (*shape[:2], shape[2] // 4), "uint32")
    halves = b.view(weight, (*shape[:2], shape[2] // 2), "uint16")

    def from_step(panel: Expr, begin: Expr) -> Reader:
        def half(group: Expr, which: int, column: int) -> Expr:
            at = layout.code_bytes // 2 + which * cols + column
            return from_f16(b.load(halves, panel, group, at), LANES, machine)

        def decoded(step: Expr, u: int, column: int) -> Expr:
            quad = (begin + (step - u)) // 4
            group, place = quad // 8, quad % 8

            def part(first: int, quads: int, width: int) -> Expr:
                """Bits of the codes from `quads` words of a column, each of which has some of several quads."""
                held = b.load(words, panel, group, (first + place % quads) * cols + column)
                shift = T.cast(place // quads * width + 8 * u, "uint32")
                mask = T.broadcast(T.uint32((1 << width) - 1), LANES)
                return T.bitwise_and(T.shift_right(held, T.broadcast(shift, LANES)), mask)

            bits = part(0, 8, 8) if format.code_bits == 8 else part(0, 4, 4)
            if format.code_bits == 6:
                bits = T.bitwise_or(bits, T.shift_left(part(4, 2, 2), T.broadcast(T.uint32(4), LANES)))
            value = T.Cast(f"float32x{LANES}", T.reinterpret(f"int32x{LANES}", bits))
            if format.zero:
                value = value - b.splat(float(format.zero))
            value = value * half(group, 0, column)
            return value + half(group, 1, column) if format.minimum else value

        return decoded

    return from_step
