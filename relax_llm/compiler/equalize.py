"""Channels of like size for matrices that are stored in few bits, and the same model.

A group of 32 weights shares a scale, and where products are sums of integers so does a group of 32 activations: the
largest of them decides how finely all are told apart. But some channels are many times as large as their neighbours.
Their activations can be divided by a number that their weights are multiplied with, where whatever writes these
activations does the division: the weight of a norm, or the rows of another matrix::

    x = rms_norm(h, w)                          x = rms_norm(h, w / s)
    q = x @ wq.T                         ->     q = x @ (wq * s).T
    k = x @ wk.T                                k = x @ (wk * s).T

    x = silu(gate) * (h @ up.T)                 x = silu(gate) * (h @ (up / s[:, None]).T)
    y = x @ down.T                       ->     y = x @ (down * s).T

So the model computes what it did, but for roundings in the last bit of float32. How large a channel is says a prompt
of random tokens, evaluated before anything is compiled.

Sources: Nagel et al. 2019 (cross-layer equalization); Xiao et al. 2022 (SmoothQuant); Lin et al. 2023 (AWQ).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
from tvm import IRModule, relax

from relax_llm.checkpoint import Tensor
from relax_llm.compiler.bindings import Edit, Line, is_op, transposed
from relax_llm.compiler.evaluate import UnknownOperatorError, evaluate
from relax_llm.compiler.export import CACHES
from relax_llm.compiler.storage import Storage
from relax_llm.progress import Progress

Array = npt.NDArray[Any]
Read = Callable[[str], Array]

FUNCTION = "hidden"
"""The function that is evaluated. What it returns, hidden states, is nobody's to change."""

_TOKENS = 256
_COMMON = 10
"""Tokens that are about as common as the most common one."""

_SHARE = 0.45
"""How much of what a channel is larger than others goes to its weights, as a power: nearly half, where activations and
weights both lose little. `python -m benchmarks.quality` finds no better one for 8 and 4 bits."""

_LARGEST = 8
"""The largest exponent of a factor: 256."""

_NORMS = {"relax.nn.rms_norm": 1, "relax.nn.layer_norm": 2}
"""How many weights of one element for each channel an operator has, behind its input."""


@dataclass(frozen=True)
class Part:
    """A parameter, and the axis along which its channels lie."""

    name: str
    axis: int


@dataclass(frozen=True)
class Channels:
    """Activations that matrices read, and nothing else does.

    Attributes:
        value: The variable that holds them, channels last.
        writers: Parameters by which all that is written there can be divided.
        readers: The matrices that are multiplied with them.
    """

    value: relax.Var
    writers: tuple[Part, ...]
    readers: tuple[Part, ...]


@dataclass(frozen=True)
class Equalized:
    """What became of a model's tensors.

    Attributes:
        tensors: For every parameter, as before or scaled.
        factors: By the name of each matrix that reads smaller channels: f32 [K]. Its column k is factors[k] times what
            the checkpoint has.
        notes: What was left undone, and why.
    """

    tensors: Mapping[str, Tensor]
    factors: Mapping[str, Array] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def equalize(
    mod: IRModule,
    tensors: Mapping[str, Tensor],
    storage: Storage,
    context_length: int,
    read: Read,
    progress: Progress,
) -> Equalized:
    """Scale channels whose weights are to be stored in groups.

    Blocks that a file has already stay as they are.

    Args:
        mod: What `export` traced.
        tensors: By parameter.
        storage: Says how each matrix is to be stored.
        context_length: The most tokens that the model takes.
        read: Reads a parameter in float32.
        progress: Where to report to.
    """
    edit = Edit(mod)
    line = next(line for line in edit.lines if line.name == FUNCTION)
    found = [channels for channels in find(line) if _worthwhile(channels, tensors, storage)]
    if not found:
        return Equalized(tensors)
    wanted = {channels.value for channels in found}
    sizes: dict[relax.Var, Array] = {}

    def watch(var: relax.Var, value: Array) -> None:
        if var in wanted:
            sizes[var] = np.sqrt(np.square(value, dtype=np.float64).mean(axis=tuple(range(value.ndim - 1))))
            advance(1)

    token_ids = prompt(storage.vocab_size, min(_TOKENS, context_length))
    with progress.task("Measuring channels", len(found)) as advance:
        try:
            evaluate(line, edit.problems(), token_ids, int(line.attrs[CACHES]), read, watch)
        except UnknownOperatorError as error:
            return Equalized(
                tensors, notes=(f"Channels are not equalized: there is no definition of {error} in NumPy.",)
            )
    factors: dict[str, Array] = {}
    scaled = dict(tensors)
    for channels in found:
        own = factors_for(sizes[channels.value])
        for part in channels.readers:
            scaled[part.name] = _scaled(scaled[part.name], part.axis, own)
            factors[part.name] = own
        for part in channels.writers:
            scaled[part.name] = _scaled(scaled[part.name], part.axis, 1 / own)
    return Equalized(scaled, factors)


def prompt(vocab_size: int, length: int) -> Array:
    """Random tokens, int32 [1, length], common ones as often as in a language (Zipf's law): vocabularies begin so."""
    often = 1 / (np.arange(vocab_size) + _COMMON)
    drawn = np.random.default_rng(0).choice(vocab_size, (1, length), p=often / often.sum())
    return drawn.astype(np.int32)


def factors_for(sizes: Array) -> Array:
    """The factors for channels of some root mean squares: f32 [K], 1 as their geometric mean.

    Channels of no size, or of none that is known, have the factor 1.
    """
    known = np.isfinite(sizes) & (sizes > 0)
    exponents = np.zeros(len(sizes))
    if known.any():
        exponents[known] = _SHARE * np.log2(sizes[known])
        exponents[known] -= exponents[known].mean()
    factors: Array = np.exp2(exponents.clip(-_LARGEST, _LARGEST)).astype(np.float32)
    return factors


def find(line: Line) -> list[Channels]:
    """All activations of a function that are written by what can be scaled, and read by matrices alone."""
    return [
        Channels(var, writers, readers)
        for var, expr in line
        if (readers := _readers(line, var)) and (writers := _writers(line, expr))
    ]


def _readers(line: Line, var: relax.Var) -> tuple[Part, ...]:
    """The matrices that are all that uses a variable."""
    found = []
    for user in line.users(var):
        product = None if user is None else line.get(user)
        matrix = _matrix(line, product) if is_op(product, "relax.matmul") else None
        if matrix is None or product is None or not product.args[0].same_as(var):
            return ()
        found.append(matrix)
    return tuple(found)


def _writers(line: Line, expr: relax.Expr) -> tuple[Part, ...]:
    """The parameters by which what an expression gives can be divided; none where there are none."""
    for name, count in _NORMS.items():
        if is_op(expr, name):
            vectors = expr.args[1 : 1 + count]
            return tuple(Part(v.name, 0) for v in vectors) if all(_alone(line, v) for v in vectors) else ()
    if is_op(expr, "relax.multiply"):
        return next((found for arg in expr.args if (found := _rows(line, arg))), ())
    return _rows(line, expr.args[0]) if is_op(expr, "relax.nn.relu") else ()


def _rows(line: Line, var: relax.Expr) -> tuple[Part, ...]:
    """The rows of a matrix whose product a variable is, with the bias, where nothing else uses it."""
    expr = line.get(var)
    if expr is None or len(line.users(var)) != 1:
        return ()
    if is_op(expr, "relax.add"):
        product, bias = expr.args
        below = _rows(line, product)
        return (*below, Part(bias.name, 0)) if below and _alone(line, bias) else ()
    matrix = _matrix(line, expr) if is_op(expr, "relax.matmul") else None
    return () if matrix is None else (Part(matrix.name, 1 - matrix.axis),)


def _matrix(line: Line, product: relax.Call) -> Part | None:
    """The parameter that a product multiplies with, and the axis that is summed over."""
    weight = product.args[1]
    turned = transposed(line.get(weight))
    if turned is not None and len(line.users(weight)) == 1 and _alone(line, turned):
        return Part(turned.name, 1)
    return Part(weight.name, 0) if _alone(line, weight) and len(weight.ty.shape) == 2 else None


def _alone(line: Line, expr: relax.Expr) -> TypeGuard[relax.Var]:
    """Whether an expression is a parameter that is used in one place."""
    return any(param.same_as(expr) for param in line.params) and len(line.users(expr)) == 1


def _worthwhile(channels: Channels, tensors: Mapping[str, Tensor], storage: Storage) -> bool:
    """Whether one of the matrices is to be stored in groups, and none is in the file as it is to be stored."""
    matrices = [part for part in (*channels.readers, *channels.writers) if len(tensors[part.name].shape) == 2]
    return any(storage.in_groups(part.name) for part in channels.readers) and not any(
        storage.is_carried(part.name) for part in matrices
    )


def _scaled(tensor: Tensor, axis: int, factors: Array) -> Tensor:
    """The tensor with channels multiplied by factors."""
    shape = [-1 if at == axis else 1 for at in range(len(tensor.shape))]

    def read() -> Array:
        return tensor.read().astype(np.float32) * factors.reshape(shape)

    return tensor.holding(read)
