"""What a traced function computes, in NumPy: before there are kernels, and without making any."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import ir, relax, tirx

from relax_llm.artifact.kv_cache import TILE
from relax_llm.compiler.bindings import Line, is_launch, is_op, used
from relax_llm.errors import CompileError
from relax_llm.kernels.matmul import problem as matmul
from relax_llm.kernels.operators import elementwise, operator_of
from relax_llm.kernels.problem import Problem

Array = npt.NDArray[Any]


class UnknownOperatorError(CompileError):
    """A function has an operator in it for which there is no definition here."""


def evaluate(
    line: Line,
    problems: Mapping[ir.GlobalVar, Problem | None],
    token_ids: Array,
    caches: int,
    read: Callable[[str], Array],
    watch: Callable[[relax.Var, Array], None],
) -> None:
    """Evaluate a function that `export` has traced, from an empty cache.

    Values are kept no longer than something uses them, and weights are read where they are used.

    Args:
        line: The function.
        problems: What its launches solve.
        token_ids: int32 [1, seq].
        caches: How many of its parameters are caches.
        read: Gives a parameter by name, in float32.
        watch: Told of every variable and its value, in order.

    Raises:
        UnknownOperatorError: Something in it is not known here; it is named.
    """
    seq = token_ids.shape[1]
    sizes = {"batch": 1, "seq": seq, "kv_len": seq, "tiles": -(-seq // TILE)}
    values: dict[relax.Var, Any] = {line.params[0]: token_ids}
    for cache in line.params[2 : 2 + caches]:
        values[cache] = np.zeros(_shape(cache, sizes), str(cache.ty.dtype))
    weights = {var: var.name for var in line.params[2 + caches :]}
    last = {var: user for user, expr in line for var in used(expr)}

    def value(expr: Any) -> Any:
        if isinstance(expr, relax.Tuple):
            return tuple(map(value, expr.fields))
        if isinstance(expr, ir.GenericConst):
            return expr.value.numpy()
        return read(weights[expr]) if expr in weights else values[expr]

    for var, expr in line:
        if is_launch(expr):
            made = _launched(expr, problems, sizes, value, values)
        elif isinstance(expr, relax.TupleGetItem):
            made = value(expr.tuple_value)[expr.index]
        elif isinstance(expr, relax.Call):
            made = _computed(expr, var, sizes, value)
        else:
            made = value(expr)
        values[var] = made
        if not isinstance(made, tuple):
            watch(var, made)
        for one in used(expr):
            if last[one] is var:
                values.pop(one, None)


def _launched(
    call: relax.Call,
    problems: Mapping[ir.GlobalVar, Problem | None],
    sizes: Mapping[str, int],
    value: Callable[[Any], Any],
    values: dict[relax.Var, Any],
) -> Any:
    """What a launch gives, by its operator's float64 reference. Tensors that it updates have their new values then."""
    problem = problems[call.args[0]]
    if problem is None:
        raise UnknownOperatorError(f"{call.args[0].name_hint} is a function of TIR")
    record = operator_of(problem)
    operands = record.operands(problem, None)
    given = list(zip(operands, call.args[1], strict=False))
    tensors = {operand.name: value(arg) for operand, arg in given if operand.is_tensor}
    with np.errstate(all="ignore"):  # a bound may well be infinite
        found = record.expected(problem, sizes, tensors, False)
    results = {one.name: found[one.name].right.astype(one.dtype) for one in operands if one.is_result}
    values |= {arg: results[operand.name] for operand, arg in given if operand.role == "updated"}
    return results[operands[-1].name] if is_op(call, "relax.call_tir") else tuple(results.values())


def _computed(
    call: relax.Call, var: relax.Var, sizes: Mapping[str, int], value: Callable[[Any], Any]
) -> Array | tuple[Array, ...]:
    """What an operator of Relax gives."""
    name = call.op.name if isinstance(call.op, ir.Op) else type(call.op).__name__
    if name == "relax.reshape":
        return np.reshape(value(call.args[0]), _shape(var, sizes))
    if name not in _OPERATORS:
        raise UnknownOperatorError(name)
    given = [value(arg) for arg in call.args if isinstance(arg.ty, relax.TensorType | relax.TupleType)]
    try:
        with np.errstate(all="ignore"):
            made = _OPERATORS[name](call.attrs, *given)
    except (TypeError, ValueError, IndexError) as error:  # of arguments that the table does not think of
        raise UnknownOperatorError(f"{name} as it is used here ({error})") from error
    return made if isinstance(made, tuple) else np.asarray(made, str(var.ty.dtype))


def _shape(var: relax.Var, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a variable at these sizes."""

    def size(of: Any) -> int:
        if isinstance(of, tirx.Var) and of.name in sizes:
            return sizes[of.name]
        if isinstance(of, tirx.IntImm):
            return int(of.value)
        raise UnknownOperatorError(f"a size of {of}")

    return tuple(map(size, var.ty.shape))


def _axis(attrs: Any) -> int:
    return int(attrs.axis)


def _rms_norm(attrs: Any, x: Array, weight: Array) -> Array:
    axes = tuple(int(axis) for axis in attrs.axes)
    mean = np.square(x).mean(axis=axes, keepdims=True)
    made: Array = x / np.sqrt(mean + float(attrs.epsilon)) * weight
    return made


def _layer_norm(attrs: Any, x: Array, weight: Array, bias: Array) -> Array:
    axes = tuple(int(axis) for axis in attrs.axes)
    centred = x - x.mean(axis=axes, keepdims=True)
    made: Array = centred / np.sqrt(np.square(centred).mean(axis=axes, keepdims=True) + float(attrs.epsilon))
    made *= weight if attrs.scale else 1
    made += bias if attrs.center else 0
    return made


def _softmax(attrs: Any, x: Array) -> Array:
    weights: Array = np.exp(x - x.max(axis=_axis(attrs), keepdims=True))
    weights /= weights.sum(axis=_axis(attrs), keepdims=True)
    return weights


def _split(attrs: Any, x: Array) -> tuple[Array, ...]:
    told = attrs.indices_or_sections
    sections = int(told.value) if isinstance(told, tirx.IntImm) else [int(index) for index in told]
    return tuple(np.split(x, sections, axis=_axis(attrs)))


def _permuted(attrs: Any, x: Array) -> Array:
    return np.transpose(x, None if attrs.axes is None else [int(axis) for axis in attrs.axes])


_ELEMENTWISE: Mapping[str, Callable[..., Array]] = {
    "add": elementwise.IN_NUMPY["+"],
    "subtract": elementwise.IN_NUMPY["-"],
    "multiply": elementwise.IN_NUMPY["*"],
    "divide": elementwise.IN_NUMPY["/"],
    "power": elementwise.IN_NUMPY["pow"],
    "negative": np.negative,
    "square": np.square,
    **{name: elementwise.IN_NUMPY[name] for name in ("abs", "exp", "log", "maximum", "minimum")},
    **{name: elementwise.IN_NUMPY[name] for name in ("rsqrt", "sigmoid", "sqrt", "tanh")},
    **{f"nn.{name}": function for name, function in matmul.IN_NUMPY.items()},
}


def _plain(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda attrs, *arrays: function(*arrays)


def _concatenated(attrs: Any, parts: Sequence[Array]) -> Array:
    return np.concatenate(parts, axis=_axis(attrs))


_OPERATORS: Mapping[str, Callable[..., Array | tuple[Array, ...]]] = {
    **{f"relax.{name}": _plain(function) for name, function in _ELEMENTWISE.items()},
    "relax.matmul": _plain(np.matmul),
    "relax.astype": _plain(np.asarray),  # results have their variable's type
    "relax.concat": _concatenated,
    "relax.permute_dims": _permuted,
    "relax.split": _split,
    "relax.take": lambda attrs, table, ids: np.take(table, ids, axis=_axis(attrs)),
    "relax.nn.softmax": _softmax,
    "relax.nn.rms_norm": _rms_norm,
    "relax.nn.layer_norm": _layer_norm,
}
