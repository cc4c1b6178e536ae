"""What `compare` and `bisect` share: options for what is run, and models by name."""

from typing import TYPE_CHECKING, Annotated

import typer

from relax_llm.cli import answers
from relax_llm.cli.models import check_threads, open_artifact, start_runner
from relax_llm.errors import InputError

if TYPE_CHECKING:
    from relax_llm.runtime.runner import Runner

_RUN = "Run"

Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="What to run; by default a sentence, or random tokens where there is no tokenizer.",
        rich_help_panel=_RUN,
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        "--length",
        metavar="N",
        help="N random tokens instead of a prompt: other sizes have other kernels.",
        rich_help_panel=_RUN,
    ),
]
Bound = Annotated[
    float | None,
    typer.Option(
        "--bound",
        metavar="SHARE",
        help="The largest difference that is none, as a share of the largest number beside it.",
        rich_help_panel=_RUN,
    ),
]


def prompt_of(prompt: str | None, *, ids: bool) -> "str | list[int] | None":
    """What `--prompt` and `--ids` say."""
    if not ids:
        return prompt
    if prompt is None:
        raise InputError("--ids says how to read --prompt; give token ids with --prompt '1, 2, 3'.")
    return answers.parse_ids(prompt)


def runner_named(
    model: str,
    threads: int | None = None,
    *,
    weights: str | None = None,
    architecture: str | None = None,
    kernels: list[str] | None = None,
    target: str | None = None,
) -> "Runner":
    """A runner of an artifact, or of a checkpoint, which is compiled by way of the cache."""
    check_threads(threads)
    artifact = open_artifact(
        model, weights=weights, architecture=architecture, kernels=kernels, target=target
    )
    return start_runner(artifact, threads)
