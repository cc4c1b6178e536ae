"""Definitions of matmuls give way to kernels, and weights to the layouts these kernels read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace as changed_copy
from functools import partial

from tvm import IRModule, ir, relax
from tvm.tirx import PrimFunc

from relax_llm.compiler.bindings import Edit, Line, bind, is_op, typed, used
from relax_llm.compiler.planner import Choice, Planner
from relax_llm.compiler.recipes import joined_name
from relax_llm.kernels.dispatch import Branch, dispatcher, epilogue, internal
from relax_llm.kernels.layout import Layout, Tiled
from relax_llm.kernels.library import build
from relax_llm.kernels.lookup import Embedding
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.problem import Problem
from relax_llm.layers.decoder import site_of

PACK = "relax_llm.pack."
"""Prefix of the functions that pack a weight; the layout follows. They run when the artifact is made."""


@dataclass(frozen=True)
class SelectKernels:
    """Call the kernel that serves each matmul, over its weight packed as that kernel wants it.

    Before::

        y = R.call_tir(loops_matmul_n576_k1536_residual, (h, wd, r))   # wd: [576, 1536]

    After::

        packed = R.call_pure_packed("relax_llm.pack.tiled32", wd)      # [18, 1536, 32]
        y = R.call_tir(matmul_n576_k1536_residual, (h, packed, r))

    An embedding that shares its table with a matmul reads it in the matmul's layout, so that it is stored once.

    Attributes:
        planner: Chooses the kernels, and keeps the choices for the plan.
    """

    planner: Planner

    def __call__(self, mod: IRModule) -> IRModule:
        """Replace the functions and pack the weights."""
        edit = Edit(mod)
        problems = edit.problems()
        choices: dict[tuple[str, int], Choice] = {}
        shared: dict[str, Layout] = {}
        for line in edit.lines:
            for index, problem, call in _launches(line, problems):
                if isinstance(problem, Matmul):
                    weight = call.args[1][1]
                    choice = self.planner.choose(problem, _site(line, weight))
                    choices[line.name, index] = choice
                    if weight in line.params:
                        shared[weight.name] = choice.layout
        for line in edit.lines:
            for index, problem, call in reversed(list(_launches(line, problems))):
                operands = list(call.args[1])
                if isinstance(problem, Matmul):
                    choice = choices[line.name, index]
                    layout, kernel = choice.layout, _install(edit, problem, choice, self.planner.machine)
                elif operands[1] in line.params and isinstance(shared.get(operands[1].name), Tiled):
                    layout = shared[operands[1].name]
                    problem = changed_copy(problem, layout=layout.name)
                    kernel = edit.kernel(problem.name, partial(build, problem, self.planner.machine))
                else:
                    continue
                var = line.body[index][0]
                packed = bind("packed", _pack(operands[1], layout))
                operands[1] = packed[0]
                line.body[index] = (var, typed(relax.op.call_tir(kernel, operands, out_ty=var.ty)))
                line.insert(index, [packed])
        return edit.module()


def _install(edit: Edit, problem: Matmul, choice: Choice, machine: Machine) -> ir.GlobalVar:
    """The function that a matmul calls: its one kernel, or a dispatcher over several."""
    if not choice.realized:
        return edit.kernel(choice.name, partial(build, problem, machine))
    branches = []
    for part in choice.ranges:
        realized = choice.realized[part.kernel]
        kernel = edit.kernel(realized.symbol, partial(internal, realized.func, realized.symbol))
        rest = None
        if realized.problem != problem:
            name = f"epilogue_{problem.name}__{realized.problem.name}"
            rest = edit.kernel(name, partial(_epilogue, problem, realized.problem, name))
        branches.append(Branch(part.last, realized.problem, kernel, rest))
    return edit.kernel(choice.name, partial(dispatcher, problem, choice.layout, branches, choice.name))


def _epilogue(problem: Matmul, core: Matmul, name: str) -> PrimFunc:
    return internal(epilogue(problem, core, name), name)


def _site(line: Line, weight: relax.Var) -> str:
    """The place that a weight names, whatever it is made from."""
    definitions = line.definitions()

    def sources(var: relax.Var) -> list[str]:
        if var not in definitions:
            return [var.name]
        return [name for part in used(definitions[var]) for name in sources(part)]

    return site_of(joined_name(sources(weight)).rpartition(".")[0])


def _launches(
    line: Line, problems: Mapping[ir.GlobalVar, Problem | None]
) -> Iterator[tuple[int, Matmul | Embedding, relax.Call]]:
    for index, _, expr in line:
        if is_op(expr, "relax.call_tir"):
            problem = problems.get(expr.args[0])
            if isinstance(problem, Matmul | Embedding):
                yield index, problem, expr


def _pack(weight: relax.Expr, layout: Layout) -> relax.Expr:
    n, k = (int(size) for size in weight.ty.shape)
    packed = relax.TensorType(list(layout.shape(n, k)), weight.ty.dtype)
    return relax.op.call_pure_packed(PACK + layout.name, weight, ty_args=packed)
