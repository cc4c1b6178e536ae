"""`relax-llm tune`: measure kernels on this machine, choose ranges, write the plan."""

from json import loads as parsed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relax_llm.cli import options as o, screen, tables
from relax_llm.cli.interrupts import InterruptibleBars
from relax_llm.cli.models import check_threads, is_artifact, refuse_compile_options
from relax_llm.errors import InputError

if TYPE_CHECKING:
    from relax_llm.plan.plan import Entry, Plan

_TUNING = "Tuning"
_OUTPUT = "Output"


def tune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT_OR_ARTIFACT",
            help="A Hugging Face directory, a GGUF file, a hub id, or a compiled artifact.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write the plan, as JSON for `compile --plan`.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    weights: o.Weights = None,
    kernels: o.Kernels = None,
    architecture: o.Architecture = None,
    budget: Annotated[
        float,
        typer.Option(
            "--budget", metavar="SECONDS", help="Seconds that it may take.", rich_help_panel=_TUNING
        ),
    ] = 30.0,
    histogram: Annotated[
        str | None,
        typer.Option(
            "--histogram",
            metavar="SIZES",
            help='Launches by M: "1:0.9,64:0.1", or a JSON file {"1": 900, "64": 100}; by default half of the time '
            "at M=1, the other half spread over all sizes.",
            rich_help_panel=_TUNING,
        ),
    ] = None,
    max_kernels: Annotated[
        int,
        typer.Option(
            "--max-kernels", metavar="N", help="The most kernels for one problem.", rich_help_panel=_TUNING
        ),
    ] = 12,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh",
            help="Use what was measured earlier, or measure anew.",
            show_default=False,
            rich_help_panel=_TUNING,
        ),
    ] = True,
    threads: o.Threads = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.svg", help="Draw the measurements.", rich_help_panel=_OUTPUT),
    ] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure the kernels that compete for a model's problems on this machine, and choose by size."""
    from relax_llm.tuning.plot import check_name, plot as draw
    from relax_llm.tuning.tune import tune as tuned

    if plot is not None:
        check_name(plot)
    for file in (output, plot):
        if file is not None and not file.parent.is_dir():
            raise InputError(f"{file} cannot be written: there is no directory {file.parent}.")
    check_threads(threads)
    if is_artifact(model):
        refuse_compile_options(model, weights=weights, architecture=architecture)
    bars = InterruptibleBars()
    try:
        with bars.listening():
            plan = tuned(
                model,
                weights=weights or "f32",
                kernels=kernels or (),
                budget=budget,
                histogram=histogram,
                max_kernels=max_kernels,
                architecture=architecture,
                threads=threads,
                resume=resume,
                progress=bars,
            )
    except KeyboardInterrupt:
        screen.note("What was measured is kept; the same command goes on from there.")
        raise
    if output is not None:
        _write(output, plan.to_json() + "\n")
    if not any(entry.measurements for entry in plan.entries) and budget > 0:
        screen.note(
            "Nothing could be measured within the budget. What was compiled is kept, so the same command gets further; "
            "or give it more seconds with --budget."
        )
    elif plot is not None:
        draw(plan, plot)
    if json:
        screen.json_document(parsed(plan.to_json()))
    else:
        _show(plan)
        if output is not None:
            stored = f" --weights {weights}" if weights else ""
            screen.hint(f"To compile by it: relax-llm compile {model}{stored} -o DIR --plan {output}")
        else:
            screen.hint("To keep the plan, name a file for it with -o.")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def _line(text: str = "") -> None:
    screen.write(f"{text}\n")


def _show(plan: "Plan") -> None:
    said = plan.machine
    facts = {
        "machine": f"{said['processor']}, {said['target']}, {said['threads']} threads",
        "sizes": str(said["distribution"]),
    }
    misses = said.get("predictions_missed_by")
    if misses:
        facts["predictions"] = (
            f"{misses['tested']} tested; off by {misses['median']:.1%} in the median, {misses['worst']:.1%} at most"
        )
    tables.facts(facts)
    for entry in plan.entries:
        if entry.measurements:
            _line()
            _show_entry(entry)
    alone = sum(not entry.measurements for entry in plan.entries)
    if alone:
        _line()
        _line(f"{alone} more problems were not measured; the plan says of each why.")


def _show_entry(entry: "Entry") -> None:
    where = f"{len(entry.sites)} sites, such as {entry.sites[0]}" if len(entry.sites) > 1 else entry.sites[0]
    _line(f"{entry.problem}: {where}")
    for part in entry.ranges:
        _line(f"  {part}: {part.kernel}")
    for candidate in entry.candidates:
        _line(f"  {candidate.kernel} {candidate.reason}")
