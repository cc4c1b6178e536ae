"""What `relax-llm inspect` shows of an artifact: kernels, launches, weights and costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relax_llm.artifact import formulas
from relax_llm.artifact.artifact import CHANNELS, LIBRARY, MANIFEST, OBJECTS, SOURCE, WEIGHTS, Artifact, load
from relax_llm.artifact.costs import cost as launch_cost
from relax_llm.artifact.kernel_list import kernel_uses, shapes_text
from relax_llm.artifact.manifest import Kernel, Launch, Manifest
from relax_llm.cli import screen, tables
from relax_llm.cli.kernel_table import parse_sizes, symbols
from relax_llm.cli.models import compile_with_notes, is_artifact, refuse_compile_options
from relax_llm.errors import ArtifactError, InputError
from relax_llm.plan.plan import entry_json
from relax_llm.plan.table import plan_table


@dataclass(frozen=True)
class Report:
    """What to show of an artifact.

    Attributes:
        path: The artifact.
        manifest: What it says of itself.
        function: The function whose launches are counted and listed.
        sizes: Values for the symbolic sizes, or None to show formulas.
        sites: Whether to list launches.
        weights: Whether to list weights.
    """

    path: Path
    manifest: Manifest
    function: str
    sizes: Mapping[str, int] | None
    sites: bool
    weights: bool


def open_manifest(model: str, **options: Any) -> tuple[Path, Manifest]:
    """The manifest of an artifact, or of what a checkpoint is compiled into.

    An artifact that cannot run here can be looked at all the same; that it cannot is worth a note.

    Raises:
        RelaxLLMError: There is no manifest to read, or the checkpoint cannot be compiled.
    """
    if not is_artifact(model):
        artifact = compile_with_notes(model, **options)
        return artifact.path, artifact.manifest
    refuse_compile_options(model, **options)
    path = Path(model).expanduser()
    file = path / MANIFEST
    manifest = Manifest.from_json(file.read_text(encoding="utf-8", errors="replace"), str(file))
    try:
        load(path)
    except ArtifactError as refusal:
        screen.note(f"This artifact cannot run here. {refusal}")
    for text in manifest.notes:
        screen.note(text)
    return path, manifest


def show_source(path: Path, manifest: Manifest) -> None:
    """Print the source of an artifact's GPU kernels.

    Raises:
        InputError: It has none.
    """
    if SOURCE not in manifest.files:
        raise InputError(
            f"{path} was compiled for {manifest.target} and has no CUDA source; compile it with --target cuda."
        )
    screen.write((path / SOURCE).read_text(encoding="utf-8"))


def sizes_at(text: str | None, manifest: Manifest, function: str) -> dict[str, int] | None:
    """What `--at` says, complete for every formula of an artifact; None where it says nothing.

    Raises:
        InputError: There is no such function, or a size is missing, unknown, not a number or not possible.
    """
    if function not in manifest.functions:
        raise InputError(
            f"There is no function {function!r}; the functions are {', '.join(manifest.functions)}."
        )
    if text is None:
        return None
    known = symbols(manifest)
    sizes = parse_sizes(text, known)
    if function == "decode":
        if sizes.get("seq", 1) != 1:
            raise InputError(
                f"--at: seq is {sizes['seq']}, but decode is for one token; add --function prefill."
            )
        sizes["seq"] = 1
    for name in sorted(known):
        if name not in sizes:
            raise InputError(
                f"--at does not say how large {name} is; the sizes are {', '.join(sorted(known))}."
            )
    return sizes


def show(report: Report) -> None:
    """Print what is asked for as tables."""
    manifest = report.manifest
    size = {name: tables.quantity(file.size, "B") for name, file in manifest.files.items()}
    tables.facts(
        {
            "artifact": str(report.path),
            "architecture": f"{manifest.architecture}, {manifest.context_length} tokens of context",
            "target": manifest.target,
            "kernels": f"{len(manifest.kernels)}, in {size.get(LIBRARY) or size.get(OBJECTS, '?')} of code",
            "weights": f"{len(manifest.weights)} tensors, {size.get(WEIGHTS, '?')} as {manifest.stored_as}"
            + (", channels equalized" if CHANNELS in manifest.files else ""),
            "launches": ", ".join(f"{name} {len(calls)}" for name, calls in manifest.functions.items()),
        }
    )
    screen.write("\n")
    if report.weights:
        _show_weights(manifest)
    elif report.sites:
        _show_sites(report)
    elif report.sizes is None:
        _show_kernels(manifest)
    else:
        _show_costs(report)
    if report.sizes is not None and not report.weights:
        _show_total(report)


def _show_kernels(manifest: Manifest) -> None:
    tables.show(kernel_uses(manifest).table, title=2)


def _show_costs(report: Report) -> None:
    """The kernels of a function with what one launch and all launches cost, the most bytes first."""
    costs: dict[str, list[dict[str, int | float]]] = {}
    for launch in report.manifest.functions[report.function]:
        costs.setdefault(launch.kernel, []).append(_cost(report, launch))
    totals = {
        name: {unit: sum(cost[unit] for cost in each) for unit in each[0]} for name, each in costs.items()
    }
    rows = [
        (name, str(len(costs[name])), *_cost_texts(costs[name][0]), *_cost_texts(totals[name]))
        for name in sorted(costs, key=lambda name: -totals[name]["bytes"])
    ]
    header = ("kernel", "launches", "flops", "bytes", "all flops", "all bytes")
    tables.table(header, rows, numbers=range(1, len(header)))


def _show_sites(report: Report) -> None:
    launches = report.manifest.functions[report.function]
    rows = []
    for number, launch in enumerate(launches):
        costs = () if report.sizes is None else _cost_texts(_cost(report, launch))
        rows.append((str(number), launch.site, launch.kernel, *costs))
    header = ("#", "site", "kernel", "flops", "bytes")
    tables.table(header if report.sizes is not None else header[:3], rows, numbers=(0, 3, 4))


def _show_weights(manifest: Manifest) -> None:
    rows = [
        (weight.name, weight.dtype, f"[{', '.join(map(str, weight.shape))}]", weight.recipe)
        for weight in manifest.weights
    ]
    tables.table(("weight", "dtype", "shape", "made from"), rows, title=3)


def _show_total(report: Report) -> None:
    total = _total(report)
    at = ", ".join(f"{name}={value}" for name, value in sorted((report.sizes or {}).items()))
    screen.write(
        f"\n{report.function} at {at}: {total['launches']} launches, {tables.quantity(total['flops'], 'flop')}, "
        f"{tables.quantity(total['bytes'], 'B')}\n"
    )


def explain(path: Path, manifest: Manifest, site: str, sizes: Mapping[str, int], *, json: bool) -> None:
    """Say which kernels serve a site, at some sizes or at all.

    Raises:
        PlanError: The plan has no such site, or it is not chosen by these sizes.
    """
    plan = Artifact(path, manifest).plan
    text = plan.explain(site, operator=None, **sizes)
    if json:
        screen.json_document({"site": site, "entries": [entry_json(entry) for entry in plan.all_at(site)]})
    else:
        screen.write(f"{text}\n")


def show_plan(path: Path, manifest: Manifest, *, json: bool) -> None:
    """Print which kernel serves which sizes of every problem, and where these problems are."""
    plan = Artifact(path, manifest).plan
    if json:
        screen.json_document({"entries": [entry_json(entry) for entry in plan.entries]})
        return
    ranges = plan_table(plan.entries)
    tables.table(ranges.header, ranges.rows)


def _total(report: Report) -> dict[str, Any]:
    launches = report.manifest.functions[report.function]
    costs = [_cost(report, launch) for launch in launches]
    return {
        "function": report.function,
        "launches": len(launches),
        "flops": sum(cost["flops"] for cost in costs),
        "bytes": sum(cost["bytes"] for cost in costs),
    }


def _cost(report: Report, launch: Launch) -> dict[str, int | float]:
    """What a launch of the report costs at its sizes, which are not always those of the call."""
    return dict(vars(launch_cost(report.manifest.kernels[launch.kernel], launch, report.sizes or {})))


def _costs(kernel: Kernel, sizes: Mapping[str, int]) -> dict[str, int | float]:
    return {"flops": formulas.evaluate(kernel.flops, sizes), "bytes": formulas.evaluate(kernel.bytes, sizes)}


def _cost_texts(costs: Mapping[str, float]) -> tuple[str, str]:
    return tables.quantity(costs["flops"]), tables.quantity(costs["bytes"], "B")


def as_data(report: Report) -> dict[str, Any]:
    """What is asked for as JSON."""
    manifest, sizes = report.manifest, report.sizes
    data: dict[str, Any] = {
        "path": str(report.path),
        "versions": dict(manifest.versions),
        "target": manifest.target,
        "features": list(manifest.features),
        "architecture": manifest.architecture,
        "weight_format": manifest.weight_format,
        "weight_formats": dict(manifest.weight_formats),
        "context_length": manifest.context_length,
        "vocab_size": manifest.vocab_size,
        "hidden_size": manifest.hidden_size,
        "files": {name: file.size for name, file in manifest.files.items()},
        "notes": list(manifest.notes),
        "launches": {name: len(calls) for name, calls in manifest.functions.items()},
        "kernels": [
            {
                "kernel": use.name,
                "operator": use.kernel.operator,
                "problem": dict(use.kernel.problem),
                "sites": list(use.sites),
                "launches": dict(use.launches),
                "shapes": shapes_text(use.example),
                "flops": use.kernel.flops,
                "bytes": use.kernel.bytes,
                **({} if sizes is None else {"at": _costs(use.kernel, sizes)}),
            }
            for use in kernel_uses(manifest)
        ],
    }
    if sizes is not None:
        data["at"] = dict(sizes)
        data["total"] = _total(report)
    if report.sites:
        data["function"] = report.function
        data["sites"] = [
            {"site": launch.site, "kernel": launch.kernel, "shapes": shapes_text(launch)}
            | ({} if sizes is None else _cost(report, launch))
            for launch in manifest.functions[report.function]
        ]
    if report.weights:
        data["weights"] = [
            {"name": weight.name, "shape": list(weight.shape), "dtype": weight.dtype, "recipe": weight.recipe}
            for weight in manifest.weights
        ]
    return data
