"""What TVM's lowering and fusion left as plain loops, as a problem where it is arithmetic on single elements."""

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import ir, tirx
from tvm.tirx import PrimFunc

from relax_llm.errors import KernelError
from relax_llm.kernels.elementwise import SIZES, TYPES, Elementwise, Shape
from relax_llm.kernels.expression import COMPARISONS, LOGICAL, Apply, Input, Number, Tree

_LONGEST = 1000  # Characters of an expression. TVM's blocks share what they use twice, a tree repeats it.

_OPERATIONS: Mapping[str, str] = {
    "Add": "+",
    "Sub": "-",
    "Mul": "*",
    "Div": "/",
    "FloorDiv": "//",
    "FloorMod": "%",
    "Max": "maximum",
    "Min": "minimum",
    "LT": "<",
    "LE": "<=",
    "EQ": "==",
    "NE": "!=",
    "And": "and",
    "Or": "or",
}
_TURNED: Mapping[str, str] = {"GT": "<", "GE": "<="}
_CALLS: Mapping[str, str] = {
    **{
        f"tirx.{name}": name
        for name in ("ceil", "cos", "erf", "exp", "floor", "log", "pow", "rsqrt", "sigmoid")
    },
    **{f"tirx.{name}": name for name in ("sin", "sqrt", "tanh", "trunc")},
    "tirx.fabs": "abs",
    "tirx.if_then_else": "where",
    "tirx.nearbyint": "round",
    "tirx.round": "round",
}


class _Unlike(Exception):  # noqa: N818 - an answer
    """The function has something else in it than arithmetic on single elements."""


def described(func: PrimFunc) -> Elementwise | None:
    """The problem that a function of plain loops solves, if it computes each element of its result by itself.

    ::

        for i, j, k in T.grid(batch, seq, 48):
            gate[i, j, k] = T.sigmoid(x[i, j, k])                 "(a * sigmoid(a)) * a[48:]"
        for i, j, k in T.grid(batch, seq, 48):              ->    with the result [batch, seq, 48]
            out[i, j, k] = x[i, j, k] * gate[i, j, k] * x[i, j, k + 48]    and the input [batch, seq, 96]

    One token for each sequence is `seq` of them, so that decode and prefill share their problems.

    Args:
        func: A function after `FuseTIR`.

    Returns:
        The problem, its inputs in the order of the function's parameters; None where it is something else.
    """
    try:
        *inputs, result = (_Tensor(param) for param in func.params)
        if not inputs or not result.shape:
            return None
        names = dict(zip((one.param for one in inputs), "abcdefghijklmnopqrstuvwxyz", strict=False))
        tree = _read(func.body, names, result.param)
        of_one = _is_one_token(result.shape, [one.shape for one in inputs])
        shapes = [_tokens(one.shape, len(result.shape)) if of_one else one.shape for one in (*inputs, result)]
        return Elementwise(
            str(tree), shapes[-1], tuple(shapes[:-1]), tuple(one.dtype for one in (*inputs, result))
        )
    except (_Unlike, KernelError):
        return None


def _is_one_token(result: Shape, inputs: Sequence[Shape]) -> bool:
    """Whether the second axis is that of a step's tokens, of which there is one."""
    known = any("seq" in shape for shape in (result, *inputs))
    return len(result) > 1 and result[0] in ("batch", 1) and result[1] == 1 and not known


def _tokens(shape: Shape, rank: int) -> Shape:
    """A shape with `seq` in the place of the one token."""
    at = 1 - (rank - len(shape))
    return (*shape[:at], "seq", *shape[at + 1 :]) if at >= 0 else shape


class _Tensor:
    """A parameter of the function: its shape as problems have it, and its element type."""

    def __init__(self, param: tirx.Var) -> None:
        shape = getattr(param.ty, "shape", None)
        if shape is None:
            raise _Unlike
        self.dtype = str(param.ty.dtype)
        self.shape: Shape = tuple(_size(size) for size in shape)
        self.param = param
        if self.dtype not in TYPES:
            raise _Unlike


def _size(size: Any) -> int | str:
    if isinstance(size, tirx.IntImm):
        return int(size.value)
    if isinstance(size, tirx.Var) and size.name in SIZES:
        return str(size.name)
    raise _Unlike


def _read(body: Any, names: Mapping[tirx.Var, str], result: tirx.Var) -> Tree:
    """The tree of the result, with those of the blocks before it put where these are read."""
    known: dict[tirx.Var, Tree] = {}
    root = body.block.body
    for loops in root if isinstance(root, tirx.SeqStmt) else [root]:
        nest = []
        while isinstance(loops, tirx.For):
            nest.append(loops.loop_var)
            loops = loops.body
        block = getattr(loops, "block", None)
        if block is None or not isinstance(block.body, tirx.BufferStore) or block.init is not None:
            raise _Unlike
        axes = [axis.var for axis in block.iter_vars]
        if not _same(loops.iter_values, nest) or not _same(block.body.indices, axes):
            raise _Unlike
        tree = _Reader(names, known, axes).tree(block.body.value)
        if len(str(tree)) > _LONGEST:
            raise _Unlike
        known[block.body.buffer] = tree
    if result not in known:
        raise _Unlike
    return known[result]


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """Whether indices are these variables, one by one; on an axis of one element 0 will do."""
    return len(these) == len(those) and all(
        one.same_as(other) or _is_zero(one) for one, other in zip(these, those, strict=True)
    )


def _is_zero(index: Any) -> bool:
    return isinstance(index, tirx.IntImm) and int(index.value) == 0


class _Reader:
    """Makes trees of a block's expressions."""

    def __init__(
        self, names: Mapping[tirx.Var, str], known: Mapping[tirx.Var, Tree], axes: Sequence[tirx.Var]
    ) -> None:
        self._names, self._known, self._axes = names, known, axes

    def tree(self, expr: Any) -> Tree:
        kind = type(expr).__name__
        if kind == "FloatImm" and str(expr.ty.dtype) == "float32":
            return Number(float(expr.value))
        if kind == "IntImm" and str(expr.ty.dtype) in TYPES:
            return Number(int(expr.value))
        if kind == "TensorLoad":
            return self._load(expr)
        if kind in _OPERATIONS:
            return _simple(_OPERATIONS[kind], (self.tree(expr.a), self.tree(expr.b)))
        if kind in _TURNED:
            return Apply(_TURNED[kind], (self.tree(expr.b), self.tree(expr.a)))
        if kind == "Not":
            return Apply("not", (self.tree(expr.a),))
        if kind == "Select":
            parts = (expr.condition, expr.true_value, expr.false_value)
            return Apply("where", tuple(map(self.tree, parts)))
        if kind == "Cast" and str(expr.ty.dtype) in TYPES:
            return Apply(str(expr.ty.dtype), (self.tree(expr.value),))
        if kind == "Call" and isinstance(expr.op, ir.Op) and expr.op.name in _CALLS:
            return Apply(_CALLS[expr.op.name], tuple(map(self.tree, expr.args)))
        raise _Unlike

    def _load(self, expr: Any) -> Tree:
        indices = list(expr.indices)
        shape = [_size(size) for size in expr.source.ty.shape]
        axes = self._axes[len(self._axes) - len(indices) :]
        offset = 0
        if len(axes) != len(indices):
            raise _Unlike
        for place, (index, axis, size) in enumerate(zip(indices, axes, shape, strict=True)):
            if index.same_as(axis) or (size == 1 and _is_zero(index)):
                continue
            last = place == len(indices) - 1 and type(index).__name__ == "Add" and index.a.same_as(axis)
            if not last or not isinstance(index.b, tirx.IntImm) or int(index.b.value) < 0:
                raise _Unlike
            offset = int(index.b.value)
        if expr.source in self._names:
            return Input(self._names[expr.source], offset)
        if offset or expr.source not in self._known:
            raise _Unlike
        return self._known[expr.source]


def _simple(operation: str, arguments: tuple[Tree, Tree]) -> Tree:
    """The operation; where it asks whether a truth value is one, as `relax.where` does, the truth value."""
    zero, cast = arguments
    asks = operation == "<" and zero == Number(0) and isinstance(cast, Apply) and cast.function in TYPES
    if asks and isinstance(cast, Apply) and _is_truth(cast.arguments[0]):
        return cast.arguments[0]
    return Apply(operation, arguments)


def _is_truth(tree: Tree) -> bool:
    return isinstance(tree, Apply) and tree.function in {*COMPARISONS, *LOGICAL, "not"}
