"""Typed access to GGUF metadata: a value of the wrong type is refused by its key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Metadata"]

LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Metadata:
    """The metadata of a file; keys that begin with a dot are the architecture's own (`.block_count`)."""

    path: Path
    values: Mapping[str, Any]
    architecture: str

    def key(self, key: str) -> str:
        """The full key."""
        return self.architecture + key if key.startswith(".") else key

    def has(self, key: str) -> bool:
        """Whether the file has this key."""
        return self.key(key) in self.values

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer, or an equal one for each layer; without a default it is required."""
        value = self._get(key, default)
        if isinstance(value, list) and value:
            if any(element != value[0] for element in value):
                raise self.refuse(key, "differs between layers, which this architecture does not support")
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
            raise self.refuse(key, f"is {_show(value)}, where an integer from 1 to {LARGEST} is expected")
        return value

    def token_id(self, key: str) -> int | None:
        """A token id, or None."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**32 - 1:
            raise self.refuse(key, f"is {_show(value)}, where a token id is expected")
        return None if value == 2**32 - 1 else value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number; without a default it is required."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.refuse(key, f"is {_show(value)}, where a number is expected")
        if positive and value <= 0:
            raise self.refuse(key, f"is {_show(value)}, where a positive number is expected")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """A string; without a default it is required."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, f"is {_show(value)}, where a string is expected")
        return value

    def refuse(self, key: str, what: str) -> CheckpointError:
        """An error about a key."""
        return CheckpointError(f"{self.path}: the metadata key {self.key(key)!r} {what}.")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(self.key(key), default)
        if value is None:
            raise self.refuse(key, "is missing, and the model cannot be described without it")
        return value


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
