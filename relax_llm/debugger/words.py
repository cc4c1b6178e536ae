"""What follows a command, read: conditions of breakpoints, parts of tensors, numbers."""

import re
from collections.abc import Sequence
from typing import Any

from relax_llm.errors import InputError

_NAMED = ("site", "kernel", "operator", "function")
_COMPARISON = re.compile(r"[A-Za-z_]+(==|!=|<=|>=|=|<|>)\d.*")
_SHOWN = 200


def read_condition(words: Sequence[str]) -> dict[str, Any]:
    """What `Breakpoints.add` takes, from words: sites, kernel=K, operator=O, function=F, sizes, nan.

    Raises:
        InputError: A word is said twice.
    """
    said: dict[str, Any] = {}
    sizes = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in _NAMED and value:
            key = name
        elif word == "nan":
            key, value = "nan", True  # type: ignore[assignment]
        elif _COMPARISON.fullmatch(word):
            sizes.append(word.rstrip(","))
            continue
        else:
            key, value = "site", word
        if key in said:
            raise InputError(f"There are two of {key}: {said[key]} and {value}; a breakpoint has one.")
        said[key] = value
    if sizes:
        said["where"] = ", ".join(sizes)
    return said


def read_part(word: str) -> tuple[Any, ...]:
    """A part of a tensor from a word such as "0,:,3:8".

    Raises:
        InputError: It is none.
    """
    indices: list[Any] = []
    for piece in word.strip("[]").split(","):
        if piece == "...":
            indices.append(...)
            continue
        numbers = piece.split(":")
        if len(numbers) > 3 or not all(
            re.fullmatch(r"-?\d{1,18}", n) or (not n and ":" in piece) for n in numbers
        ):
            raise InputError(f"{word!r} is no part of a tensor; write indices as in 0,:,3:8 without spaces.")
        bounds = [int(number) if number else None for number in numbers]
        if len(bounds) == 3 and bounds[2] == 0:
            raise InputError(f"{word!r} has a step of 0.")
        indices.append(bounds[0] if len(bounds) == 1 else slice(*bounds))
    if indices.count(...) > 1:
        raise InputError(f"{word!r} has more than one `...`.")
    return tuple(indices)


def nothing_more(words: Sequence[str], name: str) -> None:
    """Refuse words behind a command that takes none."""
    if words:
        raise InputError(f"{name} takes nothing more, but {' '.join(words)!r} follows it.")


def one_word(words: Sequence[str], name: str, what: str) -> str:
    """The one word that follows a command."""
    if len(words) != 1:
        raise InputError(f"{name} takes {what}.")
    return words[0]


def read_number(word: str, what: str) -> int:
    """A number of 0 or above."""
    if not re.fullmatch(r"\d{1,9}", word):
        raise InputError(f"{word!r} is not {what}.")
    return int(word)


def read_count(words: Sequence[str], name: str) -> int:
    """How often to do something: the word that follows, or once."""
    if not words:
        return 1
    count = read_number(one_word(words, name, "one number"), "a number of times")
    if count < 1:
        raise InputError(f"{name} takes a number of 1 or above.")
    return count


def quoted(text: str) -> str:
    """A text, or its end where it is long, with control characters spelled out."""
    return repr(text if len(text) <= _SHOWN else "..." + text[-_SHOWN:])
