"""The most that a machine can do, to compare launches with."""

from dataclasses import dataclass

from relax_llm.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What all threads of a runner can do together.

    Attributes:
        flops: f32 operations in a second; a multiply-add counts as two.
        bytes: Bytes read from memory in a second.
    """

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for some arithmetic and some bytes: both go on at once."""
        return max(flops / self.flops, moved / self.bytes)

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.0f} GFLOP/s, {self.bytes / 1e9:.1f} GB/s"


def parse(text: str) -> Limits:
    """The limits in a text such as "230,32": GFLOP/s and GB/s.

    Raises:
        InputError: It is something else.
    """
    try:
        flops, moved = (float(word) for word in text.split(","))
    except ValueError:
        flops = moved = 0.0
    if not (0 < flops < float("inf") and 0 < moved < float("inf")):
        raise InputError(f"Limits are GFLOP/s and GB/s, such as 230,32, not {text!r}.")
    return Limits(flops * 1e9, moved * 1e9)
