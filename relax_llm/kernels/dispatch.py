"""Choice by size inside the compiled code: one function for a problem that calls one of several kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import ir, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.inner import INTERNAL, returning
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.problem import Matmul, norm_arguments
from relax_llm.kernels.matmul.rest import around, is_separate, left_over
from relax_llm.kernels.operators import Operand, operator_of
from relax_llm.kernels.problem import Problem, tag
from relax_llm.plan.plan import Range
from relax_llm.plan.sizes import Box

OPEN = "relax_llm.open"
"""Function attribute of open dispatchers: the name of the dispatcher beside which they stand in the library."""

OPEN_SUFFIX = "__open"
"""An open dispatcher's symbol is the dispatcher's and this."""

CHOOSE = "relax_llm.choose"
"""The host's function that an open dispatcher asks: (dispatcher, *sizes) -> index of a kernel."""

_CPU = 1


@dataclass(frozen=True)
class Branch:
    """One kernel as a dispatcher calls it.

    Attributes:
        name: The kernel's name in the plan.
        core: What the kernel computes of the problem.
        operands: What it takes.
        sizes: Names of the sizes it takes behind its operands.
        kernel: The kernel, internal; or the name of a global function that is called back, which may raise.
        before: What computes what the kernel leaves of what is before it, internal; None where it leaves nothing.
        behind: The same of what is behind it.
    """

    name: str
    core: Problem
    operands: tuple[Operand, ...]
    sizes: tuple[str, ...]
    kernel: ir.GlobalVar | str
    before: ir.GlobalVar | None = None
    behind: ir.GlobalVar | None = None


def internal(
    func: PrimFunc, operands: Sequence[Operand], name: str
) -> tuple[ir.GlobalVar, PrimFunc, tuple[str, ...]]:
    """A function over tensors as one over pointers and numbers, callable from other functions of its module.

    ::

        def mine(x: T.Buffer((M, 64)), out: T.Buffer((M, 48)))      def mine(x: T.handle, out: T.handle, M: T.int64)

    Args:
        func: What a kernel's form gave.
        operands: What it takes.
        name: The symbol.

    Returns:
        The variable by which it is called, the function, and the names of the sizes that follow its operands.
    """
    sizes: list[tirx.Var] = []
    names: list[str] = []
    params, views = [], []
    for param, operand in zip(func.params, operands, strict=True):
        if not operand.is_tensor:
            params.append(param)
            continue
        pointer = tirx.Var(f"{param.name}_pointer", ir.PointerType(ir.PrimType(operand.dtype)))
        params.append(pointer)
        views.append(tirx.DeclBuffer(param, data=pointer))
        for size, meant in zip(param.ty.shape, operand.shape, strict=True):
            if isinstance(size, tirx.Var) and not any(size.same_as(known) for known in sizes):
                sizes.append(size)
                names.append(str(meant))
    body = tirx.SeqStmt([*views, func.body])
    for key, value in (("device_type", _CPU), ("device_id", 0)):  # what memory from TVM's pool is asked for
        body = tirx.AttrStmt(tirx.const(0, "int32"), key, tirx.const(value, "int32"), body)
    var = ir.GlobalVar(name)
    made = returning(var, [*params, *sizes], [body])
    attrs: dict[str, object] = {
        "tirx.is_scheduled": True,
        "tirx.noalias": True,
        "op_pattern": 8,
        INTERNAL: True,
        "global_symbol": name,
        **{key: calls for key, calls in (func.attrs or {}).items() if key == b.CALLS},
    }
    for key, attr in attrs.items():
        made = made.with_attr(key, attr)
    return var, made, tuple(names)


def rests(problem: Problem, core: Problem, machine: Machine) -> list[tuple[ir.GlobalVar, PrimFunc] | None]:
    """What is to be called before and behind a kernel that computes the core of a problem, as `internal` makes it.

    None where there is nothing left.
    """
    if not isinstance(problem, Matmul) or not isinstance(core, Matmul):
        return [None, None]
    return [
        None if left is None else internal(left.func, left.operands, left.name)[:2]
        for left in around(problem, core, machine)
    ]


def dispatcher(
    problem: Problem, layout: Layout | None, branches: Sequence[Branch], ranges: Sequence[Range], name: str
) -> PrimFunc:
    """The function that the model calls: compares the sizes with the bounds of the ranges, and calls.

    ::

        if batch * seq <= 8:   my_gemv(x, w, out, batch * seq)
        else:                  tiled(x, w, out, batch * seq)

    Args:
        problem: What it solves.
        layout: How the weight lies in memory.
        branches: The kernels.
        ranges: Which kernel serves which sizes; total.
        name: Its symbol.
    """
    by_name = {branch.name: branch for branch in branches}

    def emit() -> None:
        sizes, run = _prologue(problem, layout)

        def choose(rest: Sequence[tuple[Box, str]]) -> None:
            cut = _cut(rest) if len({kernel for _, kernel in rest}) > 1 else None
            if cut is None:
                run(by_name[rest[0][1]])
                return
            axis, last = cut
            below = [(box, kernel) for box, kernel in rest if box[axis][0] <= last]
            above = [(box, kernel) for box, kernel in rest if (box[axis][1] or last + 1) > last]
            b.either(
                sizes[axis] <= last,
                lambda: choose([(_limited(box, axis, None, last), kernel) for box, kernel in below]),
                lambda: choose([(_limited(box, axis, last + 1, None), kernel) for box, kernel in above]),
            )

        axes = operator_of(problem).axes
        choose([(part.sizes.within(axes), part.kernel) for part in ranges])

    return tag(b.prim_func(name, emit), problem)


def open_dispatcher(
    problem: Problem, layout: Layout | None, branches: Sequence[Branch], name: str
) -> PrimFunc:
    """The same function with the choice left to the host; only controlled runs call it.

    Args:
        problem: What it solves.
        layout: How the weight lies in memory.
        branches: The kernels, in the order of the indices that `CHOOSE` gives.
        name: The symbol of the dispatcher beside which it stands.
    """

    def emit() -> None:
        sizes, run = _prologue(problem, layout)
        chosen = b.local((1,), "int32")
        asked = [T.cast(size, "int64") for size in sizes.values()]
        b.put(chosen, T.Cast("int32", T.call_packed(CHOOSE, name, *asked)), 0)

        def choose(index: int) -> None:
            if index == len(branches) - 1:
                run(branches[index])
            else:
                b.either(chosen[0] == index, lambda: run(branches[index]), lambda: choose(index + 1))

        choose(0)

    return tag(b.prim_func(name + OPEN_SUFFIX, emit), problem).with_attr(OPEN, name)


def _prologue(problem: Problem, layout: Layout | None) -> tuple[dict[str, Expr], Callable[[Branch], None]]:
    """Declare what the model passes: the sizes that the choice depends on, and what emits the call of a branch."""
    operator = operator_of(problem)
    launched = operator.launched(problem, layout)
    known = {
        name: b.size(name)
        for name in dict.fromkeys(s for o in launched for s in o.shape if isinstance(s, str))
    }
    given: dict[str, Expr] = {}
    for operand in launched:
        if operand.is_tensor:
            shape = [known[size] if isinstance(size, str) else size for size in operand.shape]
            given[operand.name] = b.argument(operand.name, shape, operand.dtype)
        else:
            given[operand.name] = known[operand.name] = b.scalar(operand.name)
    if "M" in operator.axes:
        known["M"] = known["batch"] * known["seq"]

    def call(function: ir.GlobalVar | str, operands: Sequence[Expr], sizes: Sequence[str]) -> None:
        given = [getattr(operand, "data", operand) for operand in operands]
        given += [known[size] for size in sizes]
        # What a callback raises must leave the function that it is called in.
        T.evaluate(T.call_packed(function, *given) if isinstance(function, str) else ir.Call(function, given))

    def run(branch: Branch) -> None:
        tensors = dict(given)
        if isinstance(problem, Matmul) and isinstance(branch.core, Matmul):
            if branch.before is not None:
                tensors["x"] = T.alloc_buffer((known["M"], problem.k), "float32")
                vectors = [given[name] for name in norm_arguments(problem)]
                call(branch.before, [given["x"], *vectors, tensors["x"]], ("M",))
            if is_separate(problem, branch.core):
                tensors["out"] = T.alloc_buffer((known["M"], problem.n), "float32")
            call(branch.kernel, [tensors[operand.name] for operand in branch.operands], branch.sizes)
            if branch.behind is not None:
                rest = [given[name] for name in left_over(problem, branch.core)]
                product = [tensors["out"]] if is_separate(problem, branch.core) else []
                call(branch.behind, [*product, *rest, given["out"]], ("M",))
        else:
            call(branch.kernel, [tensors[operand.name] for operand in branch.operands], branch.sizes)

    return {axis: known[axis] for axis in operator.axes}, run


def _cut(ranges: Sequence[tuple[Box, str]]) -> tuple[str, int] | None:
    """The first bound that separates ranges, along the first axis that has one."""
    for axis, _ in ranges[0][0].bounds:
        lasts = [last for box, _ in ranges if (last := box[axis][1]) is not None]
        firsts = [box[axis][0] for box, _ in ranges]
        inner = [last for last in lasts if any(first > last for first in firsts)]
        if inner:
            return axis, min(inner)
    return None


def _limited(box: Box, axis: str, first: int | None, last: int | None) -> Box:
    """A box cut to what lies above `first` or below `last` on an axis."""
    low, high = box[axis]
    low = low if first is None else max(low, first)
    if last is not None:
        high = last if high is None else min(high, last)
    return Box(tuple((name, (low, high) if name == axis else bounds) for name, bounds in box.bounds))
