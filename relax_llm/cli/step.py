"""`relax-llm step`: launch a model kernel by kernel, on a full screen or by commands from standard input."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from relax_llm.cli import answers, options as o, screen
from relax_llm.cli.models import check_threads, named_or_default, open_artifact, start_runner
from relax_llm.errors import InputError

DEFAULT_PROMPT = "My favorite music is"
ASKS = "(step) "


def step(
    model_name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for --model.", show_default=False)
    ] = None,
    model: o.Model = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="The text to continue.")
    ] = DEFAULT_PROMPT,
    ids: Annotated[bool, typer.Option("--ids", help="The prompt is token ids, such as '1, 2, 3'.")] = False,
    commands: Annotated[
        bool,
        typer.Option("--commands", help="Take commands line by line, also on a terminal. `help` lists them."),
    ] = False,
    weights: o.Weights = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    threads: o.Threads = None,
    debug: o.Debug = False,
) -> None:
    """Launch a model kernel by kernel: look at tensors, break, skip, replace, time.

    On a terminal it fills the screen; ? lists its keys.

    Elsewhere, and with --commands, the lines of standard input are commands; `help` lists them.
    """
    if model_name is not None and model is not None:
        raise InputError(f"The model is named twice, as {model_name} and with --model; name it once.")
    if not prompt:
        raise InputError("The prompt is empty; give some text.")
    check_threads(threads)
    given = answers.parse_ids(prompt) if ids else prompt
    model = named_or_default(model_name or model)
    artifact = open_artifact(
        model, weights=weights, architecture=architecture, kernels=kernels, target=target
    )
    if artifact.tokenizer is None and not ids:
        raise InputError(f"{model} has no tokenizer; give the prompt as token ids with --ids.")

    from relax_llm.debugger.lines import follow
    from relax_llm.debugger.session import Session
    from relax_llm.runtime.prompting import prompt_ids

    runner = start_runner(artifact, threads)
    session = Session(runner, prompt_ids(runner, given))
    if not commands and _is_terminal():
        from relax_llm.debugger.screen import show

        show(session, Path(model).name)
        return
    person = sys.stdin is not None and sys.stdin.isatty()
    refused = follow(session, _typed() if person else _read(), _answer, screen.error, interruptible=person)
    if refused and not person:
        raise InputError(f"{refused} of the commands {'was' if refused == 1 else 'were'} refused.")


def _is_terminal() -> bool:
    """Whether there is a screen to fill and a keyboard."""
    return (
        sys.stdin is not None
        and sys.stdin.isatty()
        and sys.stdout.isatty()
        and os.environ.get("TERM", "") not in ("", "dumb")
    )


def _answer(text: str) -> None:
    screen.write(f"{text}\n")


def _typed() -> Iterator[str]:
    """Commands as a person types them; Enter alone repeats the last one."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` editing and history
    last, interrupted = "", False
    while True:
        try:
            line = input(ASKS).strip() or last
        except EOFError:
            screen.write("\n")
            return
        except KeyboardInterrupt:
            screen.write("\n")
            if interrupted:
                return
            interrupted = True
            screen.hint("Ctrl-C once more leaves, and so does `quit`.")
            continue
        except UnicodeDecodeError:
            screen.error("That is not UTF-8 text.")
            continue
        last, interrupted = line, False
        yield line


def _read() -> Iterator[str]:
    """The lines of standard input as they come, each shown before its answer.

    Raises:
        InputError: One is not UTF-8.
    """
    for number, line in enumerate([] if sys.stdin is None else sys.stdin.buffer, 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise InputError(f"Line {number} of standard input is not UTF-8 text.") from None
        if text:
            screen.write(f"> {text}\n")
        yield text
