"""`relax-llm compile`: make an artifact."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from relax_llm.artifact.artifact import Artifact
from relax_llm.cli import options as o, screen, tables
from relax_llm.cli.models import compile_with_notes, is_artifact
from relax_llm.errors import InputError


def compile_(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A Hugging Face directory, a GGUF file or a hub id.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where to put it; an artifact there is replaced.",
            show_default=False,
        ),
    ],
    weights: o.Weights = None,
    kv_cache: o.KVCache = None,
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize/--no-equalize",
            help="Bring channels to like sizes before weights are stored in few bits.",
            show_default=False,
        ),
    ] = True,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Which kernel serves which sizes: JSON from `tune`, or edited by hand.",
        ),
    ] = None,
    selection: Annotated[
        str,
        typer.Option(
            "--selection",
            metavar="HOW",
            help="dynamic: kernels are chosen by size; pinned: one for all sizes, so that all round alike.",
        ),
    ] = "dynamic",
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache", help="Take an equal compilation from the cache.", show_default=False
        ),
    ] = True,
    dump_ir: Annotated[
        Path | None,
        typer.Option(
            "--dump-ir",
            metavar="DIR",
            help="Write the module after every pass as text, with what each changed; compiles anew.",
            show_default=False,
        ),
    ] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compile a checkpoint into an artifact: a directory with all that is needed to run it."""
    if is_artifact(checkpoint):
        raise InputError(
            f"{checkpoint} is an artifact already, not a checkpoint; copy the directory instead."
        )
    began = time.perf_counter()
    artifact = compile_with_notes(
        checkpoint,
        weights=weights,
        kv_cache=kv_cache,
        equalize=equalize,
        architecture=architecture,
        kernels=kernels,
        target=target,
        plan=plan,
        selection=selection,
        output=output,
        cache=cache,
        dump_ir=dump_ir,
    )
    seconds = time.perf_counter() - began
    if json:
        screen.json_document(_summary(artifact, seconds))
    else:
        _show(artifact, checkpoint, seconds)
        if dump_ir is not None:
            screen.hint(f"What each pass changed: {dump_ir / 'index.html'}")


def _summary(artifact: "Artifact", seconds: float) -> dict[str, object]:
    from relax_llm.artifact.artifact import LIBRARY, OBJECTS, WEIGHTS

    manifest = artifact.manifest
    return {
        "path": str(artifact.path),
        "target": manifest.target,
        "architecture": manifest.architecture,
        "weight_format": manifest.weight_format,
        "weight_formats": dict(manifest.weight_formats),
        "kernels": len(manifest.kernels),
        "launches": {name: len(launches) for name, launches in manifest.functions.items()},
        "weights": len(manifest.weights),
        "weights_bytes": manifest.files[WEIGHTS].size,
        "library_bytes": (manifest.files.get(LIBRARY) or manifest.files[OBJECTS]).size,
        "seconds": round(seconds, 3),
        "notes": list(manifest.notes),
    }


def _show(artifact: "Artifact", checkpoint: str, seconds: float) -> None:
    from relax_llm.artifact.artifact import LIBRARY, OBJECTS, WEIGHTS

    manifest = artifact.manifest
    code = manifest.files.get(LIBRARY) or manifest.files[OBJECTS]
    tables.facts(
        {
            "artifact": f"{artifact.path}, from {checkpoint}",
            "target": manifest.target,
            "kernels": f"{len(manifest.kernels)}, in {tables.quantity(code.size, 'B')} of code",
            "launches": ", ".join(f"{name} {len(calls)}" for name, calls in manifest.functions.items()),
            "weights": f"{len(manifest.weights)} tensors, {tables.quantity(manifest.files[WEIGHTS].size, 'B')} as "
            f"{manifest.stored_as}",
            "time": f"{seconds:.1f} s",
        }
    )
    screen.hint(f"To see its kernels: relax-llm inspect {artifact.path}")
