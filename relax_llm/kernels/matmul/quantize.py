"""Activations as integers: each row of x in groups of 32, with a scale for each, made anew in every launch.

A group is divided by a scale, so that its largest magnitude becomes the largest code, 127 in int8; or 127 * 256, where
a code has two bytes, in int16. In int7 scales are powers of two, and the largest code is between 64 and 127. What a
product needs beside the codes lies with them: the scale, and the sum of the codes for weights whose codes do not begin
at zero.
"""

import operator
from collections.abc import Callable, Sequence

from tvm import ir
from tvm.tirx.script.builder import ir as T

from relax_llm.formats import Blocks
from relax_llm.formats.activations import GROUP, Rounding
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.codes import biased, inverse_of, inverse_power, magnitude, power_of, rounded
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.machine import LANES, Machine

QUADS = GROUP // 4
"""Words of four codes in a group."""

BESIDE = 2
"""f32 beside the codes of a group: the scale, and what the sum of the codes is good for (see `quantize`)."""


_FAR = 1 << 20


def quantize(format: Blocks, rounding: Rounding, machine: Machine) -> ir.GlobalVar:
    """The function that quantizes groups that lie one after the other.

    ::

        quantize(x, codes, beside, groups, rows)

    `x` is the address of f32 [groups, 32]; `codes` that of int8 [groups, planes, 32], where a code is 256 times the
    first plane plus the second, if there are two; `beside` that of f32 [groups, 2]: the scale and, where the format has
    minimums, the scale times the sum of the codes. Where it has none it is the sum of the codes times that of zero,
    negative, as an int32: what a sum of products of unsigned codes begins with. A group with a number that is not
    finite has a scale that is not. The number of `rows` in all it does not use: LLVM does not know it, and keeps the
    function apart; see `inner.returning`.

    Where scales are powers of two, the first is 1.5 * 2**23 times the scale instead, and where the format has no
    minimums the second begins with the bits of this: `biased`. A group with a number of more than 127 * 2**104 counts
    as not finite.
    """
    most, planes = float(rounding.most), rounding.planes

    def emit() -> None:
        x_at, codes_at, beside_at = pointer("x"), pointer("codes", "int8"), pointer("beside")
        groups = number("groups")
        number("rows")
        x, codes, beside = (
            memory(x_at, (_FAR,)),
            memory(codes_at, (_FAR,), "int8"),
            memory(beside_at, (_FAR,)),
        )

        def halves(group: Expr) -> list[Expr]:
            return [T.Bind(b.load(x, group * GROUP + start)) for start in range(0, GROUP, LANES)]

        def encode(group: Expr, inverse: Expr) -> Expr:
            """Write the codes of a group, and give a vector whose lanes add up to their sum."""
            whole = []
            for index, half in enumerate(halves(group)):
                whole.append(T.Bind(rounded(half * b.splat(inverse))))
                parts = [whole[-1]]
                if planes == 2:
                    high = T.Bind(_shifted(T.shift_right, whole[-1] + T.broadcast(T.int32(128), LANES)))
                    parts = [high, whole[-1] - _shifted(T.shift_left, high)]
                for plane, part in enumerate(parts):
                    at = (group * planes + plane) * GROUP + index * LANES
                    b.store(codes, T.Cast(f"int8x{LANES}", part), at)
            return T.Bind(whole[0] + whole[1])

        def scaled(words: Expr, lanes: int) -> tuple[Expr, Expr, Expr]:
            """Of largest magnitudes the inverse of the scale, the scale, and what begins a sum, as int32."""
            floats = b.vector_type("float32", lanes)
            if rounding.powers:
                power = T.Bind(power_of(words, most, lanes))
                return inverse_power(power, lanes), T.reinterpret(floats, power), T.Bind(biased(power, lanes))
            scale = T.Bind(T.reinterpret(floats, words) / b.splat(most, lanes))
            return inverse_of(words, most, lanes), scale, b.splat(T.int32(0), lanes)

        def both(scale: Expr, begin: Expr, total: Expr, lanes: int) -> tuple[Expr, Expr]:
            """What lies beside the codes, as f32."""
            floats = b.vector_type("float32", lanes)
            first = T.reinterpret(floats, begin) if rounding.powers else scale
            if format.minimum:
                return first, scale * T.Cast(floats, total)
            return first, T.reinterpret(floats, begin + total * b.splat(T.int32(-format.zero), lanes))

        turns = b.let("turns", T.truncdiv(groups, T.int64(LANES)))
        with T.serial(turns) as turn:
            first = b.let("first", turn * LANES)
            words = T.Bind(across(T.max, [T.max(*map(magnitude, halves(first + i))) for i in range(LANES)]))
            inverses = b.local((LANES,))
            inverse, scales, begin = scaled(words, LANES)
            b.store(inverses, inverse, 0)
            totals = T.Bind(across(operator.add, [encode(first + i, inverses[i]) for i in range(LANES)]))
            pair = [T.Bind(vector) for vector in both(scales, begin, totals, LANES)]
            for half in range(BESIDE):
                order = [half * LANES // 2 + i // 2 + i % 2 * LANES for i in range(LANES)]
                b.store(beside, T.Shuffle(pair, order), first * BESIDE + half * LANES)
        with T.serial(groups - turns * LANES) as left:
            group = b.let("group", turns * LANES + left)
            word = T.Bind(b.fold(T.max(*map(magnitude, halves(group))), T.max))
            inverse, scale, begin = scaled(word, 1)
            total = T.Bind(b.fold(encode(group, T.Bind(inverse)), operator.add))
            for at, value in enumerate(both(scale, begin, total, 1)):
                b.put(beside, value, group * BESIDE + at)

    return inner(f"quantize_{rounding.name}_for_{format.name}", (machine,), emit)


def encode_row(
    encode: ir.GlobalVar,
    given: tuple[Expr, Expr],
    made: Sequence[Expr],
    row: Expr,
    rows: Expr,
    k: int,
    planes: int,
) -> None:
    """Emit the quantization of a row, the last group of which may have a rest.

    Args:
        encode: From `quantize`.
        given: A matrix [..., K], and which row of it.
        made: Codes int8 [M, groups * planes * 32], and what lies beside them f32 [M, groups * 2].
        row: Which row of these.
        rows: How many these have.
        k: Its elements.
        planes: Bytes of a code.
    """
    (x, at_row), (codes, beside) = given, made
    full = k // GROUP
    if full:
        places = [T.address_of(matrix[row, 0]) for matrix in (codes, beside)]
        b.call(encode, T.address_of(x[at_row, 0]), *places, T.int64(full), rows)
    if k % GROUP:
        last = b.local((GROUP,))
        for at, lanes in b.chunks(GROUP):
            b.store(last, b.splat(0.0), at, lanes=lanes)
        with T.serial(k % GROUP) as at:
            b.put(last, x[at_row, full * GROUP + at], at)
        b.call(
            encode,
            T.address_of(last[0]),
            T.address_of(codes[row, full * planes * GROUP]),
            T.address_of(beside[row, full * BESIDE]),
            T.int64(1),
            rows,
        )


def _shifted(shift: Expr, vector: Expr) -> Expr:
    """A vector of int32, shifted by a byte."""
    return shift(vector, T.broadcast(T.int32(8), LANES))


def across(combine: Callable[[Expr, Expr], Expr], vectors: Sequence[Expr]) -> Expr:
    """The lanes of each of 16 vectors combined, as the lanes of one: three instructions for each vector, and not eight.

    Neighbours are laid into one another and combined, so that half as many vectors are left each time.
    """
    for step in range(4):
        joined = []
        for one, other in zip(vectors[::2], vectors[1::2], strict=True):
            parts = [T.Shuffle([one, other], _order(step, part)) for part in range(2)]
            joined.append(b.kept(combine(*parts)))
        vectors = joined
    return vectors[0]


def _order(step: int, part: int) -> list[int]:
    """Which lanes of two vectors are laid into one another, as instructions do it: within 4 lanes, then such fours."""
    if step == 0:  # the low or the high two of each four, in turns
        return [
            four + 2 * part + at + which * LANES
            for four in (0, 4, 8, 12)
            for at in (0, 1)
            for which in (0, 1)
        ]
    if step == 1:  # pairs of them
        return [
            four + 2 * part + at + which * LANES
            for four in (0, 4, 8, 12)
            for which in (0, 1)
            for at in (0, 1)
        ]
    return [
        4 * (2 * four + part) + at + which * LANES for which in (0, 1) for four in (0, 1) for at in range(4)
    ]
