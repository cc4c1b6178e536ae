"""Formats that keep a few bits for each weight, and a scale for every group of 32 along the reduction.

An encoded matrix is a row of blocks for each row, byte for byte those of a GGUF file: Q8_0, Q4_1 and Q4_0 are the
formats `q8`, `q4` and `q4s`. So a file's own blocks are an encoded matrix already, and nothing is lost on the way.
`q6` is between them, and no type of a file.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from relax_llm.formats.fit import fit
from relax_llm.formats.floats import refuse_larger

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Parts:
    """What blocks are made of. A weight is scale * (code - zero), plus the minimum where there is one.

    Attributes:
        codes: uint8 [..., groups, 32].
        scales: float16 [..., groups].
        minimums: float16 [..., groups], or None.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    minimums: npt.NDArray[np.float16] | None = None


@dataclass(frozen=True)
class Blocks:
    """Codes of some bits in groups that share a scale, and perhaps a minimum, each f16.

    A block has the scale, the minimum if there is one, and the codes. Codes of 8 bits are signed bytes; codes of 4 bits
    lie in 16 bytes, the first half of the group in the low nibbles and the second in the high ones. Of codes of 6 bits
    the low four lie so, and behind them 8 bytes have the other two: of a byte's four pairs, from the low end, each has
    those of a quarter of the group.

    Attributes:
        name: "q8", "q6", "q4" or "q4s".
        code_bits: Bits of a code: 8, 6 or 4.
        minimum: Whether a group has a minimum, to which codes add; else they count from the middle of their range.
    """

    name: str
    code_bits: int
    minimum: bool = False
    group: ClassVar[int] = 32
    dtype: ClassVar[str] = "uint8"

    @property
    def zero(self) -> int:
        """The unsigned code that stands for 0, or for the minimum."""
        return 0 if self.minimum else 1 << (self.code_bits - 1)

    @property
    def code_bytes(self) -> int:
        """Bytes of a group's codes."""
        return self.group * self.code_bits // 8

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return 2 * (1 + self.minimum) + self.code_bytes

    @property
    def bits(self) -> float:
        """Bits of a weight, its share of the scale and the minimum included."""
        return 8 * self.block_bytes / self.group

    @property
    def stored_as(self) -> str:
        """The type of GGUF whose blocks these are; empty where there is none."""
        return "" if self.code_bits == 6 else f"q{self.code_bits}_{int(self.minimum)}"

    def groups(self, k: int) -> int:
        """Groups in a row; the last may be a part of one, filled up with weights of zero."""
        return -(-k // self.group)

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of an encoded matrix, uint8."""
        return n, self.groups(k) * self.block_bytes

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of an encoded matrix."""
        return n * self.groups(k) * self.block_bytes

    def encode(self, matrix: npt.NDArray[np.float32]) -> Array:
        """Fit codes, scales and minimums to a matrix [N, K], by least squares: `relax_llm.formats.fit`.

        Returns:
            uint8 [N, bytes of a row].

        Raises:
            OverflowError: A number is too large for scales in f16.
        """
        refuse_larger(matrix, "scales and minimums")
        codes, scales, minimums = fit(matrix, self.code_bits, minimum=self.minimum, group=self.group)
        return self.join(Parts(codes, scales, minimums))

    def decode(self, stored: Array, k: int) -> npt.NDArray[np.float32]:
        """The float32 matrix [N, K] that an encoded one stands for.

        Products of a code and a scale are exact in float32, and a minimum is added with one rounding.
        """
        parts = self.split(stored)
        values = parts.codes.astype(np.float32)
        values -= np.float32(self.zero)
        with np.errstate(all="ignore"):  # blocks of a file may hold any bits
            values *= parts.scales[..., None].astype(np.float32)
            if parts.minimums is not None:
                values += parts.minimums[..., None].astype(np.float32)
        flat = values.reshape(len(stored), -1)
        return flat if flat.shape[1] == k else np.ascontiguousarray(flat[:, :k])

    def split(self, stored: Array) -> Parts:
        """The parts of an encoded matrix: codes [N, groups, 32], scales and minimums [N, groups]."""
        blocks = np.ascontiguousarray(stored).reshape(len(stored), -1, self.block_bytes)
        head = self.block_bytes - self.code_bytes
        halves = np.ascontiguousarray(blocks[..., :head]).view(np.float16)
        codes = blocks[..., head:]
        if self.code_bits == 8:
            codes = codes ^ np.uint8(self.zero)
        else:
            nibbles = codes[..., : self.group // 2]
            low = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=-1)
            pairs = codes[..., self.group // 2 :]  # none, of 4 bits
            high = [(pairs >> np.uint8(shift) & np.uint8(3)) << np.uint8(4) for shift in range(0, 8, 2)]
            codes = low | np.concatenate(high, axis=-1) if self.code_bits == 6 else low
        return Parts(codes, halves[..., 0], halves[..., 1] if self.minimum else None)

    def join(self, parts: Parts) -> Array:
        """The encoded matrix of these parts: what `split` undoes."""
        n = len(parts.codes)
        codes = parts.codes
        if self.code_bits == 8:
            codes = codes ^ np.uint8(self.zero)
        else:
            low, high = codes & np.uint8(15), codes >> np.uint8(4)
            half, quarter = self.group // 2, self.group // 4
            codes = low[..., :half] | low[..., half:] << np.uint8(4)
            if self.code_bits == 6:
                parts_of_four = (
                    high[..., at * quarter : (at + 1) * quarter] << np.uint8(2 * at) for at in range(4)
                )
                codes = np.concatenate([codes, reduce(np.bitwise_or, parts_of_four)], axis=-1)
        halves = [parts.scales] if parts.minimums is None else [parts.scales, parts.minimums]
        head = np.stack(halves, axis=-1).astype(np.float16, copy=False).view(np.uint8)
        return np.concatenate([head, codes], axis=-1).reshape(n, -1)

    def fits(self, to: "Blocks") -> bool:
        """Whether another format holds the same weights, if no minimum is too large for it."""
        return to == self or not (self.minimum or to.code_bits < self.code_bits)

    def converted(self, stored: Array, to: "Blocks") -> Array | None:
        """The same weights in another format, exactly; None where it cannot hold them so.

        A symmetric format's weights fit into one with a minimum, and into one of more bits.
        """
        if to == self:
            return stored
        if not self.fits(to):
            return None
        parts = self.split(stored)
        if to.minimum:
            with np.errstate(over="ignore"):
                minimums = parts.scales * np.float16(to.zero - self.zero)
            exact = np.isfinite(minimums).all()
            return to.join(Parts(parts.codes, parts.scales, minimums)) if exact else None
        return to.join(Parts(parts.codes + np.uint8(to.zero - self.zero), parts.scales))
