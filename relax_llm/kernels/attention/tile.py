"""A tile of rows: the forms in which queries, keys and values are multiplied, and how a partial is laid out.

A *partial* is what a softmax over some positions leaves of each row: the largest score, the sum of the weights
relative to it, and the sum of the values by these weights.
"""

from dataclasses import dataclass

from relax_llm.artifact.kv_cache import MOST, TILE
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.intrinsics import BF16, INT8
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.shape import tile_for

BLOCK = 128
"""Positions in a block: so many that merging is no work, so few that the keys and values stay in a core's caches."""

FAR = 1 << 20
"""How much lies at an address, for a function that does not know it."""


def most_of(dim: int) -> int:
    """The largest whole number that the queries and weights of such heads become: sums of products have four bytes."""
    return min(2**15 - 1, (2**31 - 1) // (MOST * max(dim, BLOCK)))


@dataclass(frozen=True)
class Tile:
    """A tile of rows, which are queries of heads that share a key head.

    Caches in bf16 and q8 are read as words of two: two channels of a key, two positions of a value. Where the processor
    multiplies such pairs, queries and weights become pairs, too: of bf16, or, beside codes, of whole numbers of two
    bytes, with a scale for each row; else words are widened. Scales of codes are left to the scores, which keys' are
    multiplied into, and to the weights, which values' are.

    Attributes:
        dim: Channels of a head.
        machine: What code is generated for.
        cache: Format of the caches.
    """

    dim: int
    machine: Machine
    cache: str = "f32"

    @property
    def rows(self) -> int:
        """The most rows: as many as a tile of a matmul has, and no more than a vector has lanes."""
        return min(tile_for(self.machine).rows, LANES)

    @property
    def codes(self) -> bool:
        """Whether the caches are whole numbers, and have scales."""
        return self.cache == "q8"

    @property
    def halves(self) -> bool:
        """Whether what is multiplied are words of two."""
        return self.cache != "f32"

    @property
    def pairs(self) -> bool:
        """Whether pairs are multiplied as they are."""
        return self.halves and self.machine.features >= (INT8 if self.codes else BF16)

    @property
    def integers(self) -> bool:
        """Whether pairs are whole numbers; then sums are, and queries and weights have a scale for each row."""
        return self.pairs and self.codes

    @property
    def bf16(self) -> bool:
        """Whether pairs are bf16."""
        return self.pairs and not self.codes

    @property
    def sums(self) -> str:
        """Type of the sums of products."""
        return "int32" if self.integers else "float32"

    @property
    def stored(self) -> str:
        """Type of what the caches are read as."""
        return "int8" if self.codes else "int32" if self.halves else "float32"

    @property
    def word(self) -> int:
        """Elements of this type that a word has: what a lane multiplies at once."""
        return 2 if self.codes else 1

    @property
    def stored_keys(self) -> int:
        """Elements of a tile of keys in its cache."""
        return self.word * TILE * (-(-self.dim // 2) if self.halves else self.dim)

    @property
    def stored_values(self) -> int:
        """Elements of a tile of values in its cache."""
        return self.word * TILE * self.dim // (2 if self.halves else 1)

    @property
    def factors(self) -> str:
        """Type of queries and weights as they are multiplied."""
        return "int32" if self.pairs else "float32"

    @property
    def query_factors(self) -> int:
        """Factors of a query: as many as there are in a key, or in whole vectors of pairs, and a vector for a scale."""
        if self.pairs:
            return LANES * (-(-self.dim // (2 * LANES)) + self.integers)
        return self.dim + self.dim % 2 if self.halves else self.dim

    @property
    def weight_factors(self) -> int:
        """Factors of a row's weights in a block, and a vector for their scale."""
        return BLOCK // 2 + LANES * self.integers if self.pairs else BLOCK

    @property
    def most(self) -> int:
        """The largest whole number that a query or a weight becomes."""
        return most_of(self.dim)

    @property
    def partial(self) -> int:
        """Elements of a partial: the largest scores in a vector, a vector of weights and the values for each row."""
        return LANES * (1 + self.rows + -(-self.rows * self.dim // LANES))

    def weights_at(self, row: Expr) -> Expr:
        """Where in a partial the sums of a row's weights are, one in each lane of a vector."""
        return LANES + row * LANES

    def values_at(self, row: Expr) -> Expr:
        """Where in a partial the sum of a row's values is."""
        return LANES + self.rows * LANES + row * self.dim

    def named(self, name: str) -> str:
        """The name of a function that depends on the channels, and on the format of the caches."""
        return f"{name}_d{self.dim}" + ("" if self.cache == "f32" else f"_{self.cache}")
