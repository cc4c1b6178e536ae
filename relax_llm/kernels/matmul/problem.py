"""Matrix product with what is fused into it: out = residual + act(norm(x) @ weight.T + bias), or act(gate) * up.

x is [batch, seq, K]; a launch sees M = batch * seq rows. The weight is [N, K] in its format; a gated product uses its
first half as gate and the second as up.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from tvm import te, tirx
from tvm.tirx import PrimFunc

from relax_llm.errors import KernelError
from relax_llm.formats import FORMATS
from relax_llm.formats.activations import ROUNDINGS
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.elements import element
from relax_llm.kernels.layout import Plain
from relax_llm.kernels.norm import Norm, norm_reference, normalized
from relax_llm.kernels.problem import Problem, require_positive, tag


@dataclass(frozen=True)
class Matmul(Problem):
    """A matrix product and what is fused before and behind it.

    Attributes:
        n: Rows of the weight matrix; gated products have n / 2 outputs.
        k: Reduction length.
        weight_format: How the matrix is stored; a key of `relax_llm.formats.FORMATS`.
        bias: Add a vector of n after the reduction.
        activation: Applied after the bias (to the gate only, when gated); a key of `ACTIVATIONS`.
        gated: Multiply the activated first half of the outputs by the second half.
        residual: Add a tensor of the output's shape at the end.
        activations: "int8": x may be rounded to a 127th of the largest magnitude of each group of 32 along K; "int7":
            to twice that; "int16": to a 256th of it; "bf16": to bf16; None: it is to be taken as it is.
        norm: What each row of x goes through first; None: nothing.
    """

    operator: ClassVar[str] = "matmul"
    n: int
    k: int
    weight_format: str = "f32"
    bias: bool = False
    activation: str | None = None
    gated: bool = False
    residual: bool = False
    activations: str | None = None
    norm: Norm | None = None

    def __post_init__(self) -> None:
        require_positive(self, "n", "k")
        if self.weight_format not in FORMATS:
            raise KernelError(
                f"The weight format {self.weight_format!r} is not known; known: {', '.join(FORMATS)}."
            )
        if self.activations not in (None, "bf16", *ROUNDINGS):
            known = ", ".join(map(repr, ROUNDINGS))
            raise KernelError(f"Activations are None, {known} or 'bf16', not {self.activations!r}.")
        if self.norm is not None and self.norm.hidden != self.k:
            raise KernelError(f"A norm of {self.norm.hidden} elements does not fit a product of {self.k}.")
        if self.gated and self.n % 2:
            raise KernelError(f"A gated product needs an even number of rows of its weight, not {self.n}.")
        if self.activation is not None and self.activation not in IN_NUMPY:
            raise KernelError(
                f"The activation {self.activation!r} is not known; known: {', '.join(IN_NUMPY)}."
            )

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.gated else self.n

    @property
    def flops(self) -> str:
        product = f"{2 * self.n * self.k}*batch*seq"
        return product if self.norm is None else f"{product} + {self.norm.flops}"

    @property
    def bytes(self) -> str:
        weights = FORMATS[self.weight_format].nbytes(self.n, self.k) + 4 * self.n * self.bias
        if self.norm is not None:
            weights += 4 * self.k * (1 + self.norm.bias)
        return f"{weights} + {4 * (self.k + self.outputs * (1 + self.residual))}*batch*seq"


def arguments(problem: Matmul) -> list[str]:
    """Names of the tensors a matmul kernel takes, in order, the output last."""
    optional = [name for name in ("bias", "residual") if getattr(problem, name)]
    return ["x", "weight", *optional, *norm_arguments(problem), "out"]


def norm_arguments(problem: Matmul) -> list[str]:
    """Names of the vectors that the norm takes, in order."""
    return [] if problem.norm is None else [f"norm_{name}" for name in problem.norm.vectors]


def definition(problem: Matmul, *, flat: bool = False) -> PrimFunc:
    """The definition: plain loops over the weight as its format encodes it, to be scheduled or replaced.

    Before and after the fusion that asks for it::

        h = R.add(r, R.matmul(x, R.permute_dims(w)))
        h = R.call_tir(loops_matmul_n576_k1536_residual, (x, w, r))

    Args:
        problem: What to compute.
        flat: Take x as [M, K], as kernels do, and not as [batch, seq, K].
    """
    names = ("M",) if flat else ("batch", "seq")
    outer = tuple(tirx.Var(name, "int64") for name in names)
    x = te.placeholder((*outer, problem.k), name="x")
    plain = Plain(problem.weight_format)
    weight = te.placeholder(plain.shape(problem.n, problem.k), plain.dtype, name="weight")
    vectors = [te.placeholder((problem.k,), name=name) for name in norm_arguments(problem)]
    rows = x if problem.norm is None else normalized(problem.norm, x, *vectors)
    k = te.reduce_axis((0, problem.k), name="k")
    product = te.compute(
        (*outer, problem.n),
        lambda *at: te.sum(rows[_ending(at, k)] * element(plain, weight, at[-1], k), axis=k),
        name="matmul",
    )
    inputs, out = [x, weight], product
    if problem.bias:
        bias = te.placeholder((problem.n,), name="bias")
        inputs.append(bias)
        out = te.compute(product.shape, lambda *at: product[at] + bias[at[-1]], name="biased")
    biased = out
    activate = _SCALAR[problem.activation] if problem.activation else None
    half = problem.outputs
    if problem.gated:
        out = te.compute(
            (*outer, half),
            lambda *at: (activate or _identity)(biased[at]) * biased[_ending(at, at[-1] + half)],
            name="gated",
        )
    elif activate:
        out = te.compute(product.shape, lambda *at: activate(biased[at]), name="activated")
    if problem.residual:
        residual = te.placeholder((*outer, half), name="residual")
        inputs.append(residual)
        summed = out
        out = te.compute(summed.shape, lambda *at: summed[at] + residual[at], name="summed")
    func = te.create_prim_func([*inputs, *vectors, out])
    return tag(func.with_attr("global_symbol", f"loops_{problem.name}"), problem)


def reference(problem: Matmul, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """The result in float64.

    Args:
        problem: What to compute.
        inputs: "x" [M, K], "weight" [N, K] as floats, and where the problem has them "bias" [N], "residual"
            [M, outputs], and "norm_weight" and "norm_bias" [K].

    Returns:
        [M, outputs].
    """
    values = {name: value.astype(np.float64) for name, value in inputs.items()}
    x = values["x"]
    if problem.norm is not None:
        x = norm_reference(problem.norm, x, *(values[name] for name in norm_arguments(problem)))
    product = x @ values["weight"].T
    if problem.bias:
        product = product + values["bias"]
    gate = product[:, : problem.outputs]
    out: npt.NDArray[np.float64] = IN_NUMPY[problem.activation](gate) if problem.activation else gate
    if problem.gated:
        out = out * product[:, problem.outputs :]
    return out + values["residual"] if problem.residual else out


def _ending(at: tuple[Expr, ...], last: Expr) -> tuple[Expr, ...]:
    """Indices with another one for the last axis."""
    return (*at[:-1], last)


def _identity(x: Expr) -> Expr:
    return x


def _gelu_tanh(x: Expr) -> Expr:
    return x * tirx.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


_SCALAR = {
    "silu": lambda x: x * tirx.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1.0 + tirx.erf(x * 0.7071067811865476)),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: tirx.max(x, tirx.const(0.0, "float32")),
}

IN_NUMPY: dict[str, Callable[[Any], Any]] = {
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1.0 + np.vectorize(math.erf)(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
}
"""The activations in NumPy, by name."""
