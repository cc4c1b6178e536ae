"""Normalization over the hidden axis, one row of activations per task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from tvm import ir, te, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.inner import inner, memory, number, pointer
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.problem import Problem, require_positive, tag

_SERIAL_ROWS = 4


@dataclass(frozen=True)
class Norm(Problem):
    """RMSNorm (Zhang and Sennrich 2019), or LayerNorm (Ba et al. 2016) where `centered`.

    Attributes:
        hidden: Elements in a row.
        eps: Added to the variance.
        centered: Subtract the row's mean first.
        bias: Add a vector after the scale.
    """

    operator: ClassVar[str] = "norm"
    hidden: int
    eps: float
    centered: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "hidden")
        if self.eps < 0:
            raise KernelError(f"eps of a norm must not be negative, but is {self.eps}.")

    @property
    def vectors(self) -> tuple[str, ...]:
        """What its vectors of `hidden` elements are called, in order."""
        return ("weight", "bias") if self.bias else ("weight",)

    @property
    def flops(self) -> str:
        return f"{self.hidden * (4 + 2 * self.centered + self.bias)}*batch*seq"

    @property
    def bytes(self) -> str:
        return f"{8 * self.hidden}*batch*seq + {4 * self.hidden * (1 + self.bias)}"


def norm(problem: Norm, machine: Machine, *, flat: bool = False) -> PrimFunc:
    """x [batch, seq, hidden], weight [hidden], (bias [hidden]) -> out [batch, seq, hidden].

    Where `flat`, x and out are [M, hidden].
    """
    hidden = problem.hidden

    def emit() -> None:
        outer = (b.size("M"),) if flat else (b.size("batch"), b.size("seq"))
        x = b.argument("x", (*outer, hidden))
        vectors = [b.argument(name, (hidden,)) for name in problem.vectors]
        out = b.argument("out", (*outer, hidden))
        rows = math.prod(outer[1:], start=outer[0])
        normalize_rows(
            problem, machine, rows, b.view(x, (rows, hidden)), vectors, b.view(out, (rows, hidden))
        )

    return tag(b.prim_func(problem.name, emit), problem)


def normalize_rows(
    problem: Norm, machine: Machine, rows: Expr, x: Expr, vectors: Sequence[Expr], out: Expr
) -> None:
    """Emit the norm of all rows.

    Args:
        problem: The norm.
        machine: What code is generated for.
        rows: How many there are.
        x: [rows, hidden].
        vectors: The weight, and the bias where the norm has one.
        out: [rows, hidden].
    """

    def task(row: Expr) -> None:
        normalize_row(problem, machine, rows, (x, row), vectors, (out, row))

    b.tasks(rows, task, serial_if=rows <= _SERIAL_ROWS, name="row")


def normalize_row(
    problem: Norm,
    machine: Machine,
    rows: Expr,
    x: tuple[Expr, Expr],
    vectors: Sequence[Expr],
    out: tuple[Expr, Expr],
) -> None:
    """Emit the norm of a row of x, a matrix and which row of it, to that of `out`; else as in `normalize_rows`."""
    places = [T.address_of(matrix[row, 0]) for matrix, row in (x, out)]
    given = [T.address_of(vector[0]) for vector in vectors]
    b.call(_row_norm(problem, machine), places[0], *given, places[1], rows)


def _row_norm(problem: Norm, machine: Machine) -> ir.GlobalVar:
    """The function that normalizes a row.

    ::

        _row_norm(x, weight, (bias), out, rows)

    How many rows there are it does not use: LLVM does not know it, and keeps the function apart; see `inner.returning`.
    """
    hidden = problem.hidden

    def emit() -> None:
        x_at, weight_at = pointer("x"), pointer("weight")
        bias_at = pointer("bias") if problem.bias else None
        out_at = pointer("out")
        number("rows")
        x, weight, out = (memory(address, (hidden,)) for address in (x_at, weight_at, out_at))
        bias = None if bias_at is None else memory(bias_at, (hidden,))
        if problem.centered:
            total = b.row_sum(hidden, lambda at, n: b.load(x, at, lanes=n))
            mean = b.let("mean", total / T.float32(hidden))

        def centered(at: Expr, n: int) -> Expr:
            value = b.load(x, at, lanes=n)
            return value - b.splat(mean, n) if problem.centered else value

        def squared(at: Expr, n: int) -> Expr:
            value = b.let("value", centered(at, n))
            return value * value

        variance = b.row_sum(hidden, squared) / T.float32(hidden)
        scale = b.let("scale", T.float32(1) / T.sqrt(variance + T.float32(problem.eps)))

        def write(at: Expr, n: int) -> None:
            value = centered(at, n) * b.splat(scale, n) * b.load(weight, at, lanes=n)
            b.store(out, value if bias is None else value + b.load(bias, at, lanes=n), at, lanes=n)

        b.sweep(hidden, write)

    return inner(f"row_{problem.name}", (machine,), emit)


def normalized(problem: Norm, x: Expr, weight: Expr, bias: Expr | None = None) -> Expr:
    """The norm in tensor expressions, as plain loops: x [..., hidden], weight and bias [hidden].

    Its blocks are "mean" (where centered), "square" and "normalized".
    """
    *outer, hidden = x.shape
    size = tirx.const(float(problem.hidden), "float32")
    eps = tirx.const(problem.eps, "float32")
    centered = x
    if problem.centered:
        i = te.reduce_axis((0, hidden), name="i")
        mean = te.compute(outer, lambda *row: te.sum(_at(x, row, i), axis=i), name="mean")
        centered = te.compute(x.shape, lambda *at: x[at] - mean[at[:-1]] / size, name="centered")
    j = te.reduce_axis((0, hidden), name="j")
    square = te.compute(
        outer, lambda *row: te.sum(_at(centered, row, j) * _at(centered, row, j), axis=j), name="square"
    )

    def scaled(*at: Expr) -> Expr:
        value = centered[at] / tirx.sqrt(square[at[:-1]] / size + eps) * weight[at[-1]]
        return value if bias is None else value + bias[at[-1]]

    return te.compute(x.shape, scaled, name="normalized")


def _at(tensor: Expr, row: tuple[Expr, ...], column: Expr) -> Expr:
    at = (*row, column)
    return tensor[at]


def norm_reference(
    problem: Norm,
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.float64]:
    """The norm of rows [M, hidden] in float64."""
    x = x.astype(np.float64)
    if problem.centered:
        x = x - x.mean(axis=1, keepdims=True)
    right: npt.NDArray[np.float64] = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + problem.eps) * weight
    return right if bias is None else right + bias
