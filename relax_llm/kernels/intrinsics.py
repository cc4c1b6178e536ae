"""Instructions that TIR has no words for, as functions in LLVM IR that are copied into the kernels that call them.

TVM's own way, an intrinsic called with operands of bf16, ends in f32: a pass of TVM's rewrites all arithmetic of this
type. So operands are vectors of words, which are taken for what they hold in LLVM alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tvm.tirx.script.builder import ir as T

from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import LANES

BF16 = frozenset({"avx512_bf16"})
"""What a processor needs for the instructions over bf16."""

INT8 = frozenset({"avx512_vnni"})
"""What it needs for those over bytes, and over whole numbers of two bytes."""

_DOT, _ROUND = "relax_llm_dot_bf16", "relax_llm_round_bf16"

_LLVM = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)

define linkonce_odr <16 x float> @{_DOT}(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) alwaysinline {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %more = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %more
}}

define linkonce_odr <16 x i32> @{_ROUND}(<16 x float> %low, <16 x float> %high) alwaysinline {{
  %rounded = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %words = bitcast <32 x bfloat> %rounded to <16 x i32>
  ret <16 x i32> %words
}}
"""


@contextmanager
def imported() -> Iterator[None]:
    """Emit a body that uses the functions below."""
    with T.attr(0, "pragma_import_llvm", _LLVM):
        yield


def dot_bf16(total: Expr, one: Expr, other: Expr) -> Expr:
    """In each of 16 lanes: total plus the two products of the pairs of bf16 in two words. Subnormal numbers count as 0.

    Args:
        total: float32x16.
        one: Pairs as int32x16.
        other: As many others.
    """
    return T.call_pure_extern(f"float32x{LANES}", _DOT, total, one, other)


def dot_int8(total: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """In each of 16 lanes: total plus the four products of unsigned bytes with signed ones in two words.

    Args:
        total: int32x16.
        unsigned: 16 words.
        signed: As many others.
    """
    return _dot("vpdpbusd", f"int8x{4 * LANES}", total, unsigned, signed)


def dot_int16(total: Expr, one: Expr, other: Expr) -> Expr:
    """In each of 16 lanes: total plus the two products of the whole numbers of two bytes in two words.

    Args:
        total: int32x16.
        one: 16 words.
        other: As many others.
    """
    return _dot("vpdpwssd", f"int16x{2 * LANES}", total, one, other)


def round_bf16(low: Expr, high: Expr) -> Expr:
    """Two vectors of 16 f32, one behind the other, as 16 words: pairs of bf16, to nearest, ties to even."""
    return T.call_pure_extern(f"int32x{LANES}", _ROUND, low, high)


def _dot(instruction: str, elements: str, total: Expr, *words: Expr) -> Expr:
    """An instruction of VNNI over words that are taken for vectors of smaller whole numbers."""
    factors = [T.reinterpret(elements, one) for one in words]
    return T.call_llvm_pure_intrin(f"int32x{LANES}", f"llvm.x86.avx512.{instruction}.512", total, *factors)
