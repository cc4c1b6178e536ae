"""What a kernel takes, and whether arrays are that: everything compiled code does not look at is looked at here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact import formulas
from relax_llm.artifact.kv_cache import GRANULE, TILE
from relax_llm.artifact.memory import ALIGNMENT, aligned, dtype_of
from relax_llm.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel.

    Attributes:
        name: What the kernel calls it.
        role: "activation", "weight", "cache", "size" or "output".
        shape: Numbers, and names of sizes or formulas of them; a size has none.
        dtype: NumPy's name of the element type.
        written: Whether the kernel writes it: outputs, and caches where they grow.
    """

    name: str
    role: str
    shape: tuple[str, ...]
    dtype: str
    written: bool

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}" + (f" [{', '.join(self.shape)}]" if self.role != "size" else "")

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape at some sizes."""
        return tuple(int(formulas.evaluate(size, sizes)) for size in self.shape)


def signature(parameters: Sequence[Parameter]) -> str:
    """What a kernel takes, for messages."""
    return f"({', '.join(map(str, parameters))})"


def complete(
    parameters: Sequence[Parameter], given: Mapping[str, int], valid: Sequence[str]
) -> dict[str, int]:
    """All sizes of some, the rest as small as can be.

    Args:
        parameters: What the kernel takes.
        given: Sizes by name; M stands for batch * seq.
        valid: Names that may be given.

    Raises:
        InputError: A name is not known, or a number is not possible.
    """
    names = {name for one in parameters for size in one.shape for name in formulas.names(size)}
    names |= {one.name for one in parameters if one.role == "size"}
    for name, size in given.items():
        if name not in names and name not in valid:
            known = ", ".join(dict.fromkeys([*valid, *sorted(names)]))
            raise InputError(f"There is no size {name!r} here; the sizes are {known}.")
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise InputError(f"{name} must be a positive whole number, not {size!r}.")
    sizes = {name: int(size) for name, size in given.items() if name != "M"}
    if "M" in given:
        rows = "seq" if "seq" in names else "batch"
        if "batch" in given or "seq" in given:
            raise InputError("M is batch * seq; give M, or these.")
        sizes[rows] = int(given["M"])
    sizes = {"batch": 1, "seq": 1, **sizes}
    sizes.setdefault("kv_len", sizes["seq"])
    sizes.setdefault("tiles", -(-sizes["kv_len"] // GRANULE) * GRANULE // TILE)
    sizes |= {name: 1 for name in names if name not in sizes}
    return sizes


def bind(
    parameters: Sequence[Parameter], values: Sequence[Any], what: str
) -> tuple[list[Any], dict[str, int]]:
    """Arrays and numbers as a kernel takes them, and the sizes that they have.

    Args:
        parameters: What it takes.
        values: What it is given; activations may lack the axis that separates sequences: [M, K].
        what: The kernel, for messages.

    Raises:
        InputError: There are too few or too many, or one has another type or shape, or is not possible.
    """
    if len(values) != len(parameters):
        raise InputError(
            f"The {what} takes {len(parameters)} arguments, {signature(parameters)}, not {len(values)}."
        )
    sizes: dict[str, int] = {}
    bound: list[Any] = []
    for one, value in zip(parameters, values, strict=True):
        if one.role == "size":
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise InputError(f"The {what} takes {one.name} as a positive whole number, not {value!r}.")
            bound.append(int(value))
            _meet(sizes, one.name, int(value), what)
            continue
        if not isinstance(value, np.ndarray):
            raise InputError(f"The {what} takes {one} as a NumPy array, not {type(value).__name__}.")
        array = _with_sequences(one, value)
        if array.dtype != dtype_of(one.dtype) or array.ndim != len(one.shape):
            raise InputError(f"The {what} takes {one}, not {value.dtype} of shape {value.shape}.")
        for name, size in zip(one.shape, array.shape, strict=True):
            if name.isidentifier():
                _meet(sizes, name, size, what)
        bound.append(array)
    for one, value in zip(parameters, bound, strict=True):
        if one.role != "size" and value.shape != one.at(sizes):
            raise InputError(
                f"The {what} takes {one}, not shape {value.shape}, where sizes are {_text(sizes)}."
            )
        if one.written and not value.flags.writeable:
            raise InputError(f"The {what} writes {one.name}, which is read-only.")
    return bound, sizes


def check_values(
    parameters: Sequence[Parameter],
    values: Sequence[Any],
    sizes: Mapping[str, int],
    problem: Mapping[str, Any],
    what: str,
) -> None:
    """Refuse what would lead compiled code out of its arrays.

    Raises:
        InputError: A token id is outside the table, a cache is too small, or an output is also an input.
    """
    for one, value in zip(parameters, values, strict=True):
        if one.role == "activation" and value.dtype == np.int32 and value.size:
            rows = int(problem.get("rows", 0))
            if value.min() < 0 or value.max() >= rows:
                raise InputError(
                    f"The {what} takes {one.name} from 0 to {rows - 1}, but {value.min()} to {value.max()} were given."
                )
        if one.role == "cache" and sizes.get("kv_len", 0) > sizes["tiles"] * TILE:
            raise InputError(
                f"{one.name} of the {what} has room for {sizes['tiles'] * TILE} tokens, not for {sizes['kv_len']}."
            )
    if sizes.get("kv_len", sizes.get("seq", 1)) < sizes.get("seq", 1):
        raise InputError(
            f"kv_len of the {what} counts the tokens of this call too, so it is at least seq, {sizes['seq']}."
        )
    tensors = [(one, value) for one, value in zip(parameters, values, strict=True) if one.role != "size"]
    for one, value in tensors:
        shared = [other for other, its in tensors if other is not one and np.may_share_memory(value, its)]
        if one.written and shared:
            raise InputError(
                f"{one.name} and {shared[0].name} of the {what} share memory, and {one.name} is written."
            )


def placed(one: Parameter, value: Array) -> Array:
    """An array as compiled code assumes it: itself, or a copy in aligned memory."""
    fits = value.flags.c_contiguous and value.flags.writeable and value.ctypes.data % ALIGNMENT == 0
    if fits and value.dtype.isnative:
        return value
    copy = aligned(value.shape, one.dtype)
    copy[...] = value
    return copy


def filled(
    one: Parameter, sizes: Mapping[str, int], problem: Mapping[str, Any], rng: np.random.Generator
) -> Array:
    """A new array of random values: token ids from the table, normal numbers scaled so that sums are of order 1."""
    shape = one.at(sizes)
    array = aligned(shape, one.dtype)
    if one.role == "output":
        return array
    if array.dtype.kind in "iu":
        array[...] = rng.integers(0, int(problem.get("rows", 1)), shape)
    else:
        scale = float(problem.get("k", 1)) ** -0.5 if one.role == "weight" and len(shape) > 1 else 1.0
        array[...] = rng.standard_normal(shape, np.float32) * np.float32(scale)
    return array


def _meet(sizes: dict[str, int], name: str, size: int, what: str) -> None:
    if sizes.setdefault(name, size) != size:
        raise InputError(
            f"The arguments of the {what} disagree: {name} is {sizes[name]} in one and {size} in another."
        )


def is_flat(parameters: Sequence[Parameter], values: Sequence[Any]) -> bool:
    """Whether activations came as [M, K]."""
    return any(
        one.role == "activation" and value.ndim == len(one.shape) - 1
        for one, value in zip(parameters, values, strict=False)
        if one.role != "size"
    )


def _with_sequences(one: Parameter, value: Array) -> Array:
    """[M, K] as [1, M, K], where a kernel takes [batch, seq, K]."""
    if (
        one.role not in ("activation", "output")
        or one.shape[:1] != ("batch",)
        or len(one.shape) < 2
        or value.ndim != len(one.shape) - 1
        or not value.size
    ):
        return value
    rows = value.shape[0]
    return value[:, None] if one.shape[1].isdecimal() else value.reshape(1, rows, *value.shape[1:])


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())
