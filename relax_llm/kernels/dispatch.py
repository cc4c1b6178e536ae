"""Choice by size inside the compiled code: one function for a problem that calls one of several kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import ir, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.matmul import Matmul, arguments
from relax_llm.kernels.problem import tag
from relax_llm.kernels.vectormath import ACTIVATIONS

INTERNAL = "relax_llm.internal"
"""Function attribute of kernels that only a dispatcher calls; they keep no symbol in the library."""

_SERIAL_ROWS = 4
_CPU = 1


@dataclass(frozen=True)
class Branch:
    """What a dispatcher does for one range of rows.

    Attributes:
        last: The most rows of the range; None for the last range. Ranges follow one another.
        core: What the kernel computes of the problem.
        kernel: The kernel, internal.
        epilogue: What computes the rest, internal; None where the kernel computes all.
    """

    last: int | None
    core: Matmul
    kernel: ir.GlobalVar
    epilogue: ir.GlobalVar | None


def internal(func: PrimFunc, name: str) -> PrimFunc:
    """A function over tensors as one over pointers and sizes, callable from other functions of its module.

    ::

        def mine(x: T.Buffer((M, 64)), out: T.Buffer((M, 48)))      def mine(x: T.handle, out: T.handle, M: T.int64)
    """
    tensors = list(func.params)
    sizes: list[tirx.Var] = []
    for tensor in tensors:
        for size in tensor.ty.shape:
            if isinstance(size, tirx.Var) and not any(size.same_as(known) for known in sizes):
                sizes.append(size)
    pointers = [
        tirx.Var(f"{tensor.name}_pointer", ir.PointerType(ir.PrimType("float32"))) for tensor in tensors
    ]
    views = [tirx.DeclBuffer(tensor, data=data) for tensor, data in zip(tensors, pointers, strict=True)]
    body = tirx.SeqStmt([*views, func.body, tirx.Return(tirx.const(0, "int32"))])
    for key, value in (("device_type", _CPU), ("device_id", 0)):  # what memory from TVM's pool is asked for
        body = tirx.AttrStmt(tirx.const(0, "int32"), key, tirx.const(value, "int32"), body)
    made = tirx.PrimFunc([*pointers, *sizes], body, ret_type=ir.PrimType("int32"))
    attrs: dict[str, object] = {
        "tirx.is_scheduled": True,
        "tirx.noalias": True,
        "op_pattern": 8,
        INTERNAL: True,
        "global_symbol": name,
    }
    for key, attr in attrs.items():
        made = made.with_attr(key, attr)
    return made


def dispatcher(problem: Matmul, layout: Layout, branches: Sequence[Branch], name: str) -> PrimFunc:
    """The function that the model calls: compares M with the bounds of the ranges, and calls.

    Args:
        problem: What it solves.
        layout: How the weight lies in memory.
        branches: In ascending order of rows.
        name: Its symbol.
    """

    def emit() -> None:
        batch, seq = b.size("batch"), b.size("seq")
        tensors = {"x": b.argument("x", (batch, seq, problem.k))}
        tensors["weight"] = b.argument("weight", layout.shape(problem.n, problem.k))
        if problem.bias:
            tensors["bias"] = b.argument("bias", (problem.n,))
        if problem.residual:
            tensors["residual"] = b.argument("residual", (batch, seq, problem.outputs))
        tensors["out"] = b.argument("out", (batch, seq, problem.outputs))
        rows = batch * seq

        def call(function: ir.GlobalVar, operands: list[Expr]) -> None:
            T.evaluate(ir.Call(function, [*(operand.data for operand in operands), rows]))

        def run(branch: Branch) -> None:
            raw = tensors["out"]
            if problem.gated and not branch.core.gated:
                raw = T.alloc_buffer((rows, problem.n), "float32")
            call(branch.kernel, [raw if key == "out" else tensors[key] for key in arguments(branch.core)])
            if branch.epilogue is not None:
                operands = [tensors[key] for key in _left(problem, branch.core)]
                if raw is not tensors["out"]:
                    operands.insert(0, raw)
                call(branch.epilogue, [*operands, tensors["out"]])

        def choose(rest: Sequence[Branch]) -> None:
            if rest[0].last is None:
                run(rest[0])
            else:
                b.either(rows <= rest[0].last, lambda: run(rest[0]), lambda: choose(rest[1:]))

        choose(branches)

    return tag(b.prim_func(name, emit), problem)


def _left(problem: Matmul, core: Matmul) -> list[str]:
    """The tensors that an epilogue reads beside the product."""
    return [name for name in ("bias", "residual") if getattr(problem, name) and not getattr(core, name)]


def epilogue(problem: Matmul, core: Matmul, name: str) -> PrimFunc:
    """What a kernel leaves of a problem, elementwise: (product [M, N]), (bias), (residual), out [M, outputs].

    Where the product has the output's shape it is found in `out`, and replaced.
    """
    outputs = problem.outputs
    separate = problem.gated and not core.gated

    def emit() -> None:
        rows = b.size("M")
        product_arg = b.argument("product", (rows, problem.n)) if separate else None
        left = _left(problem, core)
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
                if problem.activation and not core.activation:
                    value = b.let("activated", ACTIVATIONS[problem.activation](value))
                if separate:
                    value = value * biased(at + outputs)
                if residual is not None:
                    value = value + b.load(residual, row, at, lanes=n)
                b.store(out, value, row, at, lanes=n)

            b.sweep(outputs, element)

        b.tasks(rows, task, serial_if=rows <= _SERIAL_ROWS, name="row")

    return b.prim_func(name, emit)
