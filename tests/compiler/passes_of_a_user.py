"""Passes as a user would write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import relax
from tvm.relax.dpl import is_op, rewrite_call, wildcard

from relax_llm.compiler.bindings import typed

if TYPE_CHECKING:
    from tvm import IRModule

    from relax_llm.compiler.planner import Planner


@dataclass(frozen=True)
class ScaleSilu:
    """Multiply what silu gives."""

    factor: float

    def __call__(self, mod: IRModule) -> IRModule:
        x = wildcard()
        call = is_op("relax.nn.silu")(x)

        def scaled(_: Any, found: Any) -> Any:  # without silu itself: what is rewritten is matched again
            silu = relax.op.multiply(found[x], relax.op.sigmoid(found[x]))
            return relax.op.multiply(silu, relax.const(self.factor, "float32"))

        changed = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, relax.Function):
                changed[var] = rewrite_call(call, scaled, func)
        return changed


@dataclass
class ForMachine:
    """A pass that has to know what is compiled for."""

    seen: list[str]

    def bind(self, planner: Planner) -> Any:
        self.seen.append(planner.machine.name)
        return _nothing


def _nothing(mod: IRModule) -> IRModule:
    return mod


def empties(mod: IRModule) -> Any:
    """Not a pass: forgets to return."""
    mod.clone()


def loses_decode(mod: IRModule) -> IRModule:
    changed = mod.clone()
    del changed["decode"]
    return changed


def untyped(mod: IRModule) -> IRModule:
    """Leave an expression without its type in a function."""
    changed = mod.clone()
    func = mod["hidden"]
    x = relax.const(1.0, "float32")
    y = relax.Var("y", relax.TensorType([], "float32"))
    block = relax.BindingBlock([relax.VarBinding(y, relax.op.add(x, x))])
    body = relax.SeqExpr([block, *func.body.blocks], func.body.body)
    changed["hidden"] = relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)
    return changed


def returns_token_ids(mod: IRModule) -> IRModule:
    """Let `hidden` give its token ids."""
    changed = mod.clone()
    func = mod["hidden"]
    ids = func.params[0]
    body = typed(relax.SeqExpr([], ids))
    changed["hidden"] = relax.Function(func.params, body, ids.ty, func.is_pure, func.attrs)
    return changed


def divides_by_zero(_: IRModule) -> IRModule:
    return 1 // 0


def launches_twice(mod: IRModule) -> IRModule:
    """Launch the first kernel of `decode` once more, after the launches have been read."""
    changed = mod.clone()
    func = mod["decode"]
    first, *rest = func.body.blocks
    call = next(binding.value for binding in first.bindings if isinstance(binding.value, relax.Call))
    more = relax.VarBinding(relax.Var("again", call.ty), call)
    block = relax.BindingBlock([*first.bindings, more])
    body = typed(relax.SeqExpr([block, *rest], func.body.body))
    changed["decode"] = relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)
    return changed
