"""Formats that keep every weight as a number of its own."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_TYPES = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
}


_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Floats:
    """Floating point numbers, rounded to nearest; those of two bytes are kept as their bits, in uint16.

    Attributes:
        name: "f32", "bf16" or "f16".
    """

    name: str

    @property
    def type(self) -> np.dtype[Any]:
        """NumPy's type of the numbers."""
        kind: np.dtype[Any] = _TYPES[self.name]
        return kind

    @property
    def dtype(self) -> str:
        """Name of the element type of what is encoded."""
        return "float32" if self.name == "f32" else "uint16"

    @property
    def bits(self) -> float:
        """Bits of a weight."""
        return 8.0 * self.type.itemsize

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of an encoded matrix."""
        return n, k

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of an encoded matrix."""
        return n * k * self.type.itemsize

    def encode(self, matrix: npt.NDArray[np.float32]) -> Array:
        """Encode a matrix.

        Args:
            matrix: [N, K].

        Returns:
            float32 [N, K], or uint16 [N, K]; contiguous, the matrix itself where that is possible.

        Raises:
            OverflowError: A number is too large for f16.
        """
        if self.name == "f16":
            refuse_larger(matrix, "they")
        return np.ascontiguousarray(matrix.astype(self.type, copy=False)).view(self.dtype)

    def decode(self, stored: Array, k: int) -> npt.NDArray[np.float32]:
        """The float32 matrix [N, K] that an encoded one stands for, exactly."""
        del k  # the shape tells
        return stored.view(self.type).astype(np.float32, copy=False)


def refuse_larger(matrix: Array, what: str) -> None:
    """Refuse finite numbers that f16 cannot hold.

    Raises:
        OverflowError: There is one; `what` would have to be f16.
    """
    if matrix.min(initial=0) >= -_LARGEST and matrix.max(initial=0) <= _LARGEST:
        return
    with np.errstate(over="ignore"):
        beyond = matrix[~(np.abs(matrix) <= _LARGEST) & np.isfinite(matrix)]
    if beyond.size:
        raise OverflowError(
            f"it has numbers up to {np.abs(beyond).max():.3g}, and f16, which {what} would be, ends at "
            f"{_LARGEST:,.0f}; use bf16"
        )
