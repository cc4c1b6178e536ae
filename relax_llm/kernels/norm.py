"""Normalization over the hidden axis, one row of activations per task."""

from dataclasses import dataclass
from typing import ClassVar

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
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
    def flops(self) -> str:
        return f"{self.hidden * (4 + 2 * self.centered + self.bias)}*batch*seq"

    @property
    def bytes(self) -> str:
        return f"{8 * self.hidden}*batch*seq + {4 * self.hidden * (1 + self.bias)}"


def norm(problem: Norm, machine: Machine) -> PrimFunc:
    """x [batch, seq, hidden], weight [hidden], (bias [hidden]) -> out [batch, seq, hidden]."""
    hidden = problem.hidden

    def emit() -> None:
        batch, seq = b.size("batch"), b.size("seq")
        x_arg = b.argument("x", (batch, seq, hidden))
        weight = b.argument("weight", (hidden,))
        bias = b.argument("bias", (hidden,)) if problem.bias else None
        out_arg = b.argument("out", (batch, seq, hidden))
        rows = batch * seq
        x, out = b.view(x_arg, (rows, hidden)), b.view(out_arg, (rows, hidden))

        def task(row: Expr) -> None:
            if problem.centered:
                total = b.row_sum(hidden, lambda at, n: b.load(x, row, at, lanes=n))
                mean = b.let("mean", total / T.float32(hidden))

            def centered(at: Expr, n: int) -> Expr:
                value = b.load(x, row, at, lanes=n)
                return value - b.splat(mean, n) if problem.centered else value

            def squared(at: Expr, n: int) -> Expr:
                value = b.let("value", centered(at, n))
                return value * value

            variance = b.row_sum(hidden, squared) / T.float32(hidden)
            scale = b.let("scale", T.float32(1) / T.sqrt(variance + T.float32(problem.eps)))

            def write(at: Expr, n: int) -> None:
                value = centered(at, n) * b.splat(scale, n) * b.load(weight, at, lanes=n)
                b.store(out, value if bias is None else value + b.load(bias, at, lanes=n), row, at, lanes=n)

            b.sweep(hidden, write)

        b.tasks(rows, task, serial_if=rows <= _SERIAL_ROWS, name="row")

    return tag(b.prim_func(problem.name, emit), problem)
