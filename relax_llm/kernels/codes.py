"""Numbers as whole numbers of a scale: the largest magnitude of some, its inverse, and rounding to nearest."""

from tvm import tirx

from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import LANES

_MAGIC, _MAGIC_BITS = (
    12582912.0,
    0x4B400000,
)  # 1.5 * 2**23: added to a small number, it leaves that rounded at the end
_LEAST = 7 << 23  # the bits of 2**-120: what is smaller has no inverse, and counts as 0


def magnitude(vector: Expr, lanes: int = LANES) -> Expr:
    """The bits of magnitudes as int32: these are in the order of the magnitudes, and NaN is larger than all."""
    return as_integers(vector, lanes) & _splat(0x7FFFFFFF, lanes)


def inverse_of(largest: Expr, most: float) -> Expr:
    """What numbers up to a magnitude, of which these are the bits, are multiplied by to become up to `most`."""
    value = tirx.reinterpret("float32", largest)
    return tirx.if_then_else(
        largest < _LEAST, tirx.const(0.0, "float32"), tirx.const(most, "float32") / value
    )


def rounded(vector: Expr, lanes: int = LANES) -> Expr:
    """f32 of less than 2**22 rounded to nearest, ties to even, as int32."""
    magic = tirx.const(_MAGIC, "float32")
    moved = vector + (magic if lanes == 1 else tirx.Broadcast(magic, lanes))
    return as_integers(moved, lanes) - _splat(_MAGIC_BITS, lanes)


def as_integers(vector: Expr, lanes: int = LANES) -> Expr:
    """The bits of f32."""
    return tirx.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", vector)


def _splat(value: int, lanes: int) -> Expr:
    scalar = tirx.const(value, "int32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)
