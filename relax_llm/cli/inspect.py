"""`relax-llm inspect`: every kernel of an artifact, what it solves and what it costs, and the graph they are in."""

from pathlib import Path
from typing import Annotated

import typer

from relax_llm.cli import options as o, screen
from relax_llm.cli.models import named_or_default
from relax_llm.errors import InputError


def inspect(
    model: o.Subject = None,
    sites: Annotated[bool, typer.Option("--sites", help="List the launches of a function in order.")] = False,
    function: Annotated[
        str,
        typer.Option("--function", metavar="NAME", help="Which function: decode, prefill, logits or hidden."),
    ] = "decode",
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="SIZES", help="Evaluate the formulas, as in batch=1,seq=1,kv_len=100."),
    ] = None,
    weights_table: Annotated[
        bool, typer.Option("--weights-table", help="List the packed weights and what they are made from.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="List which kernel serves which sizes, for every problem and site.")
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="SITE", help="Say which kernels serve a site, and why."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", "-M", metavar="M", help="With --explain: at this many rows; short for --at M=..."
        ),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(
            "--graph",
            metavar="FILE.html",
            help="Write the graph of a function as a page: launches, tensors, kernels, code.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="With --graph: show the times that `relax-llm trace` wrote."
        ),
    ] = None,
    dot: Annotated[
        bool, typer.Option("--dot", help="Print the graph of a function in Graphviz's language.")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="KERNEL|SITE",
            help="Print what a person wrote of a kernel, or of all kernels of a site.",
        ),
    ] = None,
    tir: Annotated[
        str | None,
        typer.Option("--tir", metavar="KERNEL|SITE", help="Print TVMScript of a kernel."),
    ] = None,
    llvm: Annotated[
        str | None,
        typer.Option("--llvm", metavar="KERNEL|SITE", help="Print LLVM IR of a kernel."),
    ] = None,
    assembly: Annotated[
        str | None,
        typer.Option("--assembly", metavar="KERNEL|SITE", help="Print assembly of a kernel."),
    ] = None,
    cuda: Annotated[
        bool, typer.Option("--cuda", help="Print the source of kernels compiled with --target cuda.")
    ] = False,
    weights: o.Weights = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show every kernel of an artifact: sites, problem, symbolic shapes, flops and bytes as formulas."""
    from relax_llm.cli import report
    from relax_llm.cli.kernel_table import parse_sizes
    from relax_llm.plan.kernel import AXES

    path, manifest = report.open_manifest(
        named_or_default(model), weights=weights, architecture=architecture, kernels=kernels, target=target
    )
    if cuda:
        report.show_source(path, manifest)
        return
    for form, name in (("source", source), ("tir", tir), ("llvm", llvm), ("assembly", assembly)):
        if name is not None:
            from relax_llm.cli import code

            code.show(path, manifest, form, name)
            return
    if explain is not None:
        sizes = {"M": rows} if rows is not None else {}
        sizes |= parse_sizes(at, {axis for axes in AXES.values() for axis in axes}) if at else {}
        report.explain(path, manifest, explain, sizes, json=json)
        return
    if plan:
        report.show_plan(path, manifest, json=json)
        return
    if rows is not None:
        raise InputError("--rows goes with --explain SITE.")
    if trace is not None and graph is None:
        raise InputError("--trace goes with --graph FILE.html.")
    if graph is not None or dot:
        from relax_llm.cli import graphs

        if dot:
            graphs.show_dot(path, manifest, function)
        if graph is not None:
            graphs.write_page(path, manifest, function, graph, trace)
        return
    asked = report.Report(
        path, manifest, function, report.sizes_at(at, manifest, function), sites, weights_table
    )
    if json:
        from relax_llm.cli import graphs

        screen.json_document(report.as_data(asked) | graphs.as_data(path, manifest, function))
    else:
        report.show(asked)
