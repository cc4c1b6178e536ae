"""Activations as integers: each row of x in groups of 32, with a scale for each, made anew in every launch.

A group is divided by its largest magnitude and multiplied by the largest code, 127 in int8; or 127 * 256, where a code
has two bytes, in int16. What a product needs beside the codes lies with them: the scale, and the sum of the codes for
weights whose codes do not begin at zero.
"""

from tvm import ir
from tvm.tirx.script.builder import ir as T

from relax_llm.formats import Blocks
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.codes import inverse_of, magnitude, rounded
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.machine import LANES, Machine

GROUP = 32
QUADS = GROUP // 4
"""Words of four codes in a group."""

BESIDE = 2
"""f32 beside the codes of a group: the scale, and what the sum of the codes is good for (see `quantize`)."""

PLANES = {"int8": 1, "int16": 2}
"""Bytes of a code, by what a problem allows."""

MOST = {1: 127, 2: 127 << 8}
"""The largest code, by its bytes."""

_FAR = 1 << 20


def quantize(format: Blocks, planes: int, machine: Machine) -> ir.GlobalVar:
    """The function that quantizes groups that lie one after the other.

    ::

        quantize(x, codes, beside, groups)

    `x` is the address of f32 [groups, 32]; `codes` that of int8 [groups, planes, 32], where a code is 256 times the
    first plane plus the second, if there are two; `beside` that of f32 [groups, 2]: the scale and, where the format has
    minimums, the scale times the sum of the codes. Where it has none it is the sum of the codes times that of zero,
    negative, as an int32: what a sum of products of unsigned codes begins with. A group with a number that is not
    finite has a scale that is not.
    """
    most = float(MOST[planes])

    def emit() -> None:
        x_at, codes_at, beside_at = pointer("x"), pointer("codes", "int8"), pointer("beside")
        groups = number("groups")
        x, codes = memory(x_at, (_FAR,)), memory(codes_at, (_FAR,), "int8")
        beside, begins = memory(beside_at, (_FAR,)), memory(beside_at, (_FAR,), "int32")
        with T.serial(groups) as group:
            halves = [T.Bind(b.load(x, group * GROUP + start)) for start in range(0, GROUP, LANES)]
            word = T.Bind(_reduced("smax", T.max(*map(magnitude, halves))))
            inverse = T.Bind(inverse_of(word, most))
            scale = T.Bind(T.reinterpret("float32", word) / T.float32(most))
            whole = []
            for index, half in enumerate(halves):
                whole.append(T.Bind(rounded(half * b.splat(inverse))))
                parts = [whole[-1]]
                if planes == 2:
                    high = T.Bind(_shifted(T.shift_right, whole[-1] + T.broadcast(T.int32(128), LANES)))
                    parts = [high, whole[-1] - _shifted(T.shift_left, high)]
                for plane, part in enumerate(parts):
                    at = (group * planes + plane) * GROUP + index * LANES
                    b.store(codes, T.Cast(f"int8x{LANES}", part), at)
            total = T.Bind(_reduced("add", whole[0] + whole[1]))
            b.put(beside, scale, group * BESIDE)
            if format.minimum:
                b.put(beside, scale * T.Cast("float32", total), group * BESIDE + 1)
            else:
                b.put(begins, total * T.int32(-format.zero), group * BESIDE + 1)

    return inner(f"quantize_int{8 * planes}_for_{format.name}", (machine,), emit)


def _shifted(shift: Expr, vector: Expr) -> Expr:
    """A vector of int32, shifted by a byte."""
    return shift(vector, T.broadcast(T.int32(8), LANES))


def _reduced(how: str, vector: Expr) -> Expr:
    return T.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.{how}.v{LANES}i32", vector)
