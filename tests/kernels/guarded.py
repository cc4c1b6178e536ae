"""Memory with a guard on either side, which shows writes out of bounds and poisons reads out of bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relax_llm.artifact.memory import ALIGNMENT, aligned, dtype_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Array = npt.NDArray[Any]

GUARD = 8192
"""Bytes on either side: more than the largest tile of any kernel, so that a misplaced tile lands in it."""

SENTINEL = np.uint32(0x7FC0BEEF)
"""A NaN for whoever reads it as float32, and an index out of every range for whoever reads it as int32."""


class Guarded:
    """An array in the middle of a buffer of sentinels.

    Attributes:
        array: The memory itself, aligned to `ALIGNMENT` bytes.
    """

    def __init__(self, shape: Sequence[int], dtype: str, values: Array | None = None) -> None:
        """Place an array; without values it is full of sentinels, too."""
        nbytes = int(np.prod(shape)) * dtype_of(dtype).itemsize
        self._end = GUARD + nbytes
        total = self._end + -nbytes % 4 + GUARD
        self._buffer = aligned((total,), "uint8")
        assert GUARD % ALIGNMENT == 0
        self._fill(self._buffer[:GUARD])
        self._buffer[GUARD : self._end] = np.resize(_PATTERN, nbytes)
        self._fill(self._buffer[self._end :])
        self.array: Array = self._buffer[GUARD : self._end].view(dtype_of(dtype)).reshape(shape)
        if values is not None:
            self.array[...] = values
        self._before = self.array.tobytes()

    def assert_guards_intact(self, what: str) -> None:
        """Fail if a byte outside the array was written."""
        for name, part in (("before", self._buffer[:GUARD]), ("after", self._buffer[self._end :])):
            changed = np.flatnonzero(part != np.resize(_PATTERN, part.size))
            where = changed - GUARD if name == "before" else changed
            assert changed.size == 0, f"{what}: wrote {changed.size} bytes {name} it, from byte {where[0]} on"

    def assert_unchanged(self, what: str) -> None:
        """Fail if a byte of the array was written."""
        assert self.array.tobytes() == self._before, f"{what} was changed"

    @staticmethod
    def _fill(part: Array) -> None:
        part[...] = np.resize(_PATTERN, part.size)


_PATTERN = np.frombuffer(SENTINEL.tobytes(), np.uint8)


@dataclass(frozen=True)
class Out:
    """A tensor that a kernel writes in full."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class InOut:
    """A tensor that a kernel updates in place."""

    values: Array
