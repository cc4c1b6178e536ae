"""Operators with a kernel of their own become launches of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tvm import IRModule, relax, tirx

from relax_llm.compiler.bindings import Edit, is_op, typed
from relax_llm.kernels.library import build
from relax_llm.kernels.lookup import Embedding
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.norm import Norm
from relax_llm.kernels.problem import Problem
from relax_llm.kernels.softmax import Softmax


@dataclass(frozen=True)
class Legalize:
    """Replace norms, softmax and embedding lookups by their kernels; what has none is left to TVM's own legalization.

    Before::

        y = R.nn.rms_norm(x, w, axes=[-1], epsilon=1e-5)

    After::

        y = R.call_tir(norm_hidden576_eps1em05, (x, w))

    Attributes:
        machine: What the kernels are generated for.
    """

    machine: Machine

    def __call__(self, mod: IRModule) -> IRModule:
        """Rewrite every function."""
        edit = Edit(mod)
        for line in edit.lines:
            for var, expr in list(line):
                for name, recognize in _OPERATORS.items():
                    found = recognize(expr) if is_op(expr, name) else None
                    if found is not None:
                        kernel = edit.kernel(found[0].name, partial(build, found[0], self.machine))
                        line.rebind(var, typed(relax.op.call_tir(kernel, found[1], out_ty=var.ty)))
        return edit.module()


_Found = tuple[Problem, list[relax.Expr]] | None


def _is_last_axis(axes: list[int], rank: int) -> bool:
    return axes in ([-1], [rank - 1])


def _rms_norm(call: relax.Call) -> _Found:
    x, weight = call.args
    if len(x.ty.shape) != 3 or not _is_last_axis([int(axis) for axis in call.attrs.axes], 3):
        return None
    return Norm(int(weight.ty.shape[0]), float(call.attrs.epsilon)), [x, weight]


def _layer_norm(call: relax.Call) -> _Found:
    x, weight, bias = call.args
    if len(x.ty.shape) != 3 or not _is_last_axis([int(axis) for axis in call.attrs.axes], 3):
        return None
    if not (call.attrs.center and call.attrs.scale):
        return None
    problem = Norm(int(weight.ty.shape[0]), float(call.attrs.epsilon), centered=True, bias=True)
    return problem, [x, weight, bias]


def _take(call: relax.Call) -> _Found:
    table, ids = call.args
    if (
        len(table.ty.shape) != 2
        or len(ids.ty.shape) != 2
        or int(call.attrs.axis) != 0
        or str(ids.ty.dtype) != "int32"
    ):
        return None
    rows, hidden = (int(size) for size in table.ty.shape)
    return Embedding(rows, hidden), [ids, table]


def _softmax(call: relax.Call) -> _Found:
    (x,) = call.args
    shape = x.ty.shape
    static = len(shape) == 3 and isinstance(shape[2], tirx.IntImm) and str(x.ty.dtype) == "float32"
    if not static or not _is_last_axis([int(call.attrs.axis)], 3):
        return None
    return Softmax(int(shape[2])), [x]


_OPERATORS: dict[str, Callable[[relax.Call], _Found]] = {
    "relax.nn.rms_norm": _rms_norm,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.softmax": _softmax,
    "relax.take": _take,
}
