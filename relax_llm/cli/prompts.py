"""The prompt of commands that run a model to look at it, and running it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from relax_llm.cli import answers
from relax_llm.errors import InputError
from relax_llm.runtime.room import require_room

if TYPE_CHECKING:
    from relax_llm.artifact.artifact import Artifact
    from relax_llm.runtime.runner import Runner

_RUN = "Run"

Prompt = Annotated[
    str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to run.", rich_help_panel=_RUN)
]
Ids = Annotated[
    bool, typer.Option("--ids", help="The prompt is token ids, such as '1, 2, 3'.", rich_help_panel=_RUN)
]
Decodes = Annotated[
    int,
    typer.Option(
        "--decodes", "-n", metavar="N", help="Tokens to decode behind the prompt.", rich_help_panel=_RUN
    ),
]
DEFAULT = "My favorite music is"


def token_ids(named: str, artifact: "Artifact", prompt: str, *, ids: bool) -> list[int]:
    """The tokens of a prompt.

    Raises:
        InputError: There are none, or the model has no tokenizer.
    """
    if ids:
        found = answers.parse_ids(prompt)
    elif artifact.tokenizer is None:
        raise InputError(f"{named} has no tokenizer; give token ids with --ids.")
    else:
        found = artifact.tokenizer.encode(prompt)
    if not found:
        raise InputError("The prompt is empty; give some text.")
    return found


def run(runner: "Runner", tokens: list[int], decodes: int) -> None:
    """A prefill, and decodes of the likeliest tokens.

    Raises:
        ContextLengthError: They do not fit.
    """
    require_room(runner, len(tokens), decodes)
    state: Any = runner.start()
    logits = runner.prefill(state, tokens)
    for _ in range(decodes):
        logits = runner.decode(state, int(logits.argmax()))
