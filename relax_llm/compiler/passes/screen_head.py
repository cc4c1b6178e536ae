"""A greedy choice reads an estimate of the head, and of the head itself what may be chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, replace as changed_copy

from tvm import IRModule, ir, relax

from relax_llm.artifact.manifest import CONTENDERS
from relax_llm.compiler.bindings import Edit, Line, bind, is_launch, typed
from relax_llm.compiler.passes.select_kernels import install, packed, site_of_operands
from relax_llm.compiler.planner import Choice, Planner
from relax_llm.compiler.recipes import ESTIMATE
from relax_llm.formats import FORMATS
from relax_llm.kernels.contenders import Contenders
from relax_llm.kernels.layout import Packed
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.problem import Problem

DECODE = "relax_llm.decode."
"""Prefix of the functions that make floats of an encoded weight; the format follows."""

ESTIMATES = "relax_llm.estimate."
"""Prefix of the functions that encode a matrix in fewer bits than it is stored in; the format follows."""

MARGINS = "relax_llm.margins."
"""Prefix of the functions that say how far off products with an estimate may be; the format follows."""

_SCREEN = "q6"
_EXACT: Mapping[str, str | None] = {"tiled": None, "integer16": "int16"}
"""The kernels whose logits `Contenders` has, and what these round activations to."""

_LEAST = 4e6
"""Bytes that must be spared for each token: 0.15 ms of reading, where two more launches take 0.02."""


@dataclass(frozen=True)
class ScreenHead:
    """Add a function beside `prefill` whose logits are exact where they may be the largest, and else estimated.

    Before::

        def prefill(...):
            logits = R.call_tir(matmul_n49152_k576_bf16, (h, head))

    After::

        def contenders(...):  # beside it
            rough = R.call_pure_packed("relax_llm.pack.tiled32_q6", ...)               # an estimate, in 6 bits
            margins = R.call_pure_packed("relax_llm.margins.q6", ...)                  # how far off that is, by row
            estimates = R.call_tir(matmul_n49152_k576_q6_int16, (h, rough))
            logits = R.call_tir(contenders_n49152_k576_tiled32_bf16, (h, estimates, head, margins))

    It is what `Runner.greedy` calls, and the token that it finds is the one with the largest logit of `decode`. Of a
    head in 32, 16 or 8 bits a token reads 21, 41 or 77 % so; of a model that has learned nothing, whose logits are all
    alike, more, and twice the head at worst. There is no such function where little would be spared,
    or where a kernel of the user's computes the logits.

    Attributes:
        planner: Chooses the kernels.
    """

    planner: Planner

    def __call__(self, mod: IRModule) -> IRModule:
        """Add the function, where it pays."""
        edit = Edit(mod)
        problems = edit.problems()
        (line,) = (line for line in edit.lines if line.name == "prefill")
        head = self._head(line, problems)
        if head is None:
            return mod
        added = edit.copy(line, CONTENDERS)
        logits = _made(added)
        call = added[logits]
        x, stored = call.args[1]
        problem, exact = head
        site = site_of_operands(added, [stored], problem)
        before = []
        matrix = added[stored].args[1]
        if problem.weight_format != "f32":
            floats = relax.TensorType([problem.n, problem.k], "float32")
            decoded = relax.op.call_pure_packed(DECODE + problem.weight_format, matrix, ty_args=floats)
            before.append(bind("decoded", decoded))
            matrix = before[-1][0]
        rough = Matmul(problem.n, problem.k, _SCREEN, activations="int16")
        chosen = self.planner.choose(rough, f"{site}.{ESTIMATE}", spare=True)
        assert chosen.layout is not None
        before += packed(matrix, chosen.layout, _SCREEN, ESTIMATES)
        estimates = bind("estimates", self._launch(edit, rough, chosen, [x, before[-1][0]], call))
        by_row = relax.TensorType([problem.n], "float32")
        margins = bind("margins", relax.op.call_pure_packed(MARGINS + _SCREEN, matrix, ty_args=by_row))
        operands = [x, estimates[0], stored, margins[0]]
        added.insert(logits, [*before, estimates, margins])
        added.rebind(logits, self._launch(edit, exact, self.planner.choose(exact, site), operands, call))
        return edit.module()

    def _launch(
        self, edit: Edit, problem: Problem, choice: Choice, operands: list[relax.Expr], like: relax.Call
    ) -> relax.Expr:
        """A launch with a result like that of another."""
        kernel = install(edit, self.planner.machine, problem, choice)
        args = [kernel, relax.Tuple(operands), *like.args[2:]]
        return typed(relax.Call(like.op, args, like.attrs, like.ty_args))

    def _head(
        self, line: Line, problems: Mapping[ir.GlobalVar, Problem | None]
    ) -> tuple[Matmul, Contenders] | None:
        """The product that a function ends with, and what may take its place; None where nothing is to be won."""
        call = line.get(_made(line))
        if self.planner.machine.is_gpu or call is None or not is_launch(call):
            return None
        problem = problems.get(call.args[0])
        if not isinstance(problem, Matmul) or problem.n != self.planner.storage.vocab_size:
            return None
        if changed_copy(problem, weight_format="f32", activations=None) != Matmul(problem.n, problem.k):
            return None
        stored, rough = (
            FORMATS[name].nbytes(problem.n, problem.k) for name in (problem.weight_format, _SCREEN)
        )
        _, choice = self.planner.choices()[call.args[0].name_hint]
        serving = [part.kernel for part in choice.ranges if {"M": 1} in part.sizes]
        if stored - rough < _LEAST or len(serving) != 1 or serving[0] not in _EXACT:
            return None
        if not isinstance(choice.layout, Packed):
            return None
        return problem, Contenders(problem.n, problem.k, choice.layout.name, _EXACT[serving[0]])


def _made(line: Line) -> relax.Var:
    """The variable whose value a function returns, perhaps by another name."""
    var = line.result
    while isinstance(other := line.get(var), relax.Var):
        var = other
    return var
