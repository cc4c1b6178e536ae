"""JSON from people one does not know: bounded in size, depth and digits, and an object at the top."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from relax_llm.checkpoint.files import read_bytes
from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["parse_object", "read_object"]

MAX_DIGITS = 20
"""Enough for every 64-bit integer; longer ones only serve to make parsing slow."""


def read_object(path: Path, limit: int, *, unique: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.
        limit: The largest size in bytes that is read.
        unique: Refuse an object that has the same key twice, instead of taking the last.

    Raises:
        CheckpointError: Missing, too long, not JSON, or not an object.
    """
    return parse_object(read_bytes(path, limit), str(path), unique=unique)


def parse_object(data: bytes, where: str, *, unique: bool = False) -> dict[str, Any]:
    """Parse bytes as a JSON object; `where` starts every message. See `read_object`."""
    if not data.strip():
        raise CheckpointError(f"{where}: it is empty, where a JSON object is expected.")
    try:
        value = json.loads(
            data.decode("utf-8"), parse_int=_integer, object_pairs_hook=_unique if unique else None
        )
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{where}: the key {error.args[0]!r} appears twice in one object.") from None
    except RecursionError:
        raise CheckpointError(f"{where}: the JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not valid JSON: byte {error.start} is not UTF-8.") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object is expected, and this is {_kind(value)}.")
    return value


class _DuplicateKeyError(Exception):
    """Raised from inside the parser with the key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
