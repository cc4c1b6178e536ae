"""When an answer ends: the tokens and the strings that stop it."""

from __future__ import annotations

import numbers
import operator
from typing import TYPE_CHECKING, Any

from relax_llm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class StopStrings:
    """Finds stop strings in text that arrives in pieces, and holds back what may be the start of one.

    What is emitted does not depend on how the text is cut into pieces. The text ends before the stop string
    that is complete first; where two are complete with the same character, before the longer one. Every stop
    string is followed by a Knuth-Morris-Pratt automaton, so the work grows with the text alone, whatever the
    strings are.

    Args:
        stops: The stop strings; none of them may be empty.

    Raises:
        InputError: A stop string is empty or not a string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise InputError(
                    f"The stop strings contain {stop!r}; each must be a string that is not empty."
                )
        self._stops = tuple(dict.fromkeys(stops))
        self._borders = tuple(_borders(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)  # of each, how many characters the text so far ends with
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take in more text and return what is certain to be outside any stop string.

        Once `found` names the stop string that ended the text, nothing more is returned.
        """
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        for position in range(len(self._held) - len(text), len(self._held)):
            complete = self._advance(self._held[position])
            if complete is not None:
                self.found = complete
                kept = self._held[: position + 1 - len(complete)]
                self._held = ""
                return kept
        certain = len(self._held) - max(self._matched)
        emitted, self._held = self._held[:certain], self._held[certain:]
        return emitted

    def flush(self) -> str:
        """Return what was held back: no more text comes, so it was not the start of a stop string."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        """Move every automaton by one character; return the longest stop string that is now complete."""
        complete: str | None = None
        for index, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop) and (complete is None or len(stop) > len(complete)):
                complete = stop
            self._matched[index] = matched
        return complete


def _borders(stop: str) -> list[int]:
    """For every prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for position in range(1, len(stop)):
        while length and stop[position] != stop[length]:
            length = borders[length - 1]
        if stop[position] == stop[length]:
            length += 1
        borders[position] = length
    return borders


def stop_strings(asked: str | Iterable[str] | None, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop strings the caller asked for, or else those of the checkpoint's generation config.

    Args:
        asked: One string, several, none of them (empty), or None for the config's `stop_strings`.
        config: The fields of `generation_config.json`; may be empty.

    Raises:
        InputError: What was asked for is not a string or several.
    """
    chosen = config.get("stop_strings") if asked is None else asked
    if chosen is None:
        return ()
    if isinstance(chosen, str):
        return (chosen,)
    try:
        return tuple(chosen)
    except TypeError:
        raise InputError(f"stop is {chosen!r}; it must be a string or a list of strings.") from None


def end_tokens(
    asked: int | Iterable[int] | None,
    config: Mapping[str, Any],
    tokenizer_ends: Iterable[int],
    vocab_size: int,
) -> frozenset[int]:
    """The tokens that end an answer: the caller's, or else those of the checkpoint.

    Args:
        asked: One token id, several, none of them (empty: only length and stop strings end the answer), or
            None for the config's `eos_token_id`, one or several, and where it has none the tokenizer's.
        config: The fields of `generation_config.json`; may be empty.
        tokenizer_ends: What the tokenizer knows to end an answer.
        vocab_size: Number of logits. An id of the config outside it is left out, as it can never be chosen.

    Raises:
        InputError: An id is not a whole number, or the caller's is outside the vocabulary.
    """
    if asked is not None:
        ids = _ids(asked, "stop_tokens")
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InputError(
                    f"stop_tokens contains {token_id}; token ids go from 0 to {vocab_size - 1} here."
                )
        return frozenset(ids)
    configured = config.get("eos_token_id")
    ids = _ids(
        tokenizer_ends if configured is None else configured,
        "In the checkpoint's generation config, eos_token_id",
    )
    return frozenset(token_id for token_id in ids if 0 <= token_id < vocab_size)


def _ids(value: Any, name: str) -> list[int]:
    try:
        values = [value] if isinstance(value, numbers.Integral) else list(value)
        if any(isinstance(token_id, bool) for token_id in values):
            raise TypeError
        return [operator.index(token_id) for token_id in values]
    except TypeError:
        raise InputError(f"{name} is {value!r}; it must be a token id or a list of token ids.") from None
