"""What activations may be rounded to beside quantized weights: groups of integers, each with a scale."""

from dataclasses import dataclass

GROUP = 32
"""Elements of a group, which lie next to each other along the reduction."""


@dataclass(frozen=True)
class Rounding:
    """What activations are rounded to.

    Attributes:
        name: As a problem says that it allows it.
        planes: Bytes of a code.
        powers: Whether scales are powers of two. A product saves a multiplication for each group and result then.
    """

    name: str
    planes: int
    powers: bool = False

    @property
    def most(self) -> int:
        """The largest code."""
        return 127 << 8 * (self.planes - 1)

    @property
    def least(self) -> float:
        """Of how many steps the largest magnitude of a group is, at least."""
        return self.most / 2 if self.powers else self.most


ROUNDINGS = {
    rounding.name: rounding
    for rounding in (Rounding("int7", 1, powers=True), Rounding("int8", 1), Rounding("int16", 2))
}
"""By what a problem allows, the coarsest first: who allows one allows those behind it, too."""
