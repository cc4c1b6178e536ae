"""A Relax function as a list: every function here is one straight line of bindings, which passes edit in place."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeGuard

import tvm
from tvm import IRModule, ir, relax
from tvm.relax.analysis import free_vars
from tvm.relax.utils import copy_with_new_vars
from tvm.tirx import PrimFunc

from relax_llm.errors import CompileError
from relax_llm.kernels.dispatch import OPEN
from relax_llm.kernels.inner import ENTRY, INTERNAL, complete
from relax_llm.kernels.problem import Problem, problem_of


class Line:
    """A function whose body is a sequence of `var = expr`.

    Who uses a variable is kept up to date with every change, so that a pass may ask after each.

    Attributes:
        name: The function's name in its module.
        params: Its parameters.
        result: The variable it returns.
        attrs: Its attributes.
    """

    def __init__(
        self,
        name: str,
        params: list[relax.Var],
        body: Iterable[tuple[relax.Var, relax.Expr]],
        result: relax.Var,
        attrs: Any,
    ) -> None:
        """Make a function of its parts."""
        self.name, self.params, self.result, self.attrs = name, params, result, attrs
        self._expr = dict(body)
        self._order = list(self._expr)
        self._before: dict[relax.Var, list[relax.Var]] = {}  # what was inserted in front of which
        self._users: dict[relax.Var, dict[relax.Var, None]] = {}
        for var, expr in self._expr.items():
            self._note(var, expr)

    def __iter__(self) -> Iterator[tuple[relax.Var, relax.Expr]]:
        """Variables and what they are bound to, in order."""
        for var in self._order:
            for new in (*self._before.get(var, ()), var):
                if new in self._expr:
                    yield new, self._expr[new]

    def __contains__(self, var: relax.Var) -> bool:
        """Whether a variable is bound here."""
        return var in self._expr

    def __getitem__(self, var: relax.Var) -> relax.Expr:
        """What a variable is bound to."""
        return self._expr[var]

    def get(self, var: relax.Expr) -> relax.Expr | None:
        """What a variable is bound to; None where it is not bound here."""
        return self._expr.get(var)

    def users(self, var: relax.Var) -> list[relax.Var | None]:
        """The variables whose bindings use a variable, once for each; None where it is the result."""
        return [*self._users.get(var, ()), *([None] if var.same_as(self.result) else [])]

    def rebind(self, var: relax.Var, expr: relax.Expr) -> None:
        """Bind a variable to something else."""
        self._forget(var)
        self._expr[var] = expr
        self._note(var, expr)

    def drop(self, var: relax.Var) -> None:
        """Remove a binding."""
        self._forget(var)
        del self._expr[var]

    def insert(self, before: relax.Var | None, new: Iterable[tuple[relax.Var, relax.Expr]]) -> None:
        """Put bindings in front of one, or in front of all."""
        place = self._before.setdefault(self._order[0] if before is None else before, [])
        added = dict(new)
        place[:] = [*added, *place] if before is None else [*place, *added]
        for var, expr in added.items():
            self._expr[var] = expr
            self._note(var, expr)

    def function(self) -> relax.Function:
        """The Relax function, without what nothing uses."""
        needed: Counter[relax.Var] = Counter([self.result])
        kept = []
        for var, expr in reversed(list(self)):
            if needed[var]:
                needed.update(used(expr))
                kept.append(relax.VarBinding(var, expr))
        block = relax.DataflowBlock(kept[::-1])
        body = typed(relax.SeqExpr([block], self.result))
        return relax.Function(self.params, body, ret_ty=self.result.ty, attrs=self.attrs)

    def _note(self, user: relax.Var, expr: relax.Expr) -> None:
        for var in used(expr):
            self._users.setdefault(var, {})[user] = None

    def _forget(self, user: relax.Var) -> None:
        for var in used(self._expr[user]):
            self._users[var].pop(user, None)


@lru_cache(maxsize=4096)
def used(expr: relax.Expr) -> tuple[relax.Var, ...]:
    """The variables of an expression; remembered, as passes ask again after every change of a function."""
    return tuple(free_vars(expr))


def lines(mod: IRModule) -> list[Line]:
    """Every Relax function of a module.

    Raises:
        CompileError: A function has control flow.
    """
    found = []
    for var, func in mod.functions_items():
        if isinstance(func, relax.Function):
            found.append(_line(var.name_hint, func))
    return found


def _line(name: str, func: relax.Function) -> Line:
    body: list[tuple[relax.Var, relax.Expr]] = []
    for block in func.body.blocks:
        for binding in block.bindings:
            if not isinstance(binding, relax.VarBinding) or isinstance(binding.value, relax.If):
                raise CompileError(
                    f"Function {name!r} is not a straight line of bindings; this pass cannot read it."
                )
            body.append((binding.var, binding.value))
    return Line(name, list(func.params), body, func.body.body, func.attrs)


class Edit:
    """A module under change: its functions as lines, and the kernels added to it.

    Attributes:
        lines: Every Relax function; edit them, then call `module`.
    """

    def __init__(self, mod: IRModule) -> None:
        """Read a module, which stays as it is."""
        self.lines = lines(mod)
        self._original = mod
        self._builder = relax.BlockBuilder(mod.clone())
        self._kernels: dict[str, ir.GlobalVar] = {}
        self._called: dict[str, tuple[ir.GlobalVar, PrimFunc]] = {}
        self._copies: list[Line] = []

    def copy(self, line: Line, name: str) -> Line:
        """A function like another, as that is now; it joins the module under a name of its own."""
        self._copies.append(_line(name, copy_with_new_vars(line.function())))
        return self._copies[-1]

    def kernel(self, name: str, make: Callable[[], PrimFunc]) -> ir.GlobalVar:
        """The module's function of this name; made on first use."""
        if name not in self._kernels:
            self._kernels[name] = self._builder.add_func(make(), name)
        return self._kernels[name]

    def called(self, var: ir.GlobalVar, func: PrimFunc) -> ir.GlobalVar:
        """The variable by which kernels of the module call a function of this name; the first that came."""
        known = self._called.setdefault(var.name_hint, (var, func))
        return known[0]

    def problems(self) -> dict[ir.GlobalVar, Problem | None]:
        """The problem that each kernel of the original module solves."""
        functions = self._original.functions_items()
        return {var: problem_of(func) for var, func in functions if isinstance(func, PrimFunc)}

    def module(self) -> IRModule:
        """The changed module, without kernels that nothing calls."""
        for line in self.lines:
            self._builder.update_func(self._original.get_global_var(line.name), line.function())
        for copy in self._copies:
            self._builder.add_func(copy.function(), copy.name)
        mod = self._builder.get()
        # TVM's own elimination keeps every kernel, as each has a symbol of its own.
        launched = {expr.args[0] for line in lines(mod) for _, expr in line if is_launch(expr)}
        kept = {
            var: func
            for var, func in mod.functions_items()
            if var in launched
            or not isinstance(func, PrimFunc)
            or any(mark in func.attrs for mark in (INTERNAL, ENTRY, OPEN))
        }
        kernels = {var: func for var, func in kept.items() if isinstance(func, PrimFunc)}
        kernels |= dict(self._called.values())
        return IRModule({**kept, **complete(kernels)}, attrs=mod.attrs)


def typed(expr: relax.Expr) -> relax.Expr:
    """The expression with its type deduced."""
    return relax.BlockBuilder().normalize(expr)


def bind(name: str, expr: relax.Expr) -> tuple[relax.Var, relax.Expr]:
    """A new variable bound to an expression."""
    expr = typed(expr)
    return relax.DataflowVar(name, expr.ty), expr


def is_op(expr: relax.Expr | None, name: str) -> TypeGuard[relax.Call]:
    """Whether an expression calls this operator."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == name


def is_launch(expr: relax.Expr) -> bool:
    """Whether an expression calls a kernel."""
    return is_op(expr, "relax.call_tir") or is_op(expr, "relax.call_tir_inplace")


def transposed(expr: relax.Expr | None) -> relax.Expr | None:
    """The matrix that an expression is the transpose of, or None."""
    if expr is None or not is_op(expr, "relax.permute_dims") or len(expr.args[0].ty.shape) != 2:
        return None
    axes = expr.attrs.axes
    return expr.args[0] if axes is None or [int(axis) % 2 for axis in axes] == [1, 0] else None


def is_vector(expr: relax.Expr, size: int) -> bool:
    """Whether an expression has one axis of this static size."""
    shape = expr.ty.shape
    return len(shape) == 1 and getattr(shape[0], "value", None) == size


def substitute(expr: relax.Expr, values: dict[relax.Var, relax.Var]) -> relax.Expr:
    """The expression with variables exchanged; types stay as they are."""
    if isinstance(expr, relax.Var):
        return values.get(expr, expr)
    if isinstance(expr, relax.Call):
        args = [substitute(arg, values) if isinstance(arg, relax.Expr) else arg for arg in expr.args]
        return typed(relax.Call(expr.op, args, expr.attrs, expr.ty_args))
    if isinstance(expr, relax.Tuple):
        return typed(relax.Tuple([substitute(part, values) for part in expr.fields]))
    if isinstance(expr, relax.TupleGetItem):
        return typed(relax.TupleGetItem(substitute(expr.tuple_value, values), expr.index))
    return expr
