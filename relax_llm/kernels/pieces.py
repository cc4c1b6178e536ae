"""Rows too long for one core: cut into pieces of whole blocks, the same ones whatever else a launch has."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import LANES


@dataclass(frozen=True)
class Pieces:
    """A row as pieces of nearly equal length; results that are combined piece by piece depend on the row alone.

    Attributes:
        width: Elements in a row.
        longest: The most elements of a piece.
        block: Elements that are worked on at once; the last piece has what is left over besides.
    """

    width: int
    longest: int
    block: int = LANES

    @cached_property
    def count(self) -> int:
        """How many pieces a row has."""
        return max(1, -(-self.blocks // self._each))

    @cached_property
    def blocks(self) -> int:
        """Whole blocks of a row."""
        return self.width // self.block

    @property
    def rest(self) -> int:
        """Elements behind the last whole block."""
        return self.width % self.block

    @cached_property
    def _each(self) -> int:
        """Blocks of a piece."""
        pieces = max(1, -(-self.width // self.longest))
        return max(1, -(-self.blocks // pieces))

    def first(self, piece: Expr) -> Expr:
        """The first block of a piece."""
        return piece * self._each

    def length(self, piece: Expr) -> Expr:
        """Blocks in a piece."""
        if self.count == 1:
            return T.int64(self.blocks)
        return T.min(T.int64(self._each), T.int64(self.blocks) - piece * self._each)

    def is_last(self, piece: Expr) -> Expr:
        """Whether what is left over of the row belongs to a piece."""
        return piece == self.count - 1

    def visit(self, piece: Expr, visit: Callable[[Expr, int], None]) -> None:
        """Visit every block of a piece, and what is left of the row behind the last: `visit(start, elements)`."""
        if self.blocks:
            first = b.let("first", self.first(piece))
            with T.serial(self.length(piece)) as i:
                visit(b.let("at", (first + i) * self.block), self.block)
        if self.rest and self.count == 1:
            visit(T.int64(self.blocks * self.block), self.rest)
        elif self.rest:
            with b.when(self.is_last(piece)):
                visit(T.int64(self.blocks * self.block), self.rest)

    def split(self, index: Expr) -> tuple[Expr, Expr]:
        """Row and piece of a task; the tasks of a row are neighbours."""
        if self.count == 1:
            return index, T.int64(0)
        return b.let("row", index // self.count), b.let("piece", index % self.count)
