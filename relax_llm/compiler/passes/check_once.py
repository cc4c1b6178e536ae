"""Weights and caches are not checked again in every call, tensor by tensor."""

from dataclasses import dataclass

from tvm import IRModule, relax

_STORE = 1  # of a size to the heap: TVM's MatchShapeCode
_BEFORE_SIZES = 3  # arguments of match_shape: the tensor, the heap, how many sizes


@dataclass(frozen=True)
class CheckOnce:
    """Leave the types of what comes in tuples to those who made it, and to the kernels.

    In every call, before the first launch, the virtual machine compared the rank, type and shape of each weight and
    cache with the function's parameters. Weights were checked when they were loaded, the runtime makes the caches, and
    each kernel looks at its own arguments anyway. What first says how large a symbolic dimension is stays.

    Before::

        w = weights[0]
        R.call_packed("vm.builtin.check_tensor_info", w, 2, R.dtype("float32"), ...)
        R.call_packed("vm.builtin.match_shape", w, heap, 2, 0, 576, 0, 32, ...)

    After::

        w = weights[0]
    """

    def __call__(self, mod: IRModule) -> IRModule:
        """Change the functions of the model."""
        changed = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, relax.Function):
                changed[var] = _checked_once(func)
        return changed


def _checked_once(func: relax.Function) -> relax.Function:
    given = {param for param in func.params if isinstance(param.ty, relax.TupleType)}
    blocks = []
    for block in func.body.blocks:
        kept = []
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.TupleGetItem) and value.tuple_value in given:
                given.add(binding.var)
            if not (
                isinstance(value, relax.Call) and value.args and value.args[0] in given and _is_check(value)
            ):
                kept.append(binding)
        blocks.append(relax.BindingBlock(kept))
    return relax.Function(
        func.params, relax.SeqExpr(blocks, func.body.body), func.ret_ty, func.is_pure, func.attrs
    )


def _is_check(call: relax.Call) -> bool:
    """Whether a call compares, and does nothing else."""
    name = getattr(call.op, "global_symbol", "")
    if name in ("vm.builtin.check_tensor_info", "vm.builtin.check_tuple_info"):
        return True
    if name != "vm.builtin.match_shape":
        return False
    codes = call.args[_BEFORE_SIZES:-1:2]
    return all(int(code) != _STORE for code in codes)
