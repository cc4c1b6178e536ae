"""`relax-llm compare`: a model beside another, a plan, a checkpoint or a kernel, at every site."""

from json import loads as parsed
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relax_llm.cli import findings as f, options as o, prompts, screen, tables
from relax_llm.cli.interrupts import InterruptibleBars
from relax_llm.cli.models import named_or_default
from relax_llm.errors import InputError

if TYPE_CHECKING:
    from relax_llm.finding.comparison import Comparison
    from relax_llm.runtime.runner import Runner
    from relax_llm.runtime.shadow import Shadow

_BESIDE, _OUTPUT = "What to compare with", "Output"
_STANDARD = "float64"
_DIFFERENT = 1


def compare(
    model: o.Subject = None,
    other: Annotated[
        str | None,
        typer.Argument(metavar="[OTHER]", help="The same: what to compare with.", show_default=False),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="CHECKPOINT",
            help="A Hugging Face directory or GGUF file, run by transformers in float32.",
            rich_help_panel=_BESIDE,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Run MODEL by this plan; without anything else to compare with, beside its own.",
            rich_help_panel=_BESIDE,
        ),
    ] = None,
    shadow: Annotated[
        str | None,
        typer.Option(
            "--shadow",
            metavar="KERNEL",
            help="A kernel of MODEL, run beside those that serve; or float64, each operator's own reference.",
            rich_help_panel=_BESIDE,
        ),
    ] = None,
    site: Annotated[
        str,
        typer.Option(
            "--site",
            metavar="PATTERN",
            help="With --shadow: where, as in 'layers.*.mlp.*'.",
            rich_help_panel=_BESIDE,
        ),
    ] = "*",
    prompt: f.Prompt = None,
    ids: prompts.Ids = False,
    length: f.Length = None,
    decodes: prompts.Decodes = 3,
    bound: f.Bound = None,
    sites: Annotated[
        bool,
        typer.Option("--sites", help="Show every launch, with all measures.", rich_help_panel=_OUTPUT),
    ] = False,
    weights: o.Weights = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compare a model at every site, and name the first that is wrong by itself; then the exit status is 1."""
    beside = {"OTHER": other, "--reference": reference, "--shadow": shadow}
    named = [name for name, value in beside.items() if value is not None]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} are several things to compare with; name one.")
    if not named and plan is None:
        raise InputError(
            "There is nothing to compare with: name OTHER, a --reference, a --plan, or a kernel as --shadow."
        )
    if site != "*" and shadow is None:
        raise InputError("--site goes with --shadow.")
    if shadow is not None and plan is not None:
        raise InputError("--shadow runs MODEL by its own plan; leave out --plan.")
    tokens = f.prompt_of(prompt, ids=ids)
    runner = f.runner_named(
        named_or_default(model),
        threads,
        weights=weights,
        architecture=architecture,
        kernels=kernels,
        target=target,
    )
    options: dict[str, Any] = {"prompt": tokens, "length": length, "decodes": decodes}
    if shadow is not None:
        agrees = _shadow(runner, shadow, site, bound, options, json=json)
    else:
        partner = None if other is None else f.runner_named(other, threads)
        options |= {"reference": reference, "plan": plan, "bound": bound}
        agrees = _compare(runner, partner, options, sites=sites, json=json)
    if not agrees:
        raise typer.Exit(_DIFFERENT)


def _compare(
    runner: "Runner", other: "Runner | None", options: dict[str, Any], *, sites: bool, json: bool
) -> bool:
    from relax_llm.finding.compare import compare as compared

    bars = InterruptibleBars()
    with bars.listening():
        found = compared(runner, other, progress=bars, **options)
    if json:
        screen.json_document(parsed(found.to_json()))
    else:
        _show(found, sites=sites)
    return found.agrees


def _show(found: "Comparison", *, sites: bool) -> None:
    from relax_llm.finding.comparison import HEADER

    tables.facts({"model": found.subject, "compared with": found.reference})
    screen.write("\n")
    kinds, logits = found.summary()
    if sites:
        tables.table(HEADER, list(found.rows()), numbers=(4, 5, 6, 7, 8, 9))
    else:
        tables.show(kinds, title=1)
    screen.write("\n")
    tables.show(logits)
    screen.write("\n")
    for sentence in found.conclusions():
        screen.write(f"{sentence}\n")
    if not sites:
        screen.hint("--sites shows every launch, with all measures.")


def _shadow(
    runner: "Runner", kernel: str, site: str, bound: float | None, options: dict[str, Any], *, json: bool
) -> bool:
    from relax_llm.finding.changes import likeliest
    from relax_llm.finding.float64 import float64
    from relax_llm.finding.workload import workload

    work = workload(runner, **options)
    bars = InterruptibleBars()
    with (
        bars.listening(),
        runner.shadow(site, float64 if kernel == _STANDARD else kernel, bound=bound) as found,
        bars.task("Running", 1) as advance,
    ):
        likeliest(runner, work)
        advance(1)
    if json:
        screen.json_document(parsed(found.to_json()))
    else:
        _show_shadow(found)
    return found.first is None


def _show_shadow(found: "Shadow") -> None:
    screen.write(f"{found}\n")
    if len(found.sites) > 1:
        screen.write(f"Sites that disagree: {', '.join(found.sites)}.\n")
