"""An answer: its pieces as they come, the whole of it, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from relax_llm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relax_llm.runtime.sampling import TokenLogprob

FinishReason = Literal["stop_token", "stop_string", "length", "context"]


@dataclass(frozen=True)
class Timings:
    """What an answer cost. Times are in seconds; what the caller does between two pieces is not in them.

    Attributes:
        prompt_tokens: Tokens of the prompt, and of these
        reused_tokens: those that were in the cache already.
        prefill_seconds: Evaluating the others.
        new_tokens: Tokens of the answer. The first comes from the prompt's logits, so one less is decoded.
        decode_seconds: Evaluating and choosing all tokens after the first.
        time_to_first_token: Encoding the prompt, evaluating it and choosing the first token.
        drafted_tokens: Tokens drafted by prompt lookup, and of these
        accepted_tokens: those that became part of the answer.
    """

    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float
    time_to_first_token: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens evaluated for the prompt (those reused are not) in a second."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first in a second; 0 where there are none."""
        return _rate(self.new_tokens - 1, self.decode_seconds)

    def as_dict(self) -> dict[str, float]:
        """All figures and both rates, for reports."""
        return asdict(self) | {
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer.

    Attributes:
        text: New text. Empty where the token completes no character, where its text may be the beginning of a
            stop string (a later piece brings it then), and always without a tokenizer.
        token_id: The token.
        logprob: Its log-probability under the model's own distribution; None unless `logprobs` asks for it.
        top: The most likely tokens in its place, as many as `logprobs` asks for.
        finish_reason: In the last piece, why there are no more: "stop_token" (this one, it has no text),
            "stop_string", "length" (as many tokens as were asked for), "context" (the cache is full).
        timings: In the last piece, what the answer cost.
    """

    text: str
    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class Generation:
    """A whole answer.

    Attributes:
        text: Its text: without the stop token and without the stop string.
        token_ids: Its tokens, with the stop token where one ended it.
        logprobs: Of each token, under the model's own distribution; empty unless `logprobs` asks for them.
        top_logprobs: For each token the most likely ones in its place; empty unless `logprobs` asks for some.
        finish_reason: Why it ended; see `Piece`.
        timings: What it cost.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...]
    finish_reason: FinishReason
    timings: Timings

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Generation:
        """Put all pieces of an answer together; the last must be there."""
        received = list(pieces)
        if not received or received[-1].finish_reason is None or received[-1].timings is None:
            raise InputError(
                "These pieces are no whole answer: the last one, with its finish_reason, is missing."
            )
        return cls(
            text="".join(piece.text for piece in received),
            token_ids=tuple(piece.token_id for piece in received),
            logprobs=tuple(piece.logprob for piece in received if piece.logprob is not None),
            top_logprobs=tuple(piece.top for piece in received if piece.top),
            finish_reason=received[-1].finish_reason,
            timings=received[-1].timings,
        )


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0
