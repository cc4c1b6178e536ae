"""The most that a machine can do, to compare launches with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from relax_llm.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What all threads of a runner can do together.

    Attributes:
        flops: f32 operations in a second; a multiply-add counts as two.
        bytes: Bytes read from memory in a second.
        bf16: Operations in a second of the instructions for products of bf16; 0 where there are none.
        int8: Of those for products of bytes, likewise.
        loop: Seconds that a loop over all threads takes beside what there is to do in it, which says how far apart
            their cores are; 0 where that is not known.
    """

    flops: float
    bytes: float
    bf16: float = 0.0
    int8: float = 0.0
    loop: float = 0.0

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Limits":
        """The limits whose fields were written; others in the mapping do not matter. Older ones have no `loop`.

        Raises:
            KeyError, TypeError, ValueError: A field is missing, or no number.
        """
        known = {"loop": 0.0, **data}
        return Limits(*(float(known[field.name]) for field in fields(Limits)))

    def rate(self, products: str) -> float:
        """Operations in a second for products of "f32", "bf16" or "int8"; f32 does what has no instruction."""
        return {"bf16": self.bf16, "int8": self.int8}.get(products, 0.0) or self.flops

    def seconds(self, flops: float, moved: float, products: str = "f32") -> float:
        """The least time for some arithmetic and some bytes: both go on at once."""
        return max(flops / self.rate(products), moved / self.bytes)

    @staticmethod
    def middle(found: Sequence["Limits"]) -> "Limits":
        """The median of each."""
        return Limits(*(median(getattr(one, field.name) for one in found) for field in fields(Limits)))

    def __str__(self) -> str:
        more = "".join(
            f", {rate / 1e9:.0f} in {name}"
            for name, rate in (("bf16", self.bf16), ("int8", self.int8))
            if rate
        )
        loop = f", a loop over all threads in {self.loop * 1e6:.2f} us" if self.loop else ""
        return f"{self.flops / 1e9:.0f} GFLOP/s{more}, {self.bytes / 1e9:.1f} GB/s{loop}"


def parse(text: str) -> Limits:
    """The limits in a text such as "230,32": GFLOP/s and GB/s, and where there are, GFLOP/s in bf16 and int8.

    Raises:
        InputError: It is something else.
    """
    try:
        found = [float(word) * 1e9 for word in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in (2, 4) or not all(0 < one < float("inf") for one in found):
        raise InputError(
            f"Limits are GFLOP/s and GB/s, such as 230,32, not {text!r}; GFLOP/s in bf16 and in int8 may follow."
        )
    return Limits(*found)
