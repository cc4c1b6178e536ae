"""How an artifact's weights are made from a checkpoint's tensors: small expressions, as data."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from relax_llm.errors import CompileError
from relax_llm.formats import FORMATS, Blocks, Format
from relax_llm.kernels.layout import Layout, parse

Array = npt.NDArray[Any]
Layouts = Callable[[str], Layout]

ESTIMATE = "estimate"
"""The end of the site of an estimate: `lm_head.estimate`."""

_ROWS = 4096
"""Of a matrix, at a time."""

_UNIT = 2.0**-24
_ROUNDED = math.sqrt(32) / (2 * 127 * 256)
"""How far activations in two bytes are from what they were, at most, in lengths of x."""


class Read(Protocol):
    """What recipes read parameters with."""

    def __call__(self, name: str) -> Array:
        """A parameter in float32."""
        ...

    def blocks(self, name: str, format: Blocks, *, transposed: bool) -> Array | None:
        """A matrix, or its transpose, as the checkpoint has it encoded; None where that is not in this format.

        Formats that hold the same numbers exactly count as one.
        """
        ...


@dataclass(frozen=True)
class Source:
    """A parameter of the architecture."""

    name: str

    def __str__(self) -> str:
        return self.name

    def make(self, read: Read, layouts: Layouts = parse) -> Array:
        """The tensor as the checkpoint has it."""
        return read(self.name)

    def sources(self) -> list[str]:
        """The parameters this is made from."""
        return [self.name]


@dataclass(frozen=True)
class _Made:
    """What is made from one other."""

    of: "Recipe"

    def sources(self) -> list[str]:
        """The parameters this is made from."""
        return self.of.sources()


@dataclass(frozen=True)
class Transpose(_Made):
    """A matrix with its axes exchanged."""

    def __str__(self) -> str:
        return f"transpose({self.of})"

    def make(self, read: Read, layouts: Layouts = parse) -> Array:
        """A view."""
        matrix = self.of.make(read, layouts)
        return np.transpose(matrix)


@dataclass(frozen=True)
class Concat:
    """Tensors joined along their first axis."""

    parts: "tuple[Recipe, ...]"

    def __str__(self) -> str:
        return f"concat({', '.join(map(str, self.parts))})"

    def make(self, read: Read, layouts: Layouts = parse) -> Array:
        """A new array."""
        return np.concatenate([part.make(read, layouts) for part in self.parts])

    def sources(self) -> list[str]:
        """The parameters this is made from."""
        return [name for part in self.parts for name in part.sources()]


@dataclass(frozen=True)
class Encode(_Made):
    """A matrix in a weight format. Each part of a joined one is encoded alone, for some may be encoded already."""

    format: str

    def __str__(self) -> str:
        return f"{self.format}({self.of})"

    def make(self, read: Read, layouts: Layouts = parse) -> Array:
        """A new array.

        Raises:
            CompileError: The format cannot hold the numbers.
        """
        try:
            return _encoded(self.of, FORMATS[self.format], read, layouts)
        except OverflowError as error:
            raise CompileError(
                f"{joined_name(self.sources())} cannot be stored as {self.format}: {error}"
            ) from error


def _encoded(recipe: "Recipe", format: Format, read: Read, layouts: Layouts) -> Array:
    if isinstance(recipe, Concat):
        return np.concatenate([_encoded(part, format, read, layouts) for part in recipe.parts])
    transposed = isinstance(recipe, Transpose)
    source = recipe.of if isinstance(recipe, Transpose) else recipe
    if isinstance(source, Source) and isinstance(format, Blocks):
        blocks = read.blocks(source.name, format, transposed=transposed)
        if blocks is not None:
            return blocks
    return format.encode(recipe.make(read, layouts))


@dataclass(frozen=True)
class Pack(_Made):
    """A matrix in the layout of the kernels that read it."""

    layout: str

    def __str__(self) -> str:
        return f"{self.layout}({self.of})"

    def make(self, read: Read, layouts: Layouts = parse) -> Array:
        """A new array."""
        return layouts(self.layout).pack(self.of.make(read, layouts))


@dataclass(frozen=True)
class Decode(_Made):
    """The floats that an encoded matrix stands for."""

    format: str
    k: int

    def __str__(self) -> str:
        return f"float({self.of})"

    def make(self, read: Read, layouts: Layouts = parse) -> Array:
        """A new array [N, K]."""
        return FORMATS[self.format].decode(self.of.make(read, layouts), self.k)


@dataclass(frozen=True)
class Estimate(_Made):
    """A matrix in fewer bits than it is stored in, beside it."""

    format: str

    def __str__(self) -> str:
        return f"estimate_{self.format}({self.of})"

    def make(self, read: Read, layouts: Layouts = parse) -> Array:
        """A new array, encoded."""
        return FORMATS[self.format].encode(self.of.make(read, layouts))


@dataclass(frozen=True)
class Margins(_Made):
    """How far a product with the estimate of a matrix may be from that with the matrix, times the length of x, by row.

    The difference of a row w and its estimate c takes the largest part. The rest is rounding: of sums in
    float32, which stay within n u of the sum of magnitudes (Higham 2002, section 3.1), and of activations to a 256th
    of a 127th of the largest of their group.
    """

    format: str

    def __str__(self) -> str:
        return f"margins_{self.format}({self.of})"

    def make(self, read: Read, layouts: Layouts = parse) -> Array:
        """float32 [N]; infinite where a weight is not finite."""
        matrix, format = self.of.make(read, layouts), FORMATS[self.format]
        n, k = matrix.shape
        margins = np.empty(n, np.float32)
        for start in range(0, n, _ROWS):
            rows = matrix[start : start + _ROWS].astype(np.float32, copy=False)
            with np.errstate(all="ignore"):
                rough = format.decode(format.encode(rows), k)
                length, rough_length = (
                    np.linalg.norm(part.astype(np.float64), axis=1) for part in (rows, rough)
                )
                apart = np.linalg.norm(rows.astype(np.float64) - rough, axis=1)
                apart += (k + 8) * _UNIT * (length + rough_length) + _ROUNDED * rough_length
            margins[start : start + _ROWS] = np.where(np.isfinite(apart), apart * (1 + 8 * _UNIT), np.inf)
        return margins


Recipe = Source | Transpose | Concat | Encode | Pack | Decode | Estimate | Margins


def to_json(recipe: Recipe) -> str:
    """A recipe as JSON: ["pack", "tiled32", ["concat", [["source", "a.weight"], ...]]]."""
    return json.dumps(_data(recipe))


def from_json(text: str) -> Recipe:
    """The recipe that `to_json` wrote."""
    return _recipe(json.loads(text))


def _data(recipe: Recipe) -> list[Any]:
    if isinstance(recipe, Source):
        return ["source", recipe.name]
    if isinstance(recipe, Transpose):
        return ["transpose", _data(recipe.of)]
    if isinstance(recipe, Concat):
        return ["concat", [_data(part) for part in recipe.parts]]
    if isinstance(recipe, Encode):
        return ["encode", recipe.format, _data(recipe.of)]
    if isinstance(recipe, Decode):
        return ["decode", recipe.format, recipe.k, _data(recipe.of)]
    if isinstance(recipe, Estimate | Margins):
        return [type(recipe).__name__.lower(), recipe.format, _data(recipe.of)]
    return ["pack", recipe.layout, _data(recipe.of)]


def _recipe(data: list[Any]) -> Recipe:
    kind, *rest = data
    if kind == "source":
        return Source(rest[0])
    if kind == "transpose":
        return Transpose(_recipe(rest[0]))
    if kind == "concat":
        return Concat(tuple(_recipe(part) for part in rest[0]))
    if kind == "encode":
        return Encode(_recipe(rest[1]), rest[0])
    if kind == "decode":
        return Decode(_recipe(rest[2]), rest[0], rest[1])
    if kind in ("estimate", "margins"):
        return (Estimate if kind == "estimate" else Margins)(_recipe(rest[1]), rest[0])
    return Pack(_recipe(rest[1]), rest[0])


def weight_name(recipe: Recipe) -> str:
    """What a weight is called: as the parameters that it is made from; an estimate of these has a name of its own."""
    name = joined_name(recipe.sources())
    made = recipe.of if isinstance(recipe, Pack) else recipe
    if not isinstance(made, Estimate):
        return name
    site, _, kind = name.rpartition(".")
    return f"{site}.{ESTIMATE}.{kind}"


def joined_name(names: list[str]) -> str:
    """One name for what several parameters were joined into: `layers.3.mlp.gate_proj+up_proj.weight`."""
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    head = 0
    while all(len(parts) > head + 1 and parts[head] == split[0][head] for parts in split):
        head += 1
    tail = 0
    while all(len(parts) - tail > head + 1 and parts[-1 - tail] == split[0][-1 - tail] for parts in split):
        tail += 1
    middle = "+".join(".".join(parts[head : len(parts) - tail]) for parts in split)
    return ".".join([*split[0][:head], middle, *(split[0][len(split[0]) - tail :])])
