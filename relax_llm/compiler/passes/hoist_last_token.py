"""Of a prompt, only the last token goes through what follows the last attention."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from tvm import IRModule, ir, relax, tirx

from relax_llm.compiler.bindings import Edit, Line, bind, is_launch, is_op, substitute, typed
from relax_llm.kernels.attention import Attention
from relax_llm.kernels.library import build
from relax_llm.kernels.lookup import LastToken
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.problem import Problem

_ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in (
        *("abs", "add", "clip", "cos", "divide", "erf", "exp", "log", "maximum", "minimum"),
        *("multiply", "negative", "nn.gelu", "nn.gelu_tanh", "nn.relu", "nn.silu", "power", "rsqrt"),
        *("sigmoid", "sin", "sqrt", "square", "subtract", "tanh", "where"),
    )
)
"""Operators that compute each element from those at the same place of their inputs, which are broadcast."""

_ALONG = {
    "relax.concat": "axis",
    "relax.nn.layer_norm": "axes",
    "relax.nn.rms_norm": "axes",
    "relax.nn.softmax": "axis",
    "relax.split": "axis",
}
"""Operators along axes, and the attribute that names these."""


@dataclass(frozen=True)
class HoistLastToken:
    """Choose the last token as early as can be: behind the last layer's keys and values nothing needs the others.

    Before::

        a = R.call_tir(attention_h9_kv3_d64, (q, k_cache, v_cache, kv_len))     # [batch, seq, 576]
        h = R.add(x, R.matmul(a, R.permute_dims(wo)))
        y = R.nn.rms_norm(h, w)
        last = R.call_tir(last_token_hidden576, (y,))                           # [batch, 1, 576]

    After::

        q1 = R.call_tir(last_token_hidden64_h9, (q,))                           # [batch, 1, 9, 64]
        a = R.call_tir(attention_h9_kv3_d64, (q1, k_cache, v_cache, kv_len))    # [batch, 1, 576]
        x1 = R.call_tir(last_token_hidden576, (x,))
        h = R.add(x1, R.matmul(a, R.permute_dims(wo)))
        last = R.nn.rms_norm(h, w)

    What is hoisted over computes a token's row from the same token's rows: arithmetic on single elements, products with
    weights, what goes along the last axis, and attention, which sees the others in the cache. A value that something
    else needs of all tokens is computed for all of them, and the last one is chosen there. Where only arithmetic on
    single elements would be spared, it stays: that is fused with what is before it.

    Attributes:
        machine: What kernels are generated for.
    """

    machine: Machine

    def __call__(self, mod: IRModule) -> IRModule:
        """Rewrite every function that chooses a last token."""
        edit = Edit(mod)
        problems = edit.problems()
        for line in edit.lines:
            for var, expr in list(line):
                if isinstance(_problem(expr, problems), LastToken):
                    _hoist(edit, _Rows(line, problems, expr.args[1][0]), var, self.machine)
        return edit.module()


_Problems = Mapping[ir.GlobalVar, Problem | None]


def _problem(expr: relax.Expr, problems: _Problems) -> Problem | None:
    return problems.get(expr.args[0]) if is_launch(expr) else None


@dataclass(frozen=True)
class _Rows:
    """A function that chooses the last row of `chosen`, [batch, seq, hidden]."""

    line: Line
    problems: _Problems
    chosen: relax.Var

    def read(self, var: relax.Var) -> list[relax.Expr] | None:
        """Of what a variable is computed from, all that has a row for each token; None where its rows mix others."""
        expr = self.line[var]
        if isinstance(_problem(expr, self.problems), Attention):
            return [expr.args[1][0]]
        if isinstance(expr, relax.TupleGetItem):
            return [expr.tuple_value] if is_op(self.line.get(expr.tuple_value), "relax.split") else None
        if not self._keeps_rows(expr):
            return None
        operands = [part for arg in expr.args for part in (arg if isinstance(arg, relax.Tuple) else [arg])]
        operands = [value for value in operands if isinstance(value.ty, relax.TensorType)]
        rows = [value for value in operands if self._has_rows(value.ty)]
        others = [value for value in operands if value not in rows]
        return None if any(self._mentions_seq(value.ty) for value in others) else rows

    def only_for(self, last: relax.Var) -> set[relax.Var]:
        """What is needed for the choice alone, and can be computed from the last token's rows."""
        found: set[relax.Var | None] = {last}
        for var, _ in reversed(list(self.line)):
            if self.read(var) is not None and all(user in found for user in self.line.users(var)):
                found.add(var)
        parts = [var for var in found if isinstance(self.line[var], relax.TupleGetItem)]
        return found - {last, *(var for var in parts if self.line[var].tuple_value not in found)}

    def worthwhile(self, narrow: set[relax.Var]) -> set[relax.Var]:
        """Of these what spares more than arithmetic on single elements, which is fused with what is before it."""
        found: set[relax.Var] = set()
        for var, expr in self.line:
            if var in narrow and (_is_work(expr) or any(value in found for value in self.read(var) or ())):
                found.add(var)
        return found

    def _keeps_rows(self, expr: relax.Expr) -> bool:
        """Whether an operator computes rows of results [batch, seq, n] from the same rows of its operands."""
        results = expr.ty.fields if isinstance(expr.ty, relax.TupleType) else [expr.ty]
        if not isinstance(expr, relax.Call) or not all(map(self._has_rows, results)):
            return False
        name = getattr(expr.op, "name", "")
        if name == "relax.matmul":
            return len(expr.args[1].ty.shape) <= 2
        if name in _ALONG:
            axes = getattr(expr.attrs, _ALONG[name])
            return all(int(axis) in (-1, 2) for axis in (axes if isinstance(axes, Iterable) else [axes]))
        return name in _ELEMENTWISE

    def _has_rows(self, kind: relax.TensorType) -> bool:
        seq = self.chosen.ty.shape[1]
        return len(kind.shape) == 3 and kind.shape[1].same_as(seq) and str(kind.dtype) == "float32"

    def _mentions_seq(self, kind: relax.TensorType) -> bool:
        seq = self.chosen.ty.shape[1]
        return any(var.same_as(seq) for size in kind.shape for var in tirx.analysis.undefined_vars(size))


def _is_work(expr: relax.Expr) -> bool:
    """Whether an operator is more than arithmetic on single elements, and moving them."""
    name = getattr(getattr(expr, "op", None), "name", "relax.split")
    return name not in _ELEMENTWISE and name not in ("relax.concat", "relax.split")


def _hoist(edit: Edit, rows: _Rows, last: relax.Var, machine: Machine) -> None:
    """Compute for the last token alone what nothing but its choice needs."""
    line, batch = rows.line, rows.chosen.ty.shape[0]
    narrow, of_last = rows.worthwhile(rows.only_for(last)), dict[relax.Var, relax.Var]()

    def choose(value: relax.Var) -> tuple[relax.Var, relax.Expr]:
        count, _, *heads, hidden = value.ty.shape
        problem = LastToken(int(hidden), *map(int, heads))
        kernel = edit.kernel(problem.name, partial(build, problem, machine))
        kind = relax.TensorType([count, 1, *heads, hidden], value.ty.dtype)
        return bind("last", relax.op.call_tir(kernel, [value], out_ty=kind))

    for var, expr in list(line):
        if var not in narrow:
            continue
        for value in rows.read(var) or ():
            if value not in of_last:
                chosen = choose(value)
                line.insert(var, [chosen])
                of_last[value] = chosen[0]
        if is_launch(expr):  # attention, whose result has a type of its own
            operands = [of_last.get(value, value) for value in expr.args[1]]
            kind = relax.TensorType([batch, 1, var.ty.shape[2]], var.ty.dtype)
            made = relax.op.call_tir(expr.args[0], operands, out_ty=kind)
        else:
            made = substitute(expr, of_last)
        if var.same_as(rows.chosen):
            line.rebind(last, typed(made))
            return
        new = bind(var.name, made)
        line.insert(var, [new])
        of_last[var] = new[0]
