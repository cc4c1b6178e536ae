"""Definitions give way to kernels, and weights to the layouts these kernels read."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace as changed_copy
from functools import partial

from tvm import IRModule, ir, relax

from relax_llm.compiler.bindings import Edit, Line, bind, is_launch, typed, used
from relax_llm.compiler.planner import Choice, Planner
from relax_llm.compiler.recipes import joined_name
from relax_llm.kernels.dispatch import OPEN_SUFFIX, Branch, dispatcher, internal, open_dispatcher, rests
from relax_llm.kernels.forms import Realized, sizes_of
from relax_llm.kernels.gpu import launched
from relax_llm.kernels.layout import Layout, Packed, Plain
from relax_llm.kernels.library import build
from relax_llm.kernels.lookup import Embedding, LastToken
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.problem import Problem
from relax_llm.layers.decoder import site_of_last_token, site_of_weight
from relax_llm.plan.python_kernel import PREFIX

ENCODE = "relax_llm.encode."
"""Prefix of the functions that encode a weight; the format follows. They run when the artifact is made."""

PACK = "relax_llm.pack."
"""Prefix of the functions that pack a weight; the layout follows."""


@dataclass(frozen=True)
class SelectKernels:
    """Call the kernels that serve each problem, a matmul over its weight packed as they want it.

    Before::

        y = R.call_tir(loops_matmul_n576_k1536_residual, (h, wd, r))   # wd: [576, 1536]

    After::

        packed = R.call_pure_packed("relax_llm.pack.tiled32", wd)      # [18, 1536, 32]
        y = R.call_tir(matmul_n576_k1536_residual, (h, packed, r))

    Where several kernels serve a problem, what is called is a dispatcher: it compares the sizes and calls one of them.
    Beside it stands an open one, which asks the host instead; only a controlled run calls it. On a GPU one kernel
    serves a problem, and its loops become the function's own.

    Where weights are not stored as f32, they are encoded first: `R.call_pure_packed("relax_llm.encode.q8", wd)`.
    Products of weights in blocks may round their activations to int8, or to int7 beside weights of 4 bits, whose own
    rounding is so much coarser, and those of weights in bf16 to bf16.

    An embedding that shares its table with a matmul reads it in the matmul's layout, so that it is stored once. Another
    table of tokens has the matmuls' format.

    Attributes:
        planner: Chooses the kernels, and keeps the choices for the plan.
    """

    planner: Planner

    def __call__(self, mod: IRModule) -> IRModule:
        """Replace the functions and pack the weights."""
        edit = Edit(mod)
        problems = edit.problems()
        chosen: dict[relax.Var, tuple[Problem, Choice, Layout | None]] = {}
        shared: dict[str, tuple[Layout, str]] = {}
        for line in edit.lines:
            for var, problem, call in launches(line, problems):
                if isinstance(problem, Matmul):
                    weight = call.args[1][1]
                    problem = self.planner.storage.product(problem, sources(line, weight))
                    choice = self.planner.choose(problem, site_of_operands(line, [weight], problem))
                    # A GPU's kernels mostly read the weight as it is, as an embedding may beside them.
                    as_is = self.planner.machine.is_gpu and isinstance(choice.layout, Plain)
                    layout = None if as_is else choice.layout
                    chosen[var] = problem, choice, layout
                    if weight in line.params and choice.layout:
                        shared[weight.name] = choice.layout, problem.weight_format
        for line in edit.lines:
            for var, problem, call in launches(line, problems):
                if not isinstance(problem, Matmul):
                    problem, layout = self._table(line, problem, call, shared)
                    choice = self.planner.choose(problem, site_of_operands(line, list(call.args[1]), problem))
                    chosen[var] = problem, choice, layout
        installed: dict[str, ir.GlobalVar] = {}
        for line in edit.lines:
            for var, _, call in list(launches(line, problems)):
                problem, choice, layout = chosen[var]
                if choice.name not in installed:
                    installed[choice.name] = install(edit, self.planner.machine, problem, choice)
                kernel, operands = installed[choice.name], list(call.args[1])
                before = []
                if layout is not None:
                    before = packed(operands[1], layout, _format_of(problem, layout))
                    operands[1] = before[-1][0]
                args = [kernel, relax.Tuple(operands), *call.args[2:]]
                replaced = typed(relax.Call(call.op, args, call.attrs, call.ty_args))
                line.insert(var, before)
                line.rebind(var, replaced)
        return edit.module()

    def _table(
        self, line: Line, problem: Problem, call: relax.Call, shared: Mapping[str, tuple[Layout, str]]
    ) -> tuple[Problem, Layout | None]:
        """The problem of an embedding over its table as it is stored, and this layout; another problem as it was."""
        if not isinstance(problem, Embedding) or call.args[1][1] not in line.params:
            return problem, None
        table = call.args[1][1].name
        layout, stored = shared.get(table, (None, ""))
        if not isinstance(layout, Plain | Packed):  # not shared, or in a layout that only its kernel knows
            of_tokens = problem.rows == self.planner.storage.vocab_size
            stored = stored or (self.planner.storage.format([table], problem.rows) if of_tokens else "f32")
            layout = Plain(stored)
        if layout == Plain():
            return problem, None
        return changed_copy(problem, layout=layout.name), layout


def install(edit: Edit, machine: Machine, problem: Problem, choice: Choice) -> ir.GlobalVar:
    """The function that the model calls: the one built-in kernel, or a dispatcher over several."""
    if not choice.realized:
        return edit.kernel(choice.name, partial(build, problem, machine))
    if machine.is_gpu:
        (only,) = choice.realized.values()
        whole = partial(launched, problem, only.func, only.operands, choice.layout, choice.name)
        return edit.kernel(choice.name, whole)
    branches = []
    for realized in choice.realized.values():
        kernel, sizes = _callee(edit, realized)
        rest = [left and edit.called(*left) for left in rests(problem, realized.problem, machine)]
        branches.append(
            Branch(realized.kernel.name, realized.problem, realized.operands, sizes, kernel, *rest)
        )
    edit.kernel(
        choice.name + OPEN_SUFFIX, partial(open_dispatcher, problem, choice.layout, branches, choice.name)
    )
    return edit.kernel(
        choice.name, partial(dispatcher, problem, choice.layout, branches, choice.ranges, choice.name)
    )


def _callee(edit: Edit, realized: Realized) -> tuple[ir.GlobalVar | str, tuple[str, ...]]:
    """What a dispatcher calls for a kernel, and the sizes that it takes behind its operands."""
    if realized.python is not None:
        return PREFIX + realized.symbol, tuple(sizes_of(realized.operands))
    var, func, sizes = internal(realized.func, realized.operands, realized.symbol)
    return edit.called(var, func), sizes


def site_of_operands(line: Line, operands: list[relax.Expr], problem: Problem) -> str:
    """The place that the first weight or cache among operands names; what has neither is a place of its own.

    The last token is chosen beside what makes the others.
    """
    if isinstance(problem, LastToken):
        made = line.get(operands[0])
        if isinstance(made, relax.TupleGetItem):
            made = line.get(made.tuple_value)
        named = _named(line, made.args[1]) if made is not None and is_launch(made) else ""
        return site_of_last_token(named) or problem.name
    return _named(line, operands) or problem.name


def _named(line: Line, operands: Iterable[relax.Expr]) -> str:
    for operand in operands:
        names = sources(line, operand)
        if names:
            return site_of_weight(joined_name(names))
    return ""


def sources(line: Line, operand: relax.Expr) -> list[str]:
    """The weights or caches that an operand is made from, without a launch in between."""
    stored = line.params[2:]

    def sources(var: relax.Expr) -> list[str]:
        if any(param.same_as(var) for param in stored):
            return [var.name]
        made = line.get(var)
        if made is None or is_launch(made):
            return []
        return [name for part in used(made) for name in sources(part)]

    return sources(operand) if isinstance(operand, relax.Var) else []


def launches(
    line: Line, problems: Mapping[ir.GlobalVar, Problem | None]
) -> Iterator[tuple[relax.Var, Problem, relax.Call]]:
    """The launches of kernels whose problem is known: the variable, the problem and the call."""
    for var, expr in line:
        if is_launch(expr):
            problem = problems.get(expr.args[0])
            if problem is not None:
                yield var, problem, expr


def _format_of(problem: Problem, layout: Layout) -> str:
    """The format that a packed operand of a problem is encoded in."""
    if isinstance(problem, Matmul):
        return problem.weight_format
    return layout.format if isinstance(layout, Plain | Packed) else "f32"


def packed(
    weight: relax.Expr, layout: Layout, format: str, encode: str = ENCODE
) -> list[tuple[relax.Var, relax.Expr]]:
    """Bindings that encode a weight [N, K], by functions with a prefix, and pack it."""
    n, k = (int(size) for size in weight.ty.shape)
    bindings = []
    if format != "f32":
        plain = Plain(format)
        encoded = relax.TensorType(list(plain.shape(n, k)), plain.dtype)
        bindings.append(bind("encoded", relax.op.call_pure_packed(encode + format, weight, ty_args=encoded)))
        weight = bindings[0][0]
    packed = relax.TensorType(list(layout.shape(n, k)), layout.dtype)
    bindings.append(bind("packed", relax.op.call_pure_packed(PACK + layout.name, weight, ty_args=packed)))
    return bindings
