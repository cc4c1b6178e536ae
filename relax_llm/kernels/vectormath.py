"""Elementary functions on f32 vectors: TIR's own become one libm call per lane.

Each takes and returns an expression of any lane count. Errors are measured against float64 and hold over all of f32;
NaN stays NaN.
"""

import math
from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from relax_llm.kernels.builder import Expr, vector_type

_LN2_FIRST, _LN2_REST = 0.693359375, -2.12194440e-4
"""ln 2 in two parts (Cody and Waite): products of the first with small integers are exact."""


def _lanes(x: Expr) -> int:
    return int(x.ty.dtype.lanes)


def _const(x: Expr, value: float) -> Expr:
    lanes = _lanes(x)
    return T.float32(value) if lanes == 1 else T.broadcast(T.float32(value), lanes)


def exp(x: Expr) -> Expr:
    """e**x within 2 ULP for -87.33 <= x <= 88.37; outside, what it is at these ends: 1.2e-38 and 2.4e+38.

    Cody and Waite's reduction to |r| <= ln(2)/2, then the Cephes library's degree-5 polynomial for (e**r - 1 - r)/r**2.
    """
    lanes = _lanes(x)
    c = lambda value: _const(x, value)  # noqa: E731
    # The constants come first: a comparison with NaN is false, and then min and max give their second operand.
    x = T.Bind(T.max(c(-87.3365478515625), T.min(c(88.3762626647949), x)))
    n = T.Bind(T.floor(x * c(math.log2(math.e)) + c(0.5)))
    r = T.Bind(x - n * c(_LN2_FIRST) - n * c(_LN2_REST))
    p = c(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c(coefficient)
    p = p * r * r + r + c(1.0)
    int_type = vector_type("int32", lanes)
    shift = T.int32(23) if lanes == 1 else T.broadcast(T.int32(23), lanes)
    bias = T.int32(127) if lanes == 1 else T.broadcast(T.int32(127), lanes)
    scale = T.reinterpret(vector_type("float32", lanes), T.shift_left(T.cast(n, int_type) + bias, shift))
    return p * scale


def exp_nonpositive(x: Expr, *, steady: bool = False) -> Expr:
    """e**x for x <= 0, for the weights of a softmax: exactly 1 at 0, and 0 below -87.7.

    Half the work of `exp`: within 3 + |x| / 30 ULP where multiply-adds are fused, else within 3 + |x|; one step more
    makes that 3 ULP for all x, where it is `steady`. Adding 1.5 * 2**23 rounds to an integer and leaves it in the
    lowest bits. The polynomial, for |r| <= ln(2)/2, is within 0.8 ULP of e**r (minimax, 1 at 0); its last step
    multiplies by 2**n, which is 0 for n = -127.
    """
    lanes = _lanes(x)
    c = lambda value: _const(x, value)  # noqa: E731
    rounder = c(1.5 * 2**23 + 127)
    x = T.Bind(T.max(c(-88.0), x))  # a comparison with NaN is false, and then max gives its second operand
    as_float = lambda bits: T.Bind(T.reinterpret(vector_type("float32", lanes), bits))  # noqa: E731
    # As bits in between: TVM would simplify a sum less one of its terms to the other, which is not rounded.
    bits = T.Bind(T.reinterpret(vector_type("int32", lanes), x * c(math.log2(math.e)) + rounder))
    n = T.Bind(as_float(bits) - rounder)
    r = T.Bind(x - n * c(_LN2_FIRST) - n * c(_LN2_REST) if steady else x - n * c(math.log(2.0)))
    shift = T.int32(23) if lanes == 1 else T.broadcast(T.int32(23), lanes)
    scale = as_float(T.shift_left(bits, shift))
    p = c(8.289569988846779e-3)
    for coefficient in (4.189782589673996e-2, 0.16667649149894714, 0.4999915063381195, 0.9999997019767761):
        p = p * r + c(coefficient)
    return p * (r * scale) + scale


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e**-x) within 4 ULP for x >= -87.33; 4e-39 far below."""
    return _const(x, 1.0) / (_const(x, 1.0) + exp(_const(x, 0.0) - x))


def times_sigmoid(value: Expr, x: Expr) -> Expr:
    """The product of a value and the sigmoid of x, as value * (1 or e**x) / (1 + e**-|x|); 0 for x below -87.7.

    It takes less time than `sigmoid`, which is above 0 for all x.
    """
    lanes = _lanes(x)
    bits = T.reinterpret(vector_type("int32", lanes), x)
    sign = T.int32(-(2**31)) if lanes == 1 else T.broadcast(T.int32(-(2**31)), lanes)
    decay = T.Bind(
        exp_nonpositive(T.Bind(T.reinterpret(vector_type("float32", lanes), bits | sign)), steady=True)
    )
    one = _const(x, 1.0)
    return T.Select(x < _const(x, 0.0), value * decay, value) / (one + decay)


def silu(x: Expr) -> Expr:
    """x * sigmoid(x) within 4 ULP for x >= -87.33, and within 8.5e-39 * |x| below."""
    return times_sigmoid(x, x)


def gelu_tanh(x: Expr) -> Expr:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3))), by way of tanh(z) = 2 sigmoid(2z) - 1.

    Within 2e-7 * max(1, |x|) absolutely.
    """
    inner = T.Bind(_const(x, 2.0 * math.sqrt(2.0 / math.pi)) * (x + _const(x, 0.044715) * x * x * x))
    return times_sigmoid(x, inner)


def erf(x: Expr) -> Expr:
    """The error function within 7e-7 absolutely: Abramowitz and Stegun, formula 7.1.26 (1.5e-7), in f32."""
    c = lambda value: _const(x, value)  # noqa: E731
    a = T.Bind(T.max(x, c(0.0) - x))
    t = T.Bind(c(1.0) / (c(1.0) + c(0.3275911) * a))
    p = c(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + c(coefficient)
    y = T.Bind(c(1.0) - p * t * exp(c(0.0) - a * a))
    return T.Select(x < c(0.0), c(0.0) - y, y)


def gelu(x: Expr) -> Expr:
    """0.5 x (1 + erf(x / sqrt(2))) within 3e-7 * max(1, |x|) absolutely."""
    return _const(x, 0.5) * x * (_const(x, 1.0) + erf(x * _const(x, math.sqrt(0.5))))


def relu(x: Expr) -> Expr:
    """max(x, 0)."""
    return T.max(_const(x, 0.0), x)


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
}
"""The activation functions that epilogues know, by the names that problems use."""
