"""Arithmetic on each element: what a model has besides the operators with a kernel of their own, fused."""

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b, vectormath
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.expression import CASTS, Apply, Input, Number, Tree, fold, parse, parts
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.pieces import Pieces
from relax_llm.kernels.problem import Problem, tag

Shape = tuple[int | str, ...]

SIZES = ("batch", "seq")
"""The symbolic sizes that shapes may have."""

TYPES = ("float32", "int32", "int64")
_SERIAL = 16384  # Elements that one core has done before a second one has begun.
_LONGEST = 8192
_WORDS = {"+": "add", "-": "sub", "*": "mul", "/": "div", "//": "div", "%": "mod"}
_NAMED = 4  # Operations in a name.


@dataclass(frozen=True)
class Elementwise(Problem):
    """An expression of the elements of tensors.

    The inputs are called a, b, c, ... in order. As in NumPy, an axis of 1 stands for every index, and axes that are not
    there come first.

    Attributes:
        expression: What is computed: "a * sigmoid(a) + b", "where(0.0 < a, a, b)", "a[48:]" for the elements from the
            48th on along the last axis.
        shape: Of the result: numbers, "batch" and "seq".
        inputs: Shapes of the inputs.
        types: Element types of the inputs, then of the result.
    """

    operator: ClassVar[str] = "elementwise"
    expression: str
    shape: Shape
    inputs: tuple[Shape, ...]
    types: tuple[str, ...]

    def __post_init__(self) -> None:
        used = {part.name for part in parts(self.tree) if isinstance(part, Input)}
        if used != set(self.names) or len(self.names) > 26:
            raise KernelError(
                f"{self.expression!r} must have the inputs {', '.join(self.names) or '(none)'}, and no others."
            )
        if len(self.types) != len(self.inputs) + 1 or not set(self.types) <= set(TYPES):
            raise KernelError(
                f"An elementwise problem has a type of {', '.join(TYPES)} for each input and the result, not "
                f"{self.types}."
            )
        for shape in (self.shape, *self.inputs):
            if not all(size in SIZES if isinstance(size, str) else size >= 1 for size in shape):
                raise KernelError(
                    f"Sizes of an elementwise problem are at least 1, or one of {', '.join(SIZES)}: {shape}."
                )
        for part in parts(self.tree):
            if isinstance(part, Input):
                self._check_broadcast(part)

    def _check_broadcast(self, used: Input) -> None:
        given = self.inputs[self.names.index(used.name)]
        aligned = self.shape[len(self.shape) - len(given) :]
        fits = len(given) <= len(self.shape) and all(
            size in (1, whole) for size, whole in zip(given[:-1], aligned[:-1], strict=True)
        )
        if fits and given:
            size, whole = given[-1], aligned[-1]
            part = isinstance(size, int) and isinstance(whole, int) and used.offset + whole <= size
            fits = part if used.offset or size not in (1, whole) else True
        if not fits:
            raise KernelError(f"{used} of the shape {list(given)} does not broadcast to {list(self.shape)}.")

    @cached_property
    def tree(self) -> Tree:
        """The expression as data."""
        return parse(self.expression)

    @property
    def names(self) -> tuple[str, ...]:
        """What the inputs are called."""
        return tuple("abcdefghijklmnopqrstuvwxyz"[: len(self.inputs)])

    @property
    def name(self) -> str:
        calls = [part.function for part in parts(self.tree) if isinstance(part, Apply)]
        words = [_WORDS.get(call, call) for call in calls if _WORDS.get(call, call).isidentifier()]
        said = list(dict.fromkeys(words))[:_NAMED]
        digest = hashlib.blake2b(self.to_json().encode(), digest_size=4).hexdigest()
        return "_".join([self.operator, *said, digest])

    @property
    def flops(self) -> str:
        count = sum(isinstance(part, Apply) for part in parts(self.tree))
        return "*".join(map(str, (count, *self.shape)))

    @property
    def bytes(self) -> str:
        terms = [
            "*".join(map(str, (8 if type_ == "int64" else 4, *shape)))
            for shape, type_ in zip((*self._read, self.shape), self.types, strict=True)
        ]
        return " + ".join(terms)

    @property
    def _read(self) -> list[Shape]:
        """What of each input is read: all, but of one with parts only these."""
        offsets: dict[str, set[int]] = {}
        for part in parts(self.tree):
            if isinstance(part, Input):
                offsets.setdefault(part.name, set()).add(part.offset)
        found: list[Shape] = []
        for name, shape in zip(self.names, self.inputs, strict=True):
            last, whole = shape[-1:], self.shape[-1:]
            if last and last[0] != 1 and isinstance(last[0], int) and isinstance(whole[0], int):
                last = (min(last[0], whole[0] * len(offsets[name])),)
            found.append((*shape[:-1], *last))
        return found


def elementwise(problem: Elementwise, machine: Machine) -> PrimFunc:
    """The inputs -> out, of the shapes that the problem says.

    A row is the last axis; where its size is not known, every element is one.
    """
    of_rows = isinstance(problem.shape[-1], int)
    shapes = [shape if of_rows else (*shape, 1) for shape in (*problem.inputs, problem.shape)]
    *outer, width = shapes[-1]
    pieces = Pieces(int(width), _LONGEST)

    def emit() -> None:
        sizes = {name: b.size(name) for name in SIZES if any(name in shape for shape in shapes)}

        def extent(*shape: int | str) -> Expr:
            total = T.int64(1)
            for size in shape:
                total = total * (sizes[size] if isinstance(size, str) else T.int64(size))
            return total

        names = (*problem.names, "out")
        given = zip(names, (*problem.inputs, problem.shape), problem.types, strict=True)
        declared = [
            (b.argument(n, [extent(size) for size in shape], type_), shape, type_)
            for n, shape, type_ in given
        ]
        flat = {n: b.view(d[0], (extent(*d[1]),), d[2]) for n, d in zip(names, declared, strict=True)}

        def begin(shape: Shape, row: Expr, indices: Sequence[Expr]) -> Expr:
            """Where a row of the result begins in an operand."""
            *own, last = (1,) * (len(outer) + 1 - len(shape)) + shape
            position = T.int64(0)
            for size, index in zip(own, indices, strict=True):
                position = position * extent(size) + index if size != 1 else position
            return b.let("begin", (row if own == outer else position) * extent(last))

        def task(index: Expr) -> None:
            row, piece = pieces.split(index)
            rest: Expr = row
            indices: list[Expr] = []
            for size in reversed(outer):
                indices.insert(0, rest % extent(size))
                rest = rest // extent(size)
            begins = {n: begin(shape, row, indices) for n, shape in zip(names, shapes, strict=True)}
            single = {n for n, shape in zip(names, shapes, strict=True) if shape[-1:] in ((), (1,))}

            def visit(at: Expr, lanes: int) -> None:
                def load(used: Input) -> Expr:
                    if used.name in single:
                        return _splat(flat[used.name][begins[used.name]], lanes)
                    return b.load(flat[used.name], begins[used.name] + at + used.offset, lanes=lanes)

                b.store(flat["out"], _vector(problem.tree, load, lanes), begins["out"] + at, lanes=lanes)

            pieces.visit(piece, visit)

        rows = extent(*outer)
        b.tasks(rows * pieces.count, task, serial_if=rows * int(width) <= _SERIAL, name="row")

    return tag(b.prim_func(problem.name, emit), problem)


def scalar(tree: Tree, load: Callable[[Input], Expr]) -> Expr:
    """The expression in TIR's own terms.

    Args:
        tree: The expression.
        load: Gives an element.
    """
    return fold(tree, lambda part, arguments: _applied(part, arguments, load, 1, SCALAR))


def _vector(tree: Tree, load: Callable[[Input], Expr], lanes: int) -> Expr:
    """The expression of neighbours at once; what occurs in it twice is computed once."""

    def make(part: Tree, arguments: tuple[Expr, ...]) -> Expr:
        value = _applied(part, arguments, load, lanes, VECTOR)
        named = not isinstance(part, Number) and "bool" not in str(value.ty.dtype)
        return b.let("value", value) if named else value

    return fold(tree, make)


def _applied(
    part: Tree,
    arguments: Sequence[Expr],
    load: Callable[[Input], Expr],
    lanes: int,
    functions: Mapping[str, Callable[..., Expr]],
) -> Expr:
    if isinstance(part, Input):
        return load(part)
    if isinstance(part, Number):  # of which type, what it is combined with says
        return part.value
    types = [
        str(value.ty.dtype).partition("x")[0] for value in arguments if not isinstance(value, int | float)
    ]
    known = [type_ for type_ in types if type_ != "bool"]
    exact = [
        _splat(tirx.const(value, "float32" if isinstance(value, float) else known[0]), lanes)
        if isinstance(value, int | float)
        else value
        for value in arguments
    ]
    if part.function in CASTS:
        return tirx.Cast(b.vector_type(part.function, lanes), exact[0])
    return functions[part.function](*exact)


def _splat(value: Expr, lanes: int) -> Expr:
    return value if lanes == 1 else T.broadcast(value, lanes)


def _tanh(x: Expr) -> Expr:
    """tanh within 4 ULP: the Cephes library's polynomial near 0, 1 - 2 / (e**(2|x|) + 1) elsewhere."""
    c = lambda value: _splat(T.float32(value), int(x.ty.dtype.lanes))  # noqa: E731
    size = b.let("size", T.max(x, c(0.0) - x))
    far = b.let("far", c(1.0) - c(2.0) / (vectormath.exp(size + size) + c(1.0)))
    square = b.let("square", x * x)
    p = c(-5.70498872745e-3)
    for coefficient in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = p * square + c(coefficient)
    return T.Select(size < c(0.625), x + x * square * p, T.Select(x < c(0.0), c(0.0) - far, far))


SCALAR: Mapping[str, Callable[..., Expr]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": tirx.div,
    "//": tirx.floordiv,
    "%": tirx.floormod,
    "<": operator.lt,
    "<=": operator.le,
    "==": tirx.EQ,
    "!=": tirx.NE,
    "and": tirx.And,
    "or": tirx.Or,
    "not": tirx.Not,
    "where": tirx.Select,
    "maximum": tirx.max,
    "minimum": tirx.min,
    "pow": tirx.power,
    "round": tirx.nearbyint,
    "rsqrt": lambda x: 1.0 / tirx.sqrt(x),
    **{name: getattr(tirx, name) for name in ("abs", "ceil", "cos", "erf", "exp", "floor", "log")},
    **{name: getattr(tirx, name) for name in ("sigmoid", "sin", "sqrt", "tanh", "trunc")},
}
"""What TIR calls the functions of an expression."""

VECTOR: Mapping[str, Callable[..., Expr]] = {
    **SCALAR,
    "erf": vectormath.erf,
    "exp": vectormath.exp,
    "sigmoid": vectormath.sigmoid,
    "tanh": _tanh,
    "rsqrt": lambda x: _splat(T.float32(1), int(x.ty.dtype.lanes)) / tirx.sqrt(x),
}
"""The same on vectors: functions that would else be one call for each lane are computed on all."""
