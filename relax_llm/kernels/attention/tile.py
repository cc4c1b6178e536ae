"""A tile of rows: the forms in which queries, keys and values are multiplied, and how a partial is laid out.

A *partial* is what a softmax over some positions leaves of each row: the largest score, the sum of the weights
relative to it, and the sum of the values by these weights.
"""

from dataclasses import dataclass

from relax_llm.artifact.kv_cache import TILE
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.intrinsics import BF16
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.matmul.shape import tile_for

BLOCK = 128
"""Positions in a block: so many that merging is no work, so few that the keys and values stay in a core's caches."""

FAR = 1 << 20
"""How much lies at an address, for a function that does not know it."""


@dataclass(frozen=True)
class Tile:
    """A tile of rows, which are queries of heads that share a key head.

    A cache in bf16 is read as words of two: two channels of a key, two positions of a value. Where the processor
    multiplies pairs of bf16, queries and weights are rounded to such words, too; else words are widened.

    Codes of q8 are unpacked to words first, once for all tiles of a task: to pairs of bf16, which hold them exactly,
    or to f32. Their scales are left to the scores, and to the weights.

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
        """Whether the caches are unpacked before they are multiplied, and have scales."""
        return self.cache == "q8"

    @property
    def halves(self) -> bool:
        """Whether what is multiplied are words of two."""
        return self.cache == "bf16" or (self.codes and self.machine.features >= BF16)

    @property
    def pairs(self) -> bool:
        """Whether pairs are multiplied as they are."""
        return self.halves and self.machine.features >= BF16

    @property
    def words(self) -> str:
        """Type of what is multiplied with queries and weights."""
        return "int32" if self.halves else "float32"

    @property
    def key_words(self) -> int:
        """Words of a tile of keys."""
        return TILE * (-(-self.dim // 2) if self.halves else self.dim)

    @property
    def value_words(self) -> int:
        """Words of a tile of values."""
        return TILE * self.dim // (2 if self.halves else 1)

    @property
    def stored(self) -> str:
        """Type of what the caches are read as."""
        return "int8" if self.codes else self.words

    @property
    def stored_keys(self) -> int:
        """Elements of a tile of keys in its cache."""
        return TILE * self.dim if self.codes else self.key_words

    @property
    def stored_values(self) -> int:
        """Elements of a tile of values in its cache."""
        return TILE * self.dim if self.codes else self.value_words

    @property
    def factors(self) -> str:
        """Type of queries and weights as they are multiplied."""
        return "int32" if self.pairs else "float32"

    @property
    def query_factors(self) -> int:
        """Factors of a query: as many as there are in a key, or in whole vectors of pairs."""
        if self.pairs:
            return LANES * -(-self.dim // (2 * LANES))
        return self.dim + self.dim % 2 if self.halves else self.dim

    @property
    def weight_factors(self) -> int:
        """Factors of a row's weights in a block."""
        return BLOCK // 2 if self.pairs else BLOCK

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
