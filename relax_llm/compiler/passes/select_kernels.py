"""Definitions of matmuls give way to kernels, and weights to the layouts these kernels read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace as changed_copy
from functools import partial

from tvm import IRModule, ir, relax

from relax_llm.compiler.bindings import Edit, Line, bind, is_op, typed
from relax_llm.kernels.layout import Tiled
from relax_llm.kernels.library import build
from relax_llm.kernels.lookup import Embedding
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul import Matmul, layout_for
from relax_llm.kernels.problem import Problem

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
        machine: What the kernels are generated for.
    """

    machine: Machine

    def __call__(self, mod: IRModule) -> IRModule:
        """Replace the functions and pack the weights."""
        edit = Edit(mod)
        problems = edit.problems()
        shared: dict[str, Tiled] = {}
        for line in edit.lines:
            for _, problem, call in _launches(line, problems):
                table = call.args[1][1]
                if isinstance(problem, Matmul) and table in line.params:
                    shared[table.name] = layout_for(problem, self.machine)
        for line in edit.lines:
            for index, problem, call in reversed(list(_launches(line, problems))):
                operands = list(call.args[1])
                if isinstance(problem, Matmul):
                    layout = layout_for(problem, self.machine)
                elif operands[1] in line.params and operands[1].name in shared:
                    layout = shared[operands[1].name]
                    problem = changed_copy(problem, layout=layout.name)
                else:
                    continue
                var = line.body[index][0]
                packed = bind("packed", _pack(operands[1], layout))
                operands[1] = packed[0]
                kernel = edit.kernel(problem, partial(build, problem, self.machine))
                line.body[index] = (var, typed(relax.op.call_tir(kernel, operands, out_ty=var.ty)))
                line.insert(index, [packed])
        return edit.module()


def _launches(
    line: Line, problems: Mapping[ir.GlobalVar, Problem | None]
) -> Iterator[tuple[int, Matmul | Embedding, relax.Call]]:
    for index, _, expr in line:
        if is_op(expr, "relax.call_tir"):
            problem = problems.get(expr.args[0])
            if isinstance(problem, Matmul | Embedding):
                yield index, problem, expr


def _pack(weight: relax.Expr, layout: Tiled) -> relax.Expr:
    n, k = (int(size) for size in weight.ty.shape)
    packed = relax.TensorType(list(layout.shape(n, k)), weight.ty.dtype)
    return relax.op.call_pure_packed(PACK + layout.name, weight, ty_args=packed)
