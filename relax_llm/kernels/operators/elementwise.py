"""The record of arithmetic on single elements: its reference is the expression, with the errors that it propagates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import erf

import numpy as np
from tvm import te, tirx
from tvm.tirx import PrimFunc

from relax_llm.kernels.elementwise import Elementwise, Shape, scalar
from relax_llm.kernels.expression import Input, Number, Tree, fold
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.operators.operator import UNIT, Array, Expected, Mistake, Operand, Operator, Sizes
from relax_llm.kernels.problem import tag

_LARGEST = float(np.finfo(np.float32).max)
_EXACT = ("abs", "ceil", "floor", "maximum", "minimum", "round", "trunc")
_INTEGERS = 100  # The largest of random ones.

# How many roundings of its result a function's own error is, and how much beside that: what implementations differ in.
_OWN: Mapping[str, tuple[float, float]] = {
    "/": (3.0, 0.0),  # a product with the reciprocal will do
    "cos": (4.0, 4 * UNIT),
    "erf": (4.0, 1e-6),
    "exp": (8.0, 1e-37),
    "log": (4.0, 4 * UNIT),
    "pow": (16.0, 1e-37),
    "rsqrt": (4.0, 0.0),
    "sigmoid": (8.0, 1e-37),
    "sin": (4.0, 4 * UNIT),
    "tanh": (4.0, 4e-7),
}


def operands(problem: Elementwise, layout: Layout | None) -> tuple[Operand, ...]:
    """The inputs a, b, ..., then out, of the shapes that the problem says."""
    *given, result = problem.types
    inputs = zip(problem.names, problem.inputs, given, strict=True)
    return (
        *(Operand(name, shape, type_) for name, shape, type_ in inputs),
        Operand("out", problem.shape, result, "output"),
    )


def definition(problem: Elementwise) -> PrimFunc:
    """Plain loops: block "elementwise"."""
    sizes = {name: tirx.Var(name, "int64") for name in ("batch", "seq")}

    def at(shape: Shape) -> tuple[object, ...]:
        return tuple(sizes[size] if isinstance(size, str) else size for size in shape)

    tensors = {
        o.name: te.placeholder(at(o.shape), o.dtype, name=o.name) for o in operands(problem, None)[:-1]
    }
    shapes = dict(zip(problem.names, problem.inputs, strict=True))

    def element(*indices: tirx.Var) -> tirx.Expr:
        def load(used: Input) -> tirx.Expr:
            shape = shapes[used.name]
            own = indices[len(indices) - len(shape) :]
            place = [0 if size == 1 else index for size, index in zip(shape, own, strict=True)]
            if used.offset:
                place[-1] = place[-1] + used.offset
            return tensors[used.name](*place)

        return scalar(problem.tree, load)

    out = te.compute(at(problem.shape), element, name="elementwise")
    func = te.create_prim_func([*tensors.values(), out])
    return tag(func.with_attr("global_symbol", f"loops_{problem.name}"), problem)


def inputs(problem: Elementwise, sizes: Sizes, rng: np.random.Generator, exact: bool) -> dict[str, Array]:
    """Normal numbers, half of them without their sign, so that roots and logarithms have something to do; integers."""
    made = {}
    for operand in operands(problem, None)[:-1]:
        shape = operand.at(sizes)
        if operand.dtype == "float32":
            values = 2 * rng.standard_normal(shape, np.float32)
            made[operand.name] = np.where(rng.random(shape) < 0.5, np.abs(values), values)
        else:
            made[operand.name] = rng.integers(1, _INTEGERS + 1, shape).astype(operand.dtype)
    return made


@dataclass(frozen=True)
class _Value:
    """What a part of an expression is, and how far from it an honest kernel may be.

    Attributes:
        right: float64, whole numbers and truth values too.
        error: Of each element. For a truth value not 0 where it may be the other.
        rounds: Whether it is a float32.
    """

    right: Array
    error: Array
    rounds: bool


def expected(
    problem: Elementwise, sizes: Sizes, values: Mapping[str, Array], exact: bool
) -> dict[str, Expected]:
    """The expression in float64, with a running error bound (Higham 2002, section 3.3).

    An operation moves on the errors of its arguments: it is evaluated at the ends of the intervals in which they lie,
    which is enough for what is monotonic there. To that comes its own: a rounding, or what `_OWN` says.
    """
    shape = operands(problem, None)[-1].at(sizes)
    whole = {
        name: values[name].reshape(o.at(sizes))
        for name, o in zip(problem.names, operands(problem, None), strict=False)
    }

    def make(part: Tree, arguments: tuple[_Value, ...]) -> _Value:
        if isinstance(part, Number):
            return _Value(np.float64(part.value), np.float64(0), isinstance(part.value, float))
        if isinstance(part, Input):
            given: Array = whole[part.name]
            if shape and given.shape and given.shape[-1] != 1:
                given = given[..., part.offset : part.offset + shape[-1]]
            return _Value(given.astype(np.float64), np.zeros(given.shape), given.dtype == np.float32)
        return _applied(part.function, arguments)

    with np.errstate(all="ignore"):
        found = fold(problem.tree, make)
        bound = np.where(np.abs(found.right) > _LARGEST, np.inf, np.nan_to_num(found.error, nan=np.inf))
    return {"out": Expected(np.broadcast_to(found.right, shape), np.broadcast_to(bound, shape))}


def _applied(function: str, arguments: Sequence[_Value]) -> _Value:
    rights = [value.right for value in arguments]
    right = IN_NUMPY[function](*rights)
    if function in ("<", "<=", "==", "!="):
        near = np.abs(rights[0] - rights[1]) <= arguments[0].error + arguments[1].error
        inexact = (arguments[0].error + arguments[1].error) > 0
        return _Value(right, (near & inexact).astype(np.float64), False)
    if function in ("and", "or", "not"):
        return _Value(right, np.maximum.reduce([value.error + 0 * right for value in arguments]), False)
    if function == "where":
        condition, *chosen = arguments
        error = np.where(rights[0] != 0, chosen[0].error, chosen[1].error)
        doubt = np.abs(rights[1] - rights[2]) + np.maximum(chosen[0].error, chosen[1].error)
        return _Value(
            right, np.where(condition.error > 0, doubt, error), any(value.rounds for value in chosen)
        )
    rounds = any(value.rounds for value in arguments) if function not in _CASTS else function == "float32"
    error = _moved(function, arguments, right)
    if function in ("sin", "cos"):
        error = arguments[0].error
    if rounds and function not in _EXACT:
        roundings, beside = _OWN.get(function, (1.0, 0.0))
        error = error + roundings * UNIT * (np.abs(right) + error) + beside
    return _Value(right, error, rounds)


def _moved(function: str, arguments: Sequence[_Value], right: Array) -> Array:
    """How far the result moves when arguments move within their errors."""
    if not any(value.error.any() for value in arguments):
        return np.zeros(np.shape(right))
    corners = product(*((value.right - value.error, value.right + value.error) for value in arguments))
    moved = [np.abs(IN_NUMPY[function](*corner) - right) for corner in corners]
    crossed = function == "/" and np.abs(arguments[1].right) <= arguments[1].error
    return np.where(crossed, np.inf, np.maximum.reduce(moved))


_CASTS = ("float32", "int32", "int64")


def _erf(x: Array) -> Array:
    return np.array([erf(value) for value in np.ravel(x)]).reshape(np.shape(x))


def _where(condition: Array, x: Array, y: Array) -> Array:
    return np.where(condition != 0, x, y)


IN_NUMPY: Mapping[str, Callable[..., Array]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "//": np.floor_divide,
    "%": np.mod,
    "<": np.less,
    "<=": np.less_equal,
    "==": np.equal,
    "!=": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "where": _where,
    "pow": np.power,
    "round": np.rint,
    "erf": _erf,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "float32": lambda x: x * 1.0,
    "int32": np.trunc,
    "int64": np.trunc,
    **{
        name: getattr(np, name)
        for name in ("abs", "ceil", "cos", "exp", "floor", "log", "maximum", "minimum")
    },
    **{name: getattr(np, name) for name in ("sin", "sqrt", "tanh", "trunc")},
}
"""What each function of an expression computes, in NumPy."""

_ROWS: Shape = ("batch", "seq", 48)


def _sample(
    expression: str, *inputs: Shape, shape: Shape = _ROWS, types: tuple[str, ...] = ()
) -> Elementwise:
    return Elementwise(expression, shape, inputs, types or ("float32",) * (len(inputs) + 1))


ELEMENTWISE = Operator(
    Elementwise,
    operands,
    definition,
    inputs,
    expected,
    samples=(
        _sample("(a + b) * c", ("batch", "seq", 33), (1, "seq", 33), (33,), shape=("batch", "seq", 33)),
        _sample("(a * sigmoid(a)) * a[48:]", ("batch", "seq", 96)),
        _sample("tanh(a / 30.0) * 30.0 - erf(b) * exp(c)", _ROWS, ("batch", "seq", 1), (1,)),
        _sample(
            "where((0.0 < a) and (a != b), rsqrt(abs(a)), maximum(b, log(abs(b)))) * pow(abs(a), 1.5) + cos(round(b))",
            _ROWS,
            (48,),
        ),
        _sample(
            "float32(int64(a // 3 + 2)) * b",
            (1, "seq"),
            (),
            shape=("batch", "seq"),
            types=("int32", "float32", "float32"),
        ),
    ),
    benchmarks=(
        _sample("a + b", ("batch", "seq", 768), (1, "seq", 768), shape=("batch", "seq", 768)),
        _sample("(a * sigmoid(a)) * a[8192:]", ("batch", "seq", 16384), shape=("batch", "seq", 8192)),
        _sample("tanh(a / 30.0) * 30.0", ("batch", "seq", 256000), shape=("batch", "seq", 256000)),
    ),
    mistakes=(
        Mistake(
            {"expression": "a + ", "shape": _ROWS, "inputs": (_ROWS,), "types": ("float32",) * 2},
            "no expression",
        ),
        Mistake(
            {"expression": "a + c", "shape": _ROWS, "inputs": (_ROWS,), "types": ("float32",) * 2},
            "must have",
        ),
        Mistake(
            {"expression": "a", "shape": _ROWS, "inputs": ((47,),), "types": ("float32",) * 2}, "broadcast"
        ),
        Mistake(
            {"expression": "a[4:]", "shape": _ROWS, "inputs": (_ROWS,), "types": ("float32",) * 2},
            "broadcast",
        ),
        Mistake(
            {"expression": "a", "shape": ("rows",), "inputs": ((1,),), "types": ("float32",) * 2}, "Sizes"
        ),
        Mistake(
            {"expression": "a", "shape": _ROWS, "inputs": ((48,),), "types": ("float32", "bool")}, "type of"
        ),
    ),
)
