"""`compile`: from a checkpoint to an artifact, by way of a cache. Imports TVM only when there is work to do."""

import hashlib
import inspect
import json
import os
import sys
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relax_llm import cpu
from relax_llm.artifact.artifact import Artifact, load, replacing, versions
from relax_llm.artifact.kv_cache import CACHE_DTYPES
from relax_llm.checkpoint import Checkpoint, open_checkpoint
from relax_llm.compiler.cache import cached, locked, place_of, size, trim
from relax_llm.compiler.loading import load_tvm
from relax_llm.compiler.sources import pass_sources
from relax_llm.compiler.user_kernels import gather
from relax_llm.compiler.wanted import AUTO, WHOLE, Wanted, kv_cache_for
from relax_llm.errors import ArchitectureError, ArtifactError, CompileError, KernelError
from relax_llm.plan.kernel import Kernel, Layout, Selection
from relax_llm.plan.plan import Plan
from relax_llm.progress import Progress, Silent

if TYPE_CHECKING:
    from relax_llm.compiler.pipeline import Entry
    from relax_llm.layers import Decoder

KV_CACHES = (*CACHE_DTYPES, AUTO)
SELECTIONS: tuple[Selection, ...] = ("dynamic", "pinned")

_MAKE_NO_ARTIFACTS = ("cli", "finding", "numerics", "runtime", "tuning")
"""Parts of this package that what is compiled does not depend on."""


def compile(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    weights: str = "f32",
    kv_cache: str = AUTO,
    equalize: bool = True,
    architecture: "type[Decoder] | str | os.PathLike[str] | None" = None,
    target: str | None = None,
    kernels: Sequence[Kernel | str | os.PathLike[str]] = (),
    plan: Plan | str | os.PathLike[str] | None = None,
    selection: Selection = "dynamic",
    pipeline: "Sequence[Entry] | None" = None,
    dump_ir: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a checkpoint into an artifact.

    Args:
        checkpoint: A Hugging Face directory, a GGUF file, a hub id, or what `open_checkpoint` gave.
        weights: How matrices are stored: "f32"; "bf16" or "f16", half of that; "q8", "q6", "q4" or "q4s", in 8.5,
            6.5, 5 or 4.5 bits; or "auto", the one of these that holds what the checkpoint has. Behind it formats of
            some sites may stand, by their patterns: "q4,embed_tokens=q4s,layers.*.mlp.down_proj=q8". See
            docs/formats.md.
        kv_cache: How keys and values are stored: "f32"; "bf16", half of that, where attention may round queries and
            softmax weights to bf16, too; "q8", a quarter, as bytes with a scale for each position; or "auto", f32
            beside weights in f32, q8 beside those in q4 or q4s, and bf16 beside others.
        equalize: Whether to bring channels to like sizes before their weights are stored in groups of few bits, which
            changes nothing that the model computes and makes rounding errors a good deal smaller.
        architecture: A subclass of `relax_llm.layers.Decoder`, or a Python file with one; by default the built-in one
            for the checkpoint's model_type.
        target: The processor to compile for: an x86-64 level such as "x86-64-v3", "aarch64", or "cuda" for
            an NVIDIA GPU; by default this machine's.
        kernels: Kernels of yours, made with `relax_llm.kernel`, or Python files with some. They come before the
            built-in ones, in this order; after them those of installed packages, by the entry point group
            "relax_llm.kernels".
        plan: Which kernel serves which sizes, from `relax_llm.tune`, another artifact or your editor: a Plan, or
            the path of its JSON. It decides for the problems and sites it names.
        selection: "dynamic": kernels are chosen by size; "pinned": one kernel for all sizes of a problem, so that
            results do not depend on how tokens were divided among calls.
        pipeline: The passes, where they are not the standard ones: what `relax_llm.pipeline()` gives, changed.
        dump_ir: A directory for the module after every pass, as text, with what each pass changed. The passes run
            then, whatever the cache holds.
        output: Where to put the artifact; by default the cache, whence `Artifact.save` copies it.
        cache: Whether an equal compilation made earlier may be used, and machine code of kernels that it had in common.
        progress: Where to report to.

    Returns:
        The artifact, ready for `Runner`.

    Raises:
        CheckpointError: The checkpoint cannot be read or does not fit the architecture.
        ArchitectureError: No architecture fits.
        KernelError: A kernel of yours is wrong, or cannot be used.
        PlanError: The plan cannot be read, or names a kernel that cannot serve.
        CompileError: An option is not known, or code generation failed.
        ArtifactError: The output or the cache cannot be written.
    """
    formats = Wanted.parse(weights)
    if target == "cuda" and weights not in ("f32", AUTO):
        raise CompileError(f"Kernels for the target cuda read weights as f32, not {weights}.")
    if kv_cache not in KV_CACHES:
        raise CompileError(f"The cache format {kv_cache!r} is not known; known: {', '.join(KV_CACHES)}.")
    if target == "cuda" and kv_cache not in ("f32", AUTO):
        raise CompileError(f"Kernels for the target cuda keep caches as f32, not {kv_cache}.")
    if selection not in SELECTIONS:
        raise CompileError(f"The selection {selection!r} is not known; known: {', '.join(SELECTIONS)}.")
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    formats = WHOLE if target == "cuda" else formats.of(opened)
    if kv_cache == AUTO:
        kv_cache = kv_cache_for(formats.everywhere, target)
    if output is None and not cache:
        raise CompileError("Without the cache an output directory is needed: pass output=DIR.")
    chosen = gather(kernels)
    if output is not None and any(kernel.form == "python" for kernel in chosen):
        raise ArtifactError(
            "Kernels written in Python cannot be saved; compile without an output, and save with python_kernels=True."
        )
    wanted = plan if isinstance(plan, Plan) or plan is None else Plan.read(plan)
    key = _key(opened, formats, kv_cache, equalize, architecture, target, chosen, pipeline, wanted, selection)
    place = place_of(key)

    def make(directory: Path) -> Artifact:
        with replacing(directory) as temporary:
            _build(
                opened,
                temporary,
                progress or Silent(),
                weights=formats,
                kv_cache=kv_cache,
                equalized=equalize,
                architecture=architecture,
                target=target,
                kernels=chosen,
                plan=wanted,
                selection=selection,
                pipeline=pipeline,
                dump_ir=dump_ir,
                cache=cache,
            )
        return load(directory, kernels=chosen, for_this_machine=target is None)

    anew = dump_ir is not None  # what is in the cache passed through no pipeline now
    if output is not None:
        found = cached(place, chosen) if cache and not anew else None
        return found.save(output) if found else make(Path(output))
    most = size()
    with locked(place):
        found = None if anew else cached(place, chosen)
        if found is None:
            found = make(place)
            trim(place.parent, most, kept=place)
        return found


def _build(
    checkpoint: Checkpoint,
    directory: Path,
    progress: Progress,
    *,
    weights: Wanted,
    kv_cache: str,
    architecture: Any,
    target: str | None,
    kernels: Sequence[Kernel],
    plan: Plan | None,
    selection: Selection,
    **options: Any,
) -> None:
    with progress.task("Loading the compiler", 1):
        load_tvm()
        from relax_llm.compiler.architectures import find
        from relax_llm.compiler.build import build
        from relax_llm.compiler.planner import Planner
        from relax_llm.kernels.machine import machine

    build(
        checkpoint,
        find(checkpoint.config, architecture),
        Planner(machine(target), kernels, plan=plan, selection=selection, weights=weights, kv_cache=kv_cache),
        directory,
        progress,
        _warn,
        **options,
    )


def _warn(text: str) -> None:
    """Warn at the line outside of this package that called it, however deep it is here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "relax_llm":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def _key(
    checkpoint: Checkpoint,
    weights: Wanted,
    kv_cache: str,
    equalize: bool,
    architecture: Any,
    target: str | None,
    kernels: Sequence[Kernel],
    pipeline: "Sequence[Entry] | None",
    plan: Plan | None,
    selection: Selection,
) -> str:
    """Everything that the artifact depends on, as a name."""
    parts = {
        "checkpoint": checkpoint.fingerprint,
        "config": checkpoint.config,
        "weights": str(weights),
        "kv_cache": kv_cache,
        "equalize": equalize,
        "architecture": _source_of(architecture),
        "target": target or [cpu.architecture(), sorted(cpu.features())],
        "kernels": [_kernel_source(kernel) for kernel in kernels],
        "pipeline": pass_sources(pipeline),
        "plan": plan.to_json() if plan else None,
        "selection": selection,
        "versions": versions(),
        "package": _package_digest(),
    }
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16)
    return f"{checkpoint.path.stem[:40]}-{weights.everywhere}-{digest.hexdigest()}"


def _kernel_source(kernel: Kernel) -> list[str]:
    """A kernel's record, the whole file it comes from, which may use any of it, and the files that it reads."""
    fields = [_stable(value) for key, value in sorted(vars(kernel).items()) if key != "make"]
    fields += [hashlib.blake2b(_content(kernel, file)).hexdigest() for file in kernel.files]
    module = sys.modules.get(kernel.make.__module__)
    file = inspect.getsourcefile(kernel.make) or getattr(module, "__file__", None)
    captured = [repr(cell.cell_contents) for cell in kernel.make.__closure__ or ()]
    source = (
        Path(file).read_text(encoding="utf-8")
        if file and Path(file).is_file()
        else kernel.make.__code__.co_code.hex()
    )
    return [*fields, *captured, source]


def _stable(value: Any) -> str:
    """A field as text that is the same in every process, as a function's own is not."""
    if isinstance(value, Layout):
        return f"{value.name} {value.dtype} {_stable(value.shape)} {_stable(value.pack)}"
    if isinstance(value, frozenset):
        return str(sorted(value))
    code = getattr(value, "__code__", None)
    return f"{value.__qualname__} {code.co_code.hex()} {code.co_consts!r}" if code else str(value)


def _content(kernel: Kernel, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise KernelError(
            f"Kernel {kernel.name!r} names the file {file}, which cannot be read: {error.strerror}."
        ) from error


def _source_of(architecture: Any) -> str:
    if architecture is None:
        return ""
    if isinstance(architecture, type):
        return _source_of_class(architecture)
    path = Path(architecture)
    if path.suffix != ".py":
        return str(architecture)
    try:
        return path.read_bytes().decode("latin-1")  # whatever its encoding: only equality counts
    except OSError as error:
        raise ArchitectureError(f"The architecture file {path} cannot be read: {error.strerror}.") from error


def _source_of_class(architecture: type) -> str:
    """The modules of a class and its bases; something new each time where they do not say what it computes.

    A class made in a function depends on that function's arguments, and one typed into a session has no file.
    """
    sources = [architecture.__qualname__]
    for kind in architecture.__mro__[:-1]:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if "<locals>" in kind.__qualname__ or not file or not Path(file).is_file():
            return uuid.uuid4().hex
        sources.append(Path(file).read_bytes().decode("latin-1"))
    return "\n".join(sources)


def _package_digest() -> str:
    """A digest of this package's own sources, so that a changed kernel or pass is not served from the cache."""
    import relax_llm
    import relax_llm.models

    digest = hashlib.blake2b(digest_size=16)
    for root in (*relax_llm.__path__, *relax_llm.models.__path__):
        for file in sorted(path for path in Path(root).rglob("*") if path.suffix in (".py", ".cpp")):
            name = file.relative_to(root)
            if name.parts[0] not in _MAKE_NO_ARTIFACTS:
                digest.update(str(name).encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()
