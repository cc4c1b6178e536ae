"""Token ids to text as they come: whole characters only, in total exactly what decoding all at once gives.

A tokenizer's decoder is a chain of steps over the list of all tokens. Here each step is a small machine that
takes one piece at a time and gives what can no longer change, so a push costs what its own token costs.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import Regex, decoders

from relax_llm.errors import TokenizerError
from relax_llm.text.bytelevel import byte_alphabet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from relax_llm.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns a stream of token ids into a stream of text.

    The pieces of text joined, with what `flush` gives, are ``tokenizer.decode`` of all ids. Bytes of a
    character that is not complete are held back; bytes that can never become one come out as U+FFFD at once.
    With a SentencePiece vocabulary a run of byte tokens is one unit, as in decoding (a run that is not valid
    UTF-8 as a whole becomes U+FFFD, all of it), so it comes out when the run ends.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Starts an empty stream.

        Args:
            tokenizer: Whose ids will be pushed.
            skip_special_tokens: Leave special tokens out of the text.

        Raises:
            TokenizerError: The tokenizer decodes in a way that cannot be done piece by piece.
        """
        self._id_to_token = tokenizer.id_to_token
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._description = tokenizer.decoding_steps
        self._steps = _build(self._description)

    def push(self, token_id: int) -> str:
        """Takes the next token.

        Args:
            token_id: An id; one that the vocabulary does not use gives no text, as in decoding.

        Returns:
            The text that is now certain, often empty.
        """
        return self.read((token_id,))

    def read(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens at once; gives what `push` would give for one after the other."""
        found = (self._id_to_token(token_id) for token_id in token_ids if token_id not in self._skipped)
        return "".join(_run(self._steps, [token for token in found if token is not None]))

    def flush(self) -> str:
        """Ends the stream.

        Returns:
            The text that was held back, unfinished characters as U+FFFD. The next push begins a new stream.
        """
        text = ""
        for i, step in enumerate(self._steps):
            text += "".join(_run(self._steps[i + 1 :], step.flush()))
        self._steps = _build(self._description)
        return text


class _Step(Protocol):
    def push(self, piece: str) -> list[str]: ...

    def flush(self) -> list[str]: ...


def _run(steps: list[_Step], pieces: list[str]) -> list[str]:
    for step in steps:
        pieces = [out for piece in pieces for out in step.push(piece)]
    return pieces


class _Map:
    """A step that looks at one piece alone."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function

    def push(self, piece: str) -> list[str]:
        return [self._function(piece)]

    def flush(self) -> list[str]:
        return []


class _ByteLevel:
    """Letters of the byte alphabet to bytes to text; a token with any other character stands for itself."""

    def __init__(self) -> None:
        self._bytes = byte_alphabet()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: str) -> list[str]:
        try:
            data = bytes([self._bytes[letter] for letter in piece])
        except KeyError:
            data = piece.encode("utf-8")
        return [self._utf8.decode(data)]

    def flush(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    """A run of tokens ``<0xXX>`` to the text of those bytes, or to as many U+FFFD if they are not UTF-8."""

    _BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, piece: str) -> list[str]:
        byte = self._BYTE.fullmatch(piece)
        if byte:
            self._run.append(int(byte[1], 16))
            return []
        return [*self.flush(), piece]

    def flush(self) -> list[str]:
        run, self._run = self._run, bytearray()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _StripStart:
    """Takes up to ``count`` of one character off the start of the whole text."""

    def __init__(self, character: str, count: int) -> None:
        self._character, self._left = character, count

    def push(self, piece: str) -> list[str]:
        at = 0
        while self._left and at < len(piece):
            if piece[at] == self._character:
                self._left -= 1
                at += 1
            else:
                self._left = 0
        return [piece[at:]]

    def flush(self) -> list[str]:
        return []


class _Metaspace:
    """The replacement character back to a space, and to nothing in the first token, where it is a prefix."""

    def __init__(self, replacement: str, prefix: bool) -> None:
        self._replacement, self._prefix = replacement, prefix

    def push(self, piece: str) -> list[str]:
        space, self._prefix = "" if self._prefix else " ", False
        return [piece.replace(self._replacement, space)]

    def flush(self) -> list[str]:
        return []


class _Join:
    """No decoder at all: tokens with a space between."""

    def __init__(self) -> None:
        self._between = ""

    def push(self, piece: str) -> list[str]:
        between, self._between = self._between, " "
        return [between + piece]

    def flush(self) -> list[str]:
        return []


def _build(description: Sequence[Mapping[str, Any]]) -> list[_Step]:
    if not description:
        return [_Join()]
    steps: list[_Step] = []
    whole = False  # the pieces are now parts of one text, no longer tokens
    for step in description:
        made = _whole_text_step(step) if whole else _token_step(step)
        if made is None:
            raise TokenizerError(
                f"The tokenizer's decoder step {dict(step)} cannot be applied piece by piece. Decode the "
                "whole list of ids with Tokenizer.decode instead."
            )
        steps.append(made)
        whole = whole or step["type"] in ("ByteLevel", "Fuse")
    return steps


def _token_step(step: Mapping[str, Any]) -> _Step | None:
    kind = step["type"]
    if kind == "ByteLevel":
        return _ByteLevel()
    if kind == "ByteFallback":
        return _ByteFallback()
    if kind == "Fuse":
        return _Map(lambda piece: piece)
    if kind == "Metaspace":
        return _Metaspace(step["replacement"], step.get("prepend_scheme", "always") != "never")
    if kind == "Strip":
        strip = decoders.Strip(step["content"], step["start"], step["stop"])
        return _Map(lambda piece: str(strip.decode([piece])))
    if kind == "Replace":
        pattern = step["pattern"]
        replace = decoders.Replace(pattern.get("String") or Regex(pattern["Regex"]), step["content"])
        return _Map(lambda piece: str(replace.decode([piece])))
    return None


def _whole_text_step(step: Mapping[str, Any]) -> _Step | None:
    kind = step["type"]
    if kind == "Fuse":
        return _Map(lambda piece: piece)
    if kind == "Strip" and step["stop"] == 0:
        return _StripStart(step["content"], step["start"])
    if kind == "Replace" and len(step["pattern"].get("String", "")) == 1:
        return _Map(lambda piece: piece.replace(step["pattern"]["String"], step["content"]))
    return None
