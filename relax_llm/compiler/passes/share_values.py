"""What the virtual machine has made once in a call is not made again: shapes, tensors over planned memory, fields."""

from collections import defaultdict
from dataclasses import dataclass

import tvm_ffi
from tvm import IRModule, ir, relax

_ALLOC_TENSOR = ir.Op.get("relax.vm.alloc_tensor")

_MAKING = frozenset({"vm.builtin.make_shape", "vm.builtin.make_prim_value"})
"""Functions of TVM's runtime that give the same whenever they get the same."""


@dataclass(frozen=True)
class ShareValues:
    """Leave out instructions that give what one before gave. It stands behind the planning of memory, and of shapes.

    Each layer writes its results where the layer before wrote its own, and for each of them there was a shape made, and
    a tensor from it: two instructions for every launch.

    Before::

        shape = R.call_packed("vm.builtin.make_shape", heap, ...)
        a = R.vm.alloc_tensor(storage, 0, shape, R.dtype("float32"))
        cls.norm(x, weight_0, a)
        ...
        shape_1 = R.call_packed("vm.builtin.make_shape", heap, ...)
        b = R.vm.alloc_tensor(storage, 0, shape_1, R.dtype("float32"))
        cls.norm(y, weight_1, b)

    After::

        shape = R.call_packed("vm.builtin.make_shape", heap, ...)
        a = R.vm.alloc_tensor(storage, 0, shape, R.dtype("float32"))
        cls.norm(x, weight_0, a)
        ...
        cls.norm(y, weight_1, a)
    """

    def __call__(self, mod: IRModule) -> IRModule:
        """Change the functions of the model."""
        changed = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, relax.Function):
                changed[var] = _Sharing(mod).visit_expr(func)
        return changed


@relax.expr_functor.mutator
class _Sharing(relax.PyExprMutator):
    """Goes through one function."""

    def __init__(self, mod: IRModule) -> None:
        super().__init__(mod)
        self._made: defaultdict[int, list[tuple[relax.Expr, relax.Var]]] = defaultdict(list)
        self._depth = 0

    def visit_seq_expr_(self, op: relax.SeqExpr) -> relax.Expr:
        """Know how deep it is: what is made under a condition is not there for what comes after."""
        self._depth += 1
        visited = super().visit_seq_expr_(op)
        self._depth -= 1
        return visited

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Put the variable that has the value in the place of another one that would have it, too."""
        value = self.visit_expr(binding.value)
        if isinstance(value, relax.Var):
            self.set_var_remap(binding.var, value)
            return
        if self._depth != 1 or not _is_made(value):
            super().visit_var_binding_(binding)
            return
        alike = self._made[tvm_ffi.structural_hash(value)]
        var = next((var for made, var in alike if tvm_ffi.structural_equal(made, value)), None)
        if var is None:
            var = self.builder_.emit(value, binding.var.name)
            alike.append((value, var))
        self.set_var_remap(binding.var, var)


def _is_made(value: relax.Expr) -> bool:
    """Whether a value is the same whenever it is made from the same, in one call of the model."""
    if isinstance(value, relax.Call):
        callee = value.op
        return callee == _ALLOC_TENSOR or (
            isinstance(callee, relax.ExternFunc) and callee.global_symbol in _MAKING
        )
    return isinstance(value, relax.TupleGetItem)
