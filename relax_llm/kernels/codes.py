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


def inverse_of(largest: Expr, most: float, lanes: int = 1) -> Expr:
    """What numbers up to a magnitude, of which these are the bits, are multiplied by to become up to `most`."""
    value = tirx.reinterpret("float32" if lanes == 1 else f"float32x{lanes}", largest)
    return tirx.Select(largest < _splat(_LEAST, lanes), _floats(0.0, lanes), _floats(most, lanes) / value)


def rounded(vector: Expr, lanes: int = LANES) -> Expr:
    """f32 of less than 2**22 rounded to nearest, ties to even, as int32."""
    return as_integers(vector + _floats(_MAGIC, lanes), lanes) - _splat(_MAGIC_BITS, lanes)


def as_integers(vector: Expr, lanes: int = LANES) -> Expr:
    """The bits of f32."""
    return tirx.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", vector)


def _splat(value: int, lanes: int) -> Expr:
    scalar = tirx.const(value, "int32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def _floats(value: float, lanes: int) -> Expr:
    scalar = tirx.const(value, "float32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)
