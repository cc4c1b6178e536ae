"""`relax-llm trace`: run a prompt and say where the time went, launch by launch."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relax_llm.cli import options as o, prompts, screen, tables
from relax_llm.cli.models import check_threads, named_or_default, open_artifact, start_runner
from relax_llm.errors import InputError
from relax_llm.progress import Bars
from relax_llm.runtime.room import require_room
from relax_llm.tracing.beside import pairs, table as beside_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relax_llm.runtime.runner import Runner
    from relax_llm.tracing.beside import Pair
    from relax_llm.tracing.limits import Limits
    from relax_llm.tracing.trace import Trace

_OUTPUT, _RUN = "Output", "Run"


def trace(
    model: o.Subject = None,
    prompt: prompts.Prompt = prompts.DEFAULT,
    ids: prompts.Ids = False,
    decodes: prompts.Decodes = 16,
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
    beside: o.Beside = None,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", help="How often, with --beside.", rich_help_panel=_RUN)
    ] = 7,
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
    """Run a prompt and the tokens that follow it, and show where the time went: by operator, kernel and site.

    With --beside, models take turns, and what is shown is where one takes less time than the other: medians of the
    rounds, and how many times as fast the other one is within a round.
    """
    check_threads(threads)
    if decodes < 0:
        raise InputError(f"--decodes is {decodes}; it must be 0 or above.")
    if beside and (output is not None or cold):
        raise InputError("--beside takes turns; --output and --cold are of a single run.")
    if rounds < 1:
        raise InputError(f"--rounds is {rounds}; it must be 1 or above.")
    if output is not None and not output.parent.is_dir():
        raise InputError(f"{output} cannot be written: there is no directory {output.parent}.")
    given = o.limits_given(limits)
    named = named_or_default(model)
    artifact = open_artifact(
        named, weights=weights, kv_cache=kv_cache, architecture=architecture, kernels=kernels, target=target
    )
    token_ids = prompts.token_ids(named, artifact, prompt, ids=ids)
    runner = start_runner(artifact, threads)
    if beside:
        runners = [runner, *(start_runner(open_artifact(name), threads) for name in beside)]
        names, traces = [named, *beside], _in_turns(runners, token_ids, decodes, rounds, given)
        found = [pairs(traces[0], those, every_site=sites) for those in traces[1:]]
        if json:
            screen.json_document(_beside_data(names, token_ids, found))
        else:
            _show_beside(names, found)
        return
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


def _in_turns(
    runners: "Sequence[Runner]",
    token_ids: "list[int]",
    decodes: int,
    rounds: int,
    limits: "Limits | None",
) -> "list[list[Trace]]":
    """The same by several models, each in turn, in another order each round; a round before the first warms up.

    Returns:
        Of each model a trace for each round.

    Raises:
        ContextLengthError: They do not fit.
    """
    from relax_llm.runtime.speed import turns

    for runner in runners:
        require_room(runner, len(token_ids), decodes)
    limits = limits or runners[0].limits()
    found: list[list[Trace]] = [[] for _ in runners]
    with Bars().task("Tracing", (rounds + 1) * len(runners)) as advance:
        for number in range(rounds + 1):
            for who in turns(len(runners), number):
                with runners[who].tracing(limits) as traced:
                    prompts.run(runners[who], token_ids, decodes)
                found[who] += [traced] if number else []
                advance(1)
    return found


def _show_beside(names: list[str], found: "Sequence[Sequence[Pair]]") -> None:
    for name, several in zip(names[1:], found, strict=True):
        screen.write(
            f"{names[0]}, then {name}, and how many times as fast that is, the median of the rounds\n"
        )
        tables.show(beside_table(several))


def _beside_data(
    names: list[str], token_ids: "list[int]", found: "Sequence[Sequence[Pair]]"
) -> dict[str, Any]:
    return {
        "model": names[0],
        "prompt": token_ids,
        "beside": [
            {"model": name, "pairs": [asdict(pair) | {"times": pair.times} for pair in several]}
            for name, several in zip(names[1:], found, strict=True)
        ],
    }


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
