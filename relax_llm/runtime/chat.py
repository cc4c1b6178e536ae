"""A conversation: turns in, answers out, with what the cache already holds evaluated once."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from relax_llm.errors import ContextLengthError, InputError
from relax_llm.runtime.answer import Generation, Piece
from relax_llm.runtime.generation import stream
from relax_llm.text.chat import render_chat

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    from typing_extensions import Unpack

    from relax_llm.runtime.generation import GenerationOptions
    from relax_llm.runtime.interface import CacheState, LanguageModel

Overflow = Literal["error", "drop_oldest"]

Message = dict[str, str]


@dataclass(frozen=True)
class _Turn:
    """What one call of `send` will say to the model."""

    earlier: list[Message]
    said: Message
    ids: list[int]


class Chat:
    """A conversation with a model through its chat template.

    The cache lives as long as the conversation: a turn evaluates only the tokens that are new. An answer that
    is interrupted (Ctrl-C, `close`, an exception) stays in the history as far as it was said; where nothing
    was said yet, the question leaves the history too, so that it can be asked again.

    `dropped` is the number of messages that "drop_oldest" has forgotten.

    Args:
        runner: The model; it needs a tokenizer.
        system: What the model is told before the conversation.
        messages: Earlier messages to go on from, each with "role" and "content".
        template: A chat template (Jinja) in place of the tokenizer's own.
        variables: Further variables of the template.
        overflow: What to do when the conversation no longer fits the model's context: "error" refuses the
            turn, "drop_oldest" forgets the oldest turns, never the system prompt.
        room: With "drop_oldest", how many tokens to keep free for the answer. None is a quarter of the
            context; the more there are, the more seldom turns are dropped and the rest evaluated again.

    Raises:
        InputError: There is no tokenizer or no chat template, or an option is not usable.
    """

    def __init__(
        self,
        runner: LanguageModel,
        *,
        system: str | None = None,
        messages: Iterable[Mapping[str, str]] = (),
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        overflow: Overflow = "error",
        room: int | None = None,
    ) -> None:
        tokenizer = runner.tokenizer
        if tokenizer is None:
            raise InputError("This artifact has no tokenizer, so there is no text to chat in.")
        template = template or tokenizer.chat_template
        if template is None:
            raise InputError(
                "This model has no chat template: it continues text and was not trained to answer turns. Use "
                "generate, or give a template."
            )
        if overflow not in ("error", "drop_oldest"):
            raise InputError(f"overflow is {overflow!r}; it must be 'error' or 'drop_oldest'.")
        if room is not None and not (isinstance(room, int) and 1 <= room < runner.context_length):
            raise InputError(
                f"room is {room!r}; it must be a number of tokens, at least 1 and below the context of "
                f"{runner.context_length}."
            )
        self._runner = runner
        self._tokenizer = tokenizer
        self._template = template
        self._variables = dict(variables or {})
        self._overflow = overflow
        self._room = room or max(1, runner.context_length // 4)
        self._messages: list[Message] = [_message(message) for message in messages]
        if system is not None:
            self._messages.insert(0, {"role": "system", "content": system})
        self._state: CacheState | None = None
        self._speaking: Generator[Piece, None, None] | None = None
        self.dropped = 0

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, as copies, with the system prompt first where there is one."""
        return tuple(dict(message) for message in self._messages)

    @property
    def state(self) -> CacheState | None:
        """The state whose cache holds the conversation; None before the first turn."""
        return self._state

    def reset(self) -> None:
        """Forget the conversation and keep the system prompt, and the cache for what is said again."""
        self._stop_speaking()
        self._messages = self._messages[: _system_length(self._messages)]
        self.dropped = 0

    def send(self, text: str, **options: Unpack[GenerationOptions]) -> Generator[Piece, None, None]:
        """Say something and stream the answer.

        Whether the turn can be served is found out here and now; the work begins with the first piece that is
        asked for. An answer that is still being streamed from an earlier call ends here.

        Args:
            text: What the user says.
            **options: As for `stream`: max_new_tokens, temperature, top_p, seed, stop, ...

        Yields:
            One piece for each token of the answer.

        Raises:
            InputError: An option is not usable.
            ContextLengthError: The conversation does not fit the model's context.
            TokenizerError: The chat template refuses the conversation.
        """
        self._stop_speaking()
        turn = self._turn(text)
        if self._state is None:
            self._state = self._runner.start()
        pieces = stream(self._runner, turn.ids, state=self._state, **options)
        self._speaking = self._speak(turn, pieces)
        return self._speaking

    def ask(self, text: str, **options: Unpack[GenerationOptions]) -> Generation:
        """Say something and return the whole answer. Takes and refuses what `send` does."""
        return Generation.of(self.send(text, **options))

    def _speak(self, turn: _Turn, pieces: Generator[Piece, None, None]) -> Generator[Piece, None, None]:
        """Pass the pieces on, with the history up to date whenever the caller has control."""
        dropped = len(self._messages) - len(turn.earlier)
        before = self._messages
        answer: Message = {"role": "assistant", "content": ""}
        ended = False
        try:
            for piece in pieces:
                answer["content"] += piece.text
                if self._messages is before:
                    self._messages = [*turn.earlier, turn.said, answer]
                    self.dropped += dropped
                ended = piece.finish_reason is not None
                yield piece
        finally:
            pieces.close()
            if not ended and not answer["content"] and self._messages is not before:
                self._messages = turn.earlier

    def _stop_speaking(self) -> None:
        if self._speaking is not None:
            self._speaking.close()
            self._speaking = None

    def _turn(self, text: str) -> _Turn:
        """Render and encode the conversation with `text` said, without its oldest turns where need be."""
        if not isinstance(text, str):
            raise InputError(f"The turn is {text!r}; it must be text.")
        said: Message = {"role": "user", "content": text}
        context = self._runner.context_length
        earlier = self._messages
        ids = self._encode([*earlier, said])
        if self._overflow == "drop_oldest" and len(ids) + self._room > context:
            kept = _suffixes(self._messages)

            def fits(dropped: int) -> bool:
                return len(self._encode([*kept[dropped], said])) + self._room <= context

            dropped = bisect.bisect_left(range(len(kept) - 1), True, key=fits)
            earlier = kept[dropped]
            ids = self._encode([*earlier, said])
        if len(ids) >= context:
            raise ContextLengthError(
                f"The conversation has {len(ids)} tokens with this turn, and the model's context holds "
                f"{context}, the answer included. {self._advice(earlier)}"
            )
        return _Turn(earlier, said, ids)

    def _advice(self, earlier: list[Message]) -> str:
        if len(earlier) > _system_length(earlier):  # so it is not "drop_oldest", which drops them all
            return "Start a new conversation, or have the oldest turns forgotten: overflow='drop_oldest'."
        return "There are no older turns to forget: shorten the text or the system prompt."

    def _encode(self, messages: list[Message]) -> list[int]:
        special = self._tokenizer.special_tokens
        rendered = render_chat(
            self._template,
            messages,
            add_generation_prompt=True,
            bos_token=special.get("bos_token"),
            eos_token=special.get("eos_token"),
            **self._variables,
        )
        return self._tokenizer.encode(rendered, add_special_tokens=False)


def _message(message: Mapping[str, str]) -> Message:
    if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
        raise InputError(f"The message {dict(message)!r} must have a 'role' and a 'content', both text.")
    return dict(message)


def _system_length(messages: list[Message]) -> int:
    """How many messages at the start are the system prompt: 1 or 0."""
    return int(bool(messages) and messages[0]["role"] == "system")


def _suffixes(messages: list[Message]) -> list[list[Message]]:
    """The conversation without its oldest 0, 1, 2 ... turns; the last is the system prompt alone.

    A turn begins with a message of the user; what a conversation has before its first one belongs to that.
    """
    start = _system_length(messages)
    begins = [index for index in range(start, len(messages)) if messages[index]["role"] == "user"]
    return [messages, *(messages[:start] + messages[index:] for index in [*begins[1:], len(messages)])]
