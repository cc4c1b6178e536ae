"""Floats of two bytes, kept as their bits: widened to f32 exactly, and f32 rounded to them; NaN and infinities too."""

from tvm import tirx

from relax_llm.kernels.builder import Expr, splat, vector_type
from relax_llm.kernels.machine import Machine


def from_bf16(bits: Expr, lanes: int = 1) -> Expr:
    """The f32 that the bits of bf16 stand for."""
    return tirx.reinterpret(vector_type("float32", lanes), _wide(bits, lanes) << _const(16, lanes))


def pair_of_bf16(words: Expr, which: int, lanes: int = 1) -> Expr:
    """The f32 that the first or second bf16 of each word, int32 or uint32, stands for."""
    words = tirx.Cast(vector_type("uint32", lanes), words)
    bits = words & _const(0xFFFF0000, lanes) if which else words << _const(16, lanes)
    return tirx.reinterpret(vector_type("float32", lanes), bits)


def pair_of_integers(words: Expr, which: int, lanes: int = 1) -> Expr:
    """The first or second whole number of two bytes in each word, int32."""
    shift = splat(tirx.const(16, "int32"), lanes)
    return (words if which else words << shift) >> shift


def to_bf16(value: Expr, lanes: int = 1) -> Expr:
    """f32 rounded to bf16, to nearest, ties to even: its bits as the upper half of a uint32, whose lower half is 0."""
    bits = tirx.reinterpret(vector_type("uint32", lanes), value)
    odd = (bits >> _const(16, lanes)) & _const(1, lanes)
    rounded = (bits + (_const(0x7FFF, lanes) + odd)) & _const(0xFFFF0000, lanes)
    magnitude = bits & _const(0x7FFFFFFF, lanes)
    return tirx.Select(magnitude > _const(0x7F800000, lanes), _const(0x7FC00000, lanes), rounded)


def from_f16(bits: Expr, lanes: int = 1, machine: Machine | None = None) -> Expr:
    """The f32 that the bits of f16 stand for.

    Where the machine has an instruction, that; else the exponent is put right by a product, which is exact for
    subnormal numbers, too. Without a machine it is assumed to have none: a library function would be called.
    """
    if machine is not None and machine.features & {"f16c", "asimd"}:
        return tirx.Cast(vector_type("float32", lanes), tirx.reinterpret(vector_type("float16", lanes), bits))
    wide = _wide(bits, lanes)
    moved = (wide & _const(0x7FFF, lanes)) << _const(13, lanes)
    rebias = tirx.const(2.0**112, "float32")
    scaled = tirx.reinterpret(vector_type("float32", lanes), moved) * (
        tirx.Broadcast(rebias, lanes) if lanes > 1 else rebias
    )
    special = (wide & _const(0x7C00, lanes)).equal(_const(0x7C00, lanes))
    magnitude = tirx.Select(
        special, moved | _const(0x7F800000, lanes), tirx.reinterpret(vector_type("uint32", lanes), scaled)
    )
    sign = (wide & _const(0x8000, lanes)) << _const(16, lanes)
    return tirx.reinterpret(vector_type("float32", lanes), magnitude | sign)


def _wide(bits: Expr, lanes: int) -> Expr:
    return tirx.Cast(vector_type("uint32", lanes), bits)


def _const(value: int, lanes: int) -> Expr:
    return splat(tirx.const(value, "uint32"), lanes)
