"""Matrix products take in the norm before them, where they pack their activations anyway."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from tvm import IRModule, ir, relax

from relax_llm.compiler.bindings import Edit, Line, is_launch, typed
from relax_llm.compiler.passes.select_kernels import launches, site_of_operands, sources
from relax_llm.compiler.planner import Planner
from relax_llm.kernels.matmul import Matmul, definition
from relax_llm.kernels.norm import Norm
from relax_llm.kernels.problem import Problem


@dataclass(frozen=True)
class FuseNorm:
    """Compute a norm in the launch of the product that reads it, as its kernel rounds the activations.

    Before::

        x = R.call_tir(norm_hidden576_eps1em05, (h, g))
        y = R.call_tir(loops_matmul_n960_k576, (x, w))

    After::

        y = R.call_tir(loops_matmul_n960_k576_norm_hidden576_eps1em05, (h, w, g))

    Only where nothing else reads the norm, and `Planner.takes_norm`. A kernel of yours for such a product is given what
    the norm made: its launch computes that first. Without this pass norms are launches of their own.

    Attributes:
        planner: Knows how weights are stored, and which kernels were given.
    """

    planner: Planner

    def __call__(self, mod: IRModule) -> IRModule:
        """Fuse in every function."""
        edit = Edit(mod)
        problems = edit.problems()
        for line in edit.lines:
            for var, problem, call in list(launches(line, problems)):
                if not isinstance(problem, Matmul):
                    continue
                stored = self.planner.storage.product(problem, sources(line, call.args[1][1]))
                made = self._norm(line, problems, stored, call)
                if made is None:
                    continue
                norm, given = made
                fused = replace(problem, norm=norm)
                kernel = edit.kernel(f"loops_{fused.name}", partial(definition, fused))
                normalized, *operands = list(call.args[1])
                args = [kernel, relax.Tuple([given[0], *operands, *given[1:]]), *call.args[2:]]
                line.rebind(var, typed(relax.Call(call.op, args, call.attrs, call.ty_args)))
                line.drop(normalized)
        return edit.module()

    def _norm(
        self,
        line: Line,
        problems: Mapping[ir.GlobalVar, Problem | None],
        stored: Matmul,
        call: relax.Call,
    ) -> tuple[Norm, list[relax.Expr]] | None:
        """The norm that a product takes in, and what that is given; None where it takes in none."""
        x, weight, *others = list(call.args[1])
        source = line.get(x)
        if source is None or not is_launch(source):
            return None
        norm = problems.get(source.args[0])
        shared = len(line.users(x)) != 1 or any(x.same_as(other) for other in others)
        if not isinstance(norm, Norm) or shared:
            return None
        site = site_of_operands(line, [weight], stored)
        given = list(source.args[1])
        if not self.planner.takes_norm(stored, site, site_of_operands(line, given[1:], norm)):
            return None
        return norm, given
