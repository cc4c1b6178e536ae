"""What a matmul kernel may leave to others: a norm before it; bias, activation, gate and residual behind it."""

from dataclasses import dataclass, replace
from typing import Any

from tvm.tirx import PrimFunc

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.norm import norm
from relax_llm.kernels.operators.norm import operands as norm_operands
from relax_llm.kernels.operators.operator import Operand
from relax_llm.kernels.vectormath import ACTIVATIONS
from relax_llm.plan.kernel import Kernel

_SERIAL_ROWS = 4
_FIELDS = {"bias": "bias", "activation": "activation", "gate": "gated", "residual": "residual"}
"""Epilogues in the order in which they apply, and the fields of the problem that ask for them."""


def core(problem: Matmul, kernel: Kernel) -> Matmul:
    """What a kernel computes of a problem: the product, and the epilogues up to the first it does not absorb.

    And the norm, where it absorbs that.
    """
    keep: dict[str, Any] = {"bias": False, "activation": None, "gated": False, "residual": False}
    keep["norm"] = problem.norm if "norm" in kernel.absorbs else None
    for epilogue, field in _FIELDS.items():
        if not getattr(problem, field):
            continue
        if epilogue not in kernel.absorbs:
            break
        keep[field] = getattr(problem, field)
    if problem.gated and keep["activation"] and not keep["gated"]:
        keep["activation"] = None  # the activation is the gate's alone
    return replace(problem, **keep)


@dataclass(frozen=True)
class Rest:
    """A function around a kernel.

    Attributes:
        name: Its symbol.
        func: The TIR function.
        operands: What it takes, in order.
    """

    name: str
    func: PrimFunc
    operands: tuple[Operand, ...]


def around(problem: Matmul, part: Matmul, machine: Machine) -> tuple[Rest | None, Rest | None]:
    """What computes, before and behind a kernel, what it leaves of a problem; None where that is nothing.

    Args:
        problem: What is to be computed.
        part: What the kernel computes: see `core`.
        machine: What code is generated for.
    """
    before = behind = None
    if problem.norm != part.norm:
        assert problem.norm is not None
        name = f"prologue_{problem.norm.name}"
        before = Rest(name, norm(problem.norm, machine, flat=True), norm_operands(problem.norm, None))
    if replace(problem, norm=part.norm) != part:
        name = f"epilogue_{problem.name}__{part.name}"
        behind = Rest(name, epilogue(problem, part, name), epilogue_operands(problem, part))
    return before, behind


def left_over(problem: Matmul, part: Matmul) -> list[str]:
    """The tensors that an epilogue reads beside the product."""
    return [name for name in ("bias", "residual") if getattr(problem, name) and not getattr(part, name)]


def is_separate(problem: Matmul, part: Matmul) -> bool:
    """Whether the product has another shape than the result, and needs memory of its own."""
    return problem.gated and not part.gated


def epilogue_operands(problem: Matmul, part: Matmul) -> tuple[Operand, ...]:
    """What an epilogue takes: (product [M, N]) where it is separate, (bias), (residual), out [M, outputs]."""
    product = [Operand("product", ("M", problem.n))] if is_separate(problem, part) else []
    known = {
        "bias": Operand("bias", (problem.n,), role="weight"),
        "residual": Operand("residual", ("M", problem.outputs)),
    }
    out = Operand("out", ("M", problem.outputs), role="output" if product else "updated")
    return (*product, *(known[name] for name in left_over(problem, part)), out)


def epilogue(problem: Matmul, part: Matmul, name: str) -> PrimFunc:
    """What a kernel leaves of a problem, elementwise: (product [M, N]), (bias), (residual), out [M, outputs].

    Where the product has the output's shape it is found in `out`, and replaced.
    """
    outputs = problem.outputs
    separate = is_separate(problem, part)

    def emit() -> None:
        rows = b.size("M")
        product_arg = b.argument("product", (rows, problem.n)) if separate else None
        left = left_over(problem, part)
        bias = b.argument("bias", (problem.n,)) if "bias" in left else None
        residual = b.argument("residual", (rows, outputs)) if "residual" in left else None
        out = b.argument("out", (rows, outputs))
        product = out if product_arg is None else product_arg

        def task(row: Expr) -> None:
            def element(at: Expr, n: int) -> None:
                def biased(start: Expr) -> Expr:
                    value = b.load(product, row, start, lanes=n)
                    return value if bias is None else value + b.load(bias, start, lanes=n)

                value = b.let("value", biased(at))
                if problem.activation and not part.activation:
                    value = b.let("activated", ACTIVATIONS[problem.activation](value))
                if separate:
                    value = value * biased(at + outputs)
                if residual is not None:
                    value = value + b.load(residual, row, at, lanes=n)
                b.store(out, value, row, at, lanes=n)

            b.sweep(outputs, element)

        b.tasks(rows, task, serial_if=rows <= _SERIAL_ROWS, name="row")

    return b.prim_func(name, emit)
