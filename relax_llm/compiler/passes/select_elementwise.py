"""What TVM fused of a model's arithmetic on single elements gives way to kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import IRModule, relax
from tvm.tirx import PrimFunc

from relax_llm.compiler.bindings import Edit, Line, is_launch, typed
from relax_llm.compiler.described import described
from relax_llm.compiler.passes.lift_weights import WEIGHTS, weight_recipes
from relax_llm.compiler.passes.select_kernels import install
from relax_llm.compiler.planner import Planner
from relax_llm.compiler.recipes import Recipe, weight_name
from relax_llm.kernels.elementwise import Elementwise
from relax_llm.kernels.problem import problem_of
from relax_llm.layers.decoder import site_of_weight


@dataclass(frozen=True)
class SelectElementwise:
    """Call the kernels that serve what is arithmetic on single elements; other plain loops stay as they are.

    Before::

        y = R.call_tir(fused_divide_tanh_multiply, (x,))

    After::

        y = R.call_tir(elementwise_div_tanh_mul_255b5b2a, (x,))        # tanh(a / 30.0) * 30.0

    Attributes:
        planner: Chooses the kernels, and keeps the choices for the plan.
    """

    planner: Planner

    def __call__(self, mod: IRModule) -> IRModule:
        """Replace the functions that can be described."""
        edit = Edit(mod)
        recipes = weight_recipes(mod) if WEIGHTS in (mod.attrs or {}) else []
        problems = {
            var: described(func)
            for var, func in mod.functions_items()
            if isinstance(func, PrimFunc) and problem_of(func) is None
        }
        for line in edit.lines:
            for var, expr in list(line):
                problem = problems.get(expr.args[0]) if is_launch(expr) else None
                if problem is None or len(expr.args) > 2:  # sizes that no tensor has come as a third argument
                    continue
                choice = self.planner.choose(problem, _site(line, problem, expr, recipes))
                kernel = install(edit, self.planner.machine, problem, choice)
                line.rebind(var, typed(relax.op.call_tir(kernel, expr.args[1], out_ty=var.ty)))
        return edit.module()


def _site(line: Line, problem: Elementwise, call: relax.Call, recipes: Sequence[Recipe]) -> str:
    """The place that the first weight among the operands names; what has none is a place of its own."""
    weights = line.params[3:4]
    for operand in call.args[1]:
        made = line.get(operand)
        if isinstance(made, relax.TupleGetItem) and any(made.tuple_value.same_as(param) for param in weights):
            return site_of_weight(weight_name(recipes[made.index]))
    return problem.name
