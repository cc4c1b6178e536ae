"""Reading a checkpoint's config.json: every field by name and type, with sentences for what is missing."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar, overload

from relax_llm.errors import ArchitectureError

_Default = TypeVar("_Default", int, float, bool, str, None)
_MISSING: Any = object()


class Fields:
    """A view of config.json for architectures.

    A field that is null counts as absent, as in most of Hugging Face's own configs.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Wrap the parsed config."""
        self._config = config

    def get(self, name: str) -> Any:
        """The field as it is, or None."""
        return self._config.get(name)

    @overload
    def integer(self, name: str) -> int: ...
    @overload
    def integer(self, name: str, default: _Default) -> int | _Default: ...
    def integer(self, name: str, default: Any = _MISSING) -> Any:
        """A positive whole number.

        Raises:
            ArchitectureError: It is missing without a default, or something else.
        """
        value = self._value(name, default, int, "a positive whole number")
        if value is not default and value <= 0:
            raise ArchitectureError(f"config.json: field {name!r} must be positive, but is {value}.")
        return value

    def optional_integer(self, name: str, default: int) -> int | None:
        """A positive whole number; None where the field says null, and the default where it is left out."""
        return self.integer(name) if self.get(name) is not None else None if name in self._config else default

    @overload
    def number(self, name: str) -> float: ...
    @overload
    def number(self, name: str, default: _Default) -> float | _Default: ...
    def number(self, name: str, default: Any = _MISSING) -> Any:
        """A finite number."""
        value = self._value(name, default, (int, float), "a number")
        if value is default:
            return default
        if not math.isfinite(value):
            raise ArchitectureError(f"config.json: field {name!r} must be finite, but is {value}.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return bool(self._value(name, default, bool, "true or false"))

    def text(self, name: str, default: str) -> str:
        """A string."""
        return str(self._value(name, default, str, "a string"))

    def section(self, name: str) -> "Fields | None":
        """A nested object, or None where it is absent."""
        value = self._value(name, None, Mapping, "an object")
        return None if value is None else Fields(value)

    def choice(self, name: str, default: str, choices: Mapping[str, str]) -> str:
        """A string that must be one of the keys; returns what the key stands for.

        Raises:
            ArchitectureError: It is another; the known ones are listed.
        """
        value = self.text(name, default)
        if value not in choices:
            known = ", ".join(sorted(choices))
            raise ArchitectureError(
                f"config.json: field {name!r} is {value!r}, which is not supported; known: {known}."
            )
        return choices[value]

    def _value(self, name: str, default: Any, kind: Any, expected: str) -> Any:
        value = self._config.get(name)
        if value is None:
            if default is _MISSING:
                raise ArchitectureError(
                    f"config.json: field {name!r} is missing; the architecture needs {expected}."
                )
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ArchitectureError(f"config.json: field {name!r} must be {expected}, but is {value!r}.")
        return value


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Hugging Face's names of activation functions, and ours."""
