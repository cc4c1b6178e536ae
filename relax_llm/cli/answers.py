"""Showing answers: text as it comes, what it cost, how likely each token was, and the whole of it as JSON."""

import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from relax_llm.cli import screen, tables
from relax_llm.errors import InputError
from relax_llm.progress import Advance, Bars

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from relax_llm.runtime.answer import Generation, Piece, Timings
    from relax_llm.text.tokenizer import Tokenizer

LONG_PROMPT = 1024
"""Tokens of a prompt from which on reading it is worth a progress bar."""

_ENDINGS = {
    "stop_token": "ended by the model",
    "stop_string": "ended by a stop text",
    "length": "ended at the limit of tokens",
    "context": "ended because the context is full",
}


class PromptProgress:
    """Shows how far a long prompt has been read: what `progress` of `stream` is called with."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._bar: AbstractContextManager[Advance] | None = None
        self._advance: Advance | None = None
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        """Note that `done` of `total` tokens have been evaluated."""
        if done == 0 and total >= LONG_PROMPT:
            self._bar = Bars().task("Reading the prompt", total)
            self._advance = self._bar.__enter__()
        if self._advance is not None:
            self._advance(done - self._done)
            self._done = done
        if done == total:
            self.close()

    def close(self) -> None:
        """Take the bar away, whether or not the prompt has been read."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = self._advance = None
        self._done = 0


def show(pieces: Iterable["Piece"], *, as_ids: bool = False) -> "list[Piece]":
    """Write an answer to standard output as it comes, with a line break at its end.

    Args:
        pieces: The answer.
        as_ids: Write token ids in place of text.

    Returns:
        The pieces.
    """
    received: list[Piece] = []
    written = ""
    try:
        for piece in pieces:
            received.append(piece)
            text = f"{piece.token_id} " if as_ids else piece.text
            if text:
                screen.write(text)
                written = text
    except BaseException:
        if received or sys.stdout.isatty():  # end the line of what was said, or of the ^C that terminals show
            screen.write("\n")
        raise
    if not written.endswith("\n"):
        screen.write("\n")
    return received


def show_timings(timings: "Timings", finish_reason: str) -> None:
    """Print what an answer cost, on standard error."""
    count = max(len(str(timings.prompt_tokens)), len(str(timings.new_tokens)))
    cached = f" ({timings.reused_tokens} in the cache)" if timings.reused_tokens else ""
    drafts = f"  {timings.accepted_tokens} of {timings.drafted_tokens} drafts kept" * bool(
        timings.drafted_tokens
    )
    screen.hint(
        f"prompt  {_tokens(timings.prompt_tokens, count)}{cached}  "
        f"{timings.prefill_tokens_per_second:.1f} tokens/s  first token after {timings.time_to_first_token:.2f} s\n"
        f"answer  {_tokens(timings.new_tokens, count)}  "
        f"{timings.decode_tokens_per_second:.1f} tokens/s  {_ENDINGS[finish_reason]}{drafts}"
    )


def show_logprobs(generation: "Generation", tokenizer: "Tokenizer | None") -> None:
    """Print a table of the tokens with their log-probabilities and the likeliest ones in their place."""
    tops = generation.top_logprobs or ((),) * len(generation.token_ids)
    rows = [
        [
            str(token_id),
            _token_text(tokenizer, token_id),
            f"{logprob:.4f}",
            "  ".join(f"{_token_text(tokenizer, other)} {likelihood:.4f}" for other, likelihood in top),
        ]
        for token_id, logprob, top in zip(generation.token_ids, generation.logprobs, tops, strict=True)
    ]
    header = ["id", "token", "logprob", "likeliest"]
    columns = len(header) if generation.top_logprobs else len(header) - 1
    tables.table(header[:columns], [row[:columns] for row in rows], numbers=(0, 2))


def as_data(generation: "Generation", tokenizer: "Tokenizer | None") -> dict[str, Any]:
    """A generation for JSON, in the names of the Python interface, with the text of each token added."""
    return {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "tokens": [_decoded(tokenizer, token_id) for token_id in generation.token_ids],
        "logprobs": list(generation.logprobs) or None,
        "top_logprobs": [
            [
                {"token_id": token_id, "token": _decoded(tokenizer, token_id), "logprob": logprob}
                for token_id, logprob in top
            ]
            for top in generation.top_logprobs
        ]
        or None,
        "finish_reason": generation.finish_reason,
        "timings": generation.timings.as_dict(),
    }


def parse_ids(text: str) -> list[int]:
    """The token ids in a text such as "1, 2 3".

    Raises:
        InputError: It has something else, or nothing.
    """
    words = [word for word in re.split(r"[\s,]+", text) if word]
    if not words or not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        raise InputError(f"With --ids the prompt must be token ids, such as '1, 2, 3', not {text[:40]!r}.")
    return [int(word) for word in words]


def timings_wanted(said: bool | None) -> bool:
    """Whether to print timings: as said, or else where a person is looking."""
    return sys.stderr.isatty() if said is None else said


def _tokens(count: int, width: int) -> str:
    return f"{count:>{width}} token{'s' if count != 1 else ' '}"


def _token_text(tokenizer: "Tokenizer | None", token_id: int) -> str:
    decoded = _decoded(tokenizer, token_id)
    return "" if decoded is None else repr(decoded)


def _decoded(tokenizer: "Tokenizer | None", token_id: int) -> str | None:
    return None if tokenizer is None else tokenizer.decode([token_id], skip_special_tokens=False)
