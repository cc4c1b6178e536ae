"""`relax-llm record`: run a prompt, and keep chosen launches in a file."""

from pathlib import Path
from typing import Annotated

import typer

from relax_llm.cli import options as o, prompts, screen
from relax_llm.cli.models import check_threads, named_or_default, open_artifact, start_runner
from relax_llm.errors import InputError

_CHOICE, _OUTPUT, _RUN = "Launches", "Output", "Run"

Site = Annotated[
    str,
    typer.Option("--site", metavar="PATTERN", help="Sites, as in 'layers.3.*'.", rich_help_panel=_CHOICE),
]
Operator = Annotated[
    str, typer.Option("--operator", metavar="PATTERN", help="Operators.", rich_help_panel=_CHOICE)
]


def record(
    model: o.Subject = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to.", rich_help_panel=_OUTPUT)
    ] = Path("launches.rec"),
    site: Site = "*",
    kernel: Annotated[
        str, typer.Option("--kernel", metavar="PATTERN", help="Kernels.", rich_help_panel=_CHOICE)
    ] = "*",
    operator: Operator = "*",
    values: Annotated[
        bool,
        typer.Option(
            "--values",
            help="Put the weights into the file; otherwise it names those of the artifact.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    limit: Annotated[
        int, typer.Option("--limit", metavar="MB", help="The largest file.", rich_help_panel=_OUTPUT)
    ] = 1024,
    prompt: prompts.Prompt = prompts.DEFAULT,
    ids: prompts.Ids = False,
    decodes: prompts.Decodes = 1,
    weights: o.Weights = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    threads: o.Threads = None,
    debug: o.Debug = False,
) -> None:
    """Run a prompt, and write chosen launches with all that went in and came out to a file, for `relax-llm replay`."""
    check_threads(threads)
    if decodes < 0:
        raise InputError(f"--decodes is {decodes}; it must be 0 or above.")
    if limit < 1:
        raise InputError(f"--limit is {limit}; it must be 1 or above.")
    named = named_or_default(model)
    artifact = open_artifact(
        named, weights=weights, architecture=architecture, kernels=kernels, target=target
    )
    tokens = prompts.token_ids(named, artifact, prompt, ids=ids)
    runner = start_runner(artifact, threads)
    with runner.recording(
        output,
        site=site,
        kernel=kernel,
        operator=operator,
        weights="values" if values else "reference",
        limit=limit * 2**20,
    ) as recording:
        prompts.run(runner, tokens, decodes)
    screen.write(f"{recording}\n")
    screen.hint(f"relax-llm replay {output} --time")
