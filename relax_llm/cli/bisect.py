"""`relax-llm bisect`: of two plans or two artifacts, of which one is wrong, the kernels that are to blame."""

from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Annotated

import typer

from relax_llm.cli import findings as f, options as o, prompts, screen
from relax_llm.cli.interrupts import InterruptibleBars
from relax_llm.cli.models import named_or_default
from relax_llm.errors import InputError

if TYPE_CHECKING:
    from relax_llm.finding.bisect import Bisection

_WAYS = "The two ways"


def bisect(
    model: o.Subject = None,
    other: Annotated[
        str | None,
        typer.Argument(metavar="[OTHER]", help="One that is right where MODEL is wrong.", show_default=False),
    ] = None,
    good: Annotated[
        str | None,
        typer.Option(
            "--good",
            metavar="FILE",
            help="A plan by which MODEL is right; by default its own.",
            rich_help_panel=_WAYS,
        ),
    ] = None,
    bad: Annotated[
        str | None,
        typer.Option("--bad", metavar="FILE", help="A plan by which MODEL is wrong.", rich_help_panel=_WAYS),
    ] = None,
    prompt: f.Prompt = None,
    ids: prompts.Ids = False,
    length: f.Length = None,
    decodes: prompts.Decodes = 3,
    bound: f.Bound = None,
    runs: Annotated[
        int, typer.Option("--runs", metavar="N", help="The most runs.", rich_help_panel="Run")
    ] = 200,
    weights: o.Weights = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Find the kernels that make a model wrong, by halving the set of sites that are served otherwise."""
    from relax_llm.finding.bisect import bisect as bisected

    if (other is None) == (bad is None):
        raise InputError(
            "Name two ways to run the model: a plan that is wrong with --bad, or OTHER, which is right."
        )
    tokens = f.prompt_of(prompt, ids=ids)
    runner = f.runner_named(
        named_or_default(model),
        threads,
        weights=weights,
        architecture=architecture,
        kernels=kernels,
        target=target,
    )
    bars = InterruptibleBars()
    with bars.listening():
        found = bisected(
            runner,
            None if other is None else f.runner_named(other, threads),
            good=good,
            bad=bad,
            prompt=tokens,
            length=length,
            decodes=decodes,
            bound=bound,
            most_runs=runs,
            progress=bars,
        )
    if json:
        screen.json_document(_data(found))
    else:
        screen.write(f"{found}\n")


def _data(found: "Bisection") -> dict[str, object]:
    return {
        "culprits": [[asdict(change) for change in group] for group in found.culprits],
        "changes": found.changes,
        "runs": found.runs,
        "complete": found.is_complete,
        "steady": found.is_steady,
        "off": found.off if isfinite(found.off) else str(found.off),
    }
