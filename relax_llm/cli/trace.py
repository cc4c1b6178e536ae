"""`relax-llm trace`: run a prompt and say where the time went, launch by launch."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relax_llm.cli import options as o, prompts, screen, tables
from relax_llm.cli.models import check_threads, named_or_default, open_artifact, start_runner
from relax_llm.errors import InputError
from relax_llm.runtime.room import require_room

if TYPE_CHECKING:
    from relax_llm.runtime.runner import Runner
    from relax_llm.tracing.limits import Limits
    from relax_llm.tracing.trace import Trace

_OUTPUT, _RUN = "Output", "Run"


def trace(
    model: o.Subject = None,
    prompt: prompts.Prompt = prompts.DEFAULT,
    ids: prompts.Ids = False,
    decodes: Annotated[
        int,
        typer.Option(
            "--decodes", "-n", metavar="N", help="Tokens to decode behind the prompt.", rich_help_panel=_RUN
        ),
    ] = 16,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold", help="Trace the first run of the process, not the second.", rich_help_panel=_RUN
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write every launch, as JSON for ui.perfetto.dev or chrome://tracing.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    sites: Annotated[
        bool, typer.Option("--sites", help="Tell the layers apart.", rich_help_panel=_OUTPUT)
    ] = False,
    limits: o.Limits = None,
    weights: o.Weights = None,
    kv_cache: o.KVCache = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Run a prompt and the tokens that follow it, and show where the time went: by operator, kernel and site."""
    check_threads(threads)
    if decodes < 0:
        raise InputError(f"--decodes is {decodes}; it must be 0 or above.")
    if output is not None and not output.parent.is_dir():
        raise InputError(f"{output} cannot be written: there is no directory {output.parent}.")
    given = o.limits_given(limits)
    named = named_or_default(model)
    artifact = open_artifact(
        named, weights=weights, kv_cache=kv_cache, architecture=architecture, kernels=kernels, target=target
    )
    token_ids = prompts.token_ids(named, artifact, prompt, ids=ids)
    runner = start_runner(artifact, threads)
    traced = _run(runner, token_ids, decodes, cold=cold, limits=given, anew=limits == o.ANEW)
    if output is not None:
        traced.save(output)
    if json:
        screen.json_document(_data(named, token_ids, traced))
    else:
        _show(traced, sites=sites)
    if output is not None:
        screen.hint(f"{len(traced.launches)} launches in {output}; open it at https://ui.perfetto.dev")


def _run(
    runner: "Runner",
    token_ids: "list[int]",
    decodes: int,
    *,
    cold: bool,
    limits: "Limits | None",
    anew: bool,
) -> "Trace":
    """A prefill and some decodes of the likeliest tokens, traced.

    Raises:
        ContextLengthError: They do not fit.
    """
    require_room(runner, len(token_ids), decodes)
    if not cold:  # whoever runs first maps the weights into memory
        prompts.run(runner, token_ids, min(1, decodes))
    if anew:
        runner.limits(anew=True)
    with runner.tracing(limits) as traced:
        prompts.run(runner, token_ids, decodes)
    return traced


def _show(traced: "Trace", *, sites: bool) -> None:
    from rich.text import Text

    from relax_llm.tracing.summary import headline, tables as summary

    screen.console(sys.stdout).print(Text(headline(traced)))
    for table in summary(traced, every_site=sites):
        screen.write("\n")
        tables.show(table)
    if any(total.limit > 1.1 for total in traced.by("kernel")):
        screen.note(
            "More than 100% of the limit: the data came from a cache, or the machine was busy when its limits were "
            "measured; --limits anew measures again."
        )


def _data(model: str, token_ids: "list[int]", traced: "Trace") -> dict[str, Any]:
    """Totals for JSON; single launches are in the file that --output writes."""
    return {
        "model": model,
        "prompt": token_ids,
        "limits": vars(traced.limits),
        "calls": [
            {
                "function": call.function,
                "sizes": dict(call.sizes),
                "start": call.start,
                "seconds": call.duration,
                "outside_kernels": call.outside,
                "launches": len(call.launches),
            }
            for call in traced.calls
        ],
        "seconds": traced.duration,
        "outside_kernels": traced.outside,
        "between_calls": traced.between,
        "by_operator": [asdict(total) for total in traced.by("operator")],
        "by_kernel": [asdict(total) for total in traced.by("kernel")],
        "by_site": [asdict(total) for total in traced.by("site")],
    }
