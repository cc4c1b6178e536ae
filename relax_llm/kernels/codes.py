"""Numbers as whole numbers of a scale: the largest magnitude of some, its inverse, and rounding to nearest."""

from collections.abc import Callable

from tvm import tirx

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import LANES

_MAGIC, _MAGIC_BITS = (
    12582912.0,
    0x4B400000,
)  # 1.5 * 2**23: added to a small number, it leaves that rounded at the end
_EXPONENT, _ONE = 0x7F800000, 0x3F800000  # the bits of an exponent, those of 1.0
_SMALLEST, _HIGHEST = 1 << 23, (127 + 105) << 23  # the bits of 2**-126 and 2**105
_LEAST = 7 << 23  # the bits of 2**-120: what is smaller has no inverse, and counts as 0

Channels = Callable[[int, int], Expr]
"""Gives neighbouring numbers of a row, from the first and how many they are."""


def largest_of(width: int, channels: Channels) -> Expr:
    """The bits of the largest magnitude in a row of some width, as `magnitude` orders them."""
    most = b.local((LANES,), "int32")
    b.store(most, _splat(0, LANES), 0)
    for start, n in b.chunks(width):
        b.store(most, tirx.max(b.load(most, 0, lanes=n), magnitude(channels(start, n), n)), 0, lanes=n)
    return b.let("largest", b.fold(b.load(most, 0), tirx.max))


def magnitude(vector: Expr, lanes: int = LANES) -> Expr:
    """The bits of magnitudes as int32: these are in the order of the magnitudes, and NaN is larger than all."""
    return as_integers(vector, lanes) & _splat(0x7FFFFFFF, lanes)


def inverse_of(largest: Expr, most: float, lanes: int = 1) -> Expr:
    """What numbers up to a magnitude, of which these are the bits, are multiplied by to become up to `most`."""
    value = tirx.reinterpret(b.vector_type("float32", lanes), largest)
    return tirx.Select(largest < _splat(_LEAST, lanes), _floats(0.0, lanes), _floats(most, lanes) / value)


def scale_of(largest: Expr, most: int) -> Expr:
    """The bits of the f32 that whole numbers up to `most` are multiplied by to become up to a magnitude."""
    return as_integers(tirx.reinterpret("float32", largest) * tirx.const(1 / most, "float32"), 1)


def power_of(largest: Expr, most: float, lanes: int = 1) -> Expr:
    """The bits of the smallest power of two that numbers up to a magnitude are at most `most` times as large as.

    At least 2**-126, and 2**105, of which `biased` is not a number, for magnitudes of more than most * 2**104 and for
    what is not finite.
    """
    value = tirx.reinterpret(b.vector_type("float32", lanes), largest) / _floats(most, lanes)
    bits = tirx.min(as_integers(value, lanes), _splat(_HIGHEST, lanes)) + _splat(_SMALLEST - 1, lanes)
    return tirx.max(bits & _splat(_EXPONENT, lanes), _splat(_SMALLEST, lanes))


def inverse_power(power: Expr, lanes: int = 1) -> Expr:
    """1 over a power of two, of which these are the bits, as f32."""
    return tirx.reinterpret(b.vector_type("float32", lanes), _splat(2 * _ONE, lanes) - power)


def biased(power: Expr, lanes: int = 1) -> Expr:
    """The bits of 1.5 * 2**23 times a power of two.

    A whole number of less than 2**22 that is added to them counts as so many times the power: read as f32, and less
    that number, they are the product, exactly. So sums of integers become f32 without being converted or multiplied.
    """
    return power + _splat(_MAGIC_BITS - _ONE, lanes)


def rounded(vector: Expr, lanes: int = LANES) -> Expr:
    """f32 of less than 2**22 rounded to nearest, ties to even, as int32."""
    return as_integers(vector + _floats(_MAGIC, lanes), lanes) - _splat(_MAGIC_BITS, lanes)


def as_integers(vector: Expr, lanes: int = LANES) -> Expr:
    """The bits of f32."""
    return tirx.reinterpret(b.vector_type("int32", lanes), vector)


def _splat(value: int, lanes: int) -> Expr:
    return b.splat(tirx.const(value, "int32"), lanes)


def _floats(value: float, lanes: int) -> Expr:
    return b.splat(tirx.const(value, "float32"), lanes)
