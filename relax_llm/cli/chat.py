"""`relax-llm chat`: a conversation."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from relax_llm.cli import answers, options as o, screen
from relax_llm.cli.models import check_threads, named_or_default, open_artifact, start_runner
from relax_llm.errors import InputError, RelaxLLMError

if TYPE_CHECKING:
    from relax_llm.runtime.runner import Runner

PROMPT = ">>> "


def chat(
    model_name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for --model.", show_default=False)
    ] = None,
    model: o.Model = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="What the model is told first.")
    ] = None,
    weights: o.Weights = None,
    kv_cache: o.KVCache = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    threads: o.Threads = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    presence_penalty: o.PresencePenalty = None,
    frequency_penalty: o.FrequencyPenalty = None,
    logit_bias: o.LogitBias = None,
    seed: o.Seed = None,
    max_new_tokens: o.MaxNewTokens = None,
    stop: o.Stop = None,
    stop_token: o.StopToken = None,
    prompt_lookup: o.PromptLookup = None,
    prompt_lookup_ngram: o.PromptLookupNgram = None,
    timings: Annotated[
        bool, typer.Option("--timings", help="Print what each answer cost.", rich_help_panel="Output")
    ] = False,
    debug: o.Debug = False,
) -> None:
    """Talk to a model that has a chat template.

    Ctrl-C stops an answer; Ctrl-D, or Ctrl-C once more, leaves. Where standard input is not a terminal, each of its
    lines is a turn.
    """
    if model_name is not None and model is not None:
        raise InputError(f"The model is named twice, as {model_name} and with --model; name it once.")
    check_threads(threads)
    options = o.generation_options(
        max_new_tokens=max_new_tokens,
        stop=stop,
        stop_token=stop_token,
        logit_bias=logit_bias,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        prompt_lookup=prompt_lookup,
        prompt_lookup_ngram=prompt_lookup_ngram,
    )
    model = named_or_default(model_name or model)
    artifact = open_artifact(
        model, weights=weights, kv_cache=kv_cache, architecture=architecture, kernels=kernels, target=target
    )
    conversation = Conversation(start_runner(artifact, threads), system, options, timings=timings)
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        screen.hint(
            f"{Path(model).name}, {conversation.context_length} tokens of context. /help lists commands."
        )
        _talk(conversation)
    else:
        for line in _lines():
            if not conversation.take(line):
                return


class Conversation:
    """A chat, and the commands that act on it."""

    def __init__(
        self, runner: "Runner", system: str | None, options: dict[str, Any], *, timings: bool
    ) -> None:
        """Begin one.

        Raises:
            InputError: The model has no tokenizer or no chat template.
        """
        self.context_length = runner.context_length
        self._runner = runner
        self._options = options
        self._timings = timings
        self._begin(system)

    def _begin(self, system: str | None) -> None:
        from relax_llm.runtime.chat import Chat

        self._system = system
        self._chat: Chat = Chat(self._runner, system=system, overflow="drop_oldest")

    def take(self, line: str) -> bool:
        """Carry out a command or answer a turn.

        Returns:
            Whether the conversation goes on.

        Raises:
            RelaxLLMError: The turn cannot be answered, or there is no such command.
            KeyboardInterrupt: The answer was stopped; what was said stays in the conversation.
        """
        if line.startswith("/"):
            return self._command(line)
        if line.strip():
            self._answer(line)
        return True

    def _answer(self, text: str) -> None:
        progress = answers.PromptProgress()
        dropped = self._chat.dropped
        pieces = self._chat.send(text, progress=progress, **self._options)
        try:
            received = answers.show(pieces)
        finally:
            pieces.close()
            progress.close()
        if self._chat.dropped > dropped:
            screen.note("The context is full; the oldest messages of the conversation were forgotten.")
        timings, reason = received[-1].timings, received[-1].finish_reason
        if self._timings and timings is not None and reason is not None:
            answers.show_timings(timings, reason)

    def _command(self, line: str) -> bool:
        name, _, argument = line.strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._set_system,
            "/save": self._save,
        }
        if name == "/exit":
            return False
        if name not in commands:
            raise InputError(
                f"There is no command {name}; /help lists them. To say this, begin with a space."
            )
        commands[name](argument.strip())
        return True

    def _help(self, _: str) -> None:
        screen.hint(
            "/reset         begin a new conversation\n"
            "/system TEXT   tell the model something first, and begin anew\n"
            "/save FILE     write the conversation as JSON\n"
            "/exit          leave; so does Ctrl-D\n"
            "Ctrl-C stops an answer; what was said of it stays in the conversation."
        )

    def _reset(self, _: str) -> None:
        self._chat.reset()
        screen.hint("A new conversation begins.")

    def _set_system(self, text: str) -> None:
        if text:
            self._begin(text)
            screen.hint("A new conversation begins with this system prompt.")
        else:
            screen.hint(
                f"The system prompt is: {self._system}" if self._system else "There is no system prompt."
            )

    def _save(self, name: str) -> None:
        if not name:
            raise InputError("Name the file: /save FILE.")
        path = Path(name).expanduser()
        text = json.dumps({"messages": self._chat.messages}, indent=2, ensure_ascii=False)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{text}\n")
        except FileExistsError:
            raise InputError(f"{path} exists; choose another name.") from None
        except (OSError, ValueError) as failure:
            raise InputError(
                f"{path} cannot be written: {getattr(failure, 'strerror', None) or failure}."
            ) from None
        screen.hint(f"{len(self._chat.messages)} messages are in {path}.")


def _talk(conversation: Conversation) -> None:
    """Read turns from a terminal until the user leaves.

    Raises:
        KeyboardInterrupt: Ctrl-C came twice in a row.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` editing and history
    interrupted = False
    while (outcome := _exchange(conversation)) != "leave":
        if outcome == "interrupted":
            if interrupted:
                raise KeyboardInterrupt
            screen.hint("Ctrl-C once more leaves, and so does Ctrl-D.")
        interrupted = outcome == "interrupted"


def _exchange(conversation: Conversation) -> Literal["go on", "leave", "interrupted"]:
    """Read a turn and answer it; mistakes are told and the conversation goes on."""
    try:
        return "go on" if conversation.take(_read()) else "leave"
    except EOFError:
        return "leave"
    except KeyboardInterrupt:
        return "interrupted"
    except UnicodeDecodeError:
        screen.error("That is not UTF-8 text.")
    except (RelaxLLMError, MemoryError) as failure:
        screen.error(screen.sentence_of(failure) or "")
    return "go on"


def _read() -> str:
    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        screen.write("\n")
        raise


def _lines() -> Iterator[str]:
    """The lines of standard input as they come.

    Raises:
        InputError: One is not UTF-8.
    """
    if sys.stdin is None:
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield _text(line, number).rstrip("\r\n")


def _text(line: bytes, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise InputError(f"Line {number} of standard input is not UTF-8 text.") from None
