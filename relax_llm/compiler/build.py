"""Making an artifact: trace, run the pipeline, generate code, pack weights."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from relax_llm.artifact import channels
from relax_llm.artifact.artifact import CHANNELS, PLAN, WEIGHTS, finish, versions
from relax_llm.artifact.listings import LISTINGS
from relax_llm.artifact.manifest import Cache, Manifest, Weight
from relax_llm.artifact.weights import write
from relax_llm.checkpoint import Checkpoint
from relax_llm.compiler import launches, listings
from relax_llm.compiler.dump import dumping
from relax_llm.compiler.equalize import Equalized, equalize
from relax_llm.compiler.export import export
from relax_llm.compiler.link import write_library
from relax_llm.compiler.parameters import Reader, match
from relax_llm.compiler.passes.lift_weights import weight_recipes
from relax_llm.compiler.pipeline import Entry, as_pipeline, run
from relax_llm.compiler.planner import Planner
from relax_llm.compiler.recipes import Array, Recipe, weight_name
from relax_llm.compiler.storage import Storage
from relax_llm.errors import ArchitectureError, ArtifactError, RelaxLLMError, TokenizerError
from relax_llm.layers import Decoder, Fields
from relax_llm.layers.decoder import attention_layers
from relax_llm.progress import Progress

_CODE_SPACE = 64 * 2**20  # bytes; for objects and the linked library

# Ctrl-C in a pass that is written in Python comes back through C++; unregistered it would come as a RuntimeError.
tvm_ffi.register_error("KeyboardInterrupt", KeyboardInterrupt)


def build(
    checkpoint: Checkpoint,
    architecture: type[Decoder],
    planner: Planner,
    directory: Path,
    progress: Progress,
    warn: Callable[[str], None],
    pipeline: Sequence[Entry] | None = None,
    dump_ir: str | os.PathLike[str] | None = None,
    equalized: bool = True,
    cache: bool = True,
) -> None:
    """Compile a checkpoint into an empty directory.

    Raises:
        CheckpointError: The tensors do not fit the architecture.
        ArchitectureError: The architecture cannot be traced or does not know the config.
        CompileError: Code generation failed.
    """
    machine = planner.machine
    decoder = construct(architecture, checkpoint.config)
    tensors = match(checkpoint, decoder)
    planner.storage = Storage.of(planner.weights, tensors, decoder.vocab_size)
    with progress.task("Tracing", 1):
        mod = export(decoder, machine, planner.kv_cache)
    made = Equalized(tensors)
    if equalized:
        quiet = Reader(tensors, lambda _: None)  # they are read again, and warned of then
        made = equalize(mod, tensors, planner.storage, decoder.context_length, quiet, progress)
    to_launches, to_instructions = (part.bind(planner) for part in as_pipeline(pipeline).parts())
    with (
        progress.task("Passes", len(to_launches) + len(to_instructions)) as advance,
        dumping(dump_ir, mod) as dump,
    ):

        def watch(name: str, module: tvm.IRModule) -> None:
            dump(name, module)
            advance(1)

        mod = run(mod, to_launches, watch)
        instructions = run(mod, to_instructions, watch, launches_stay=True)
    planner.storage.require_sites()
    unused = planner.unused()
    calls = launches.functions(mod)
    recipes = weight_recipes(mod)
    weights = _weights(mod, recipes)
    _check_space(directory, sum(weight.nbytes for weight in weights))
    with progress.task("Compiling kernels", 1), listings.script(instructions) as script:
        unlinked, llvm = write_library(instructions, machine, directory, planner.objects(), cache=cache)
    listings.write(directory / LISTINGS, instructions, planner, script.result(), llvm)
    (directory / PLAN).write_text(planner.plan().to_json(), encoding="utf-8")
    warnings: list[str] = []

    def note(text: str) -> None:
        if text not in warnings:
            warnings.append(text)
            warn(text)

    read = Reader(made.tensors, note)
    by_name = dict(zip((weight.name for weight in weights), recipes, strict=True))
    with progress.task("Packing weights", len(weights)) as advance, (directory / WEIGHTS).open("wb") as file:

        def make(weight: Weight) -> Array:
            advance(1)
            return by_name[weight.name].make(read, planner.layout)

        write(file, weights, make)
    channels.write(directory / CHANNELS, made.factors)
    notes = [
        *unlinked,
        *made.notes,
        *checkpoint.notes,
        *unused,
        *_save_tokenizer(checkpoint, directory),
        *warnings,
    ]
    hidden = mod["hidden"].ret_ty.shape[-1]
    finish(
        directory,
        Manifest(
            versions=versions(),
            target=machine.name,
            features=tuple(sorted(machine.features)),
            architecture=f"{architecture.__module__}.{architecture.__qualname__}",
            config=dict(checkpoint.config),
            generation_config=_generation_config(checkpoint),
            weight_format=planner.weights.everywhere,
            weight_formats=dict(planner.weights.sites),
            vocab_size=decoder.vocab_size,
            hidden_size=int(hidden),
            context_length=decoder.context_length,
            caches=tuple(
                Cache(site, a.kv_heads, a.head_dim, planner.kv_cache)
                for site, a in attention_layers(decoder).items()
            ),
            weights=tuple(weights),
            kernels=launches.kernels(mod, calls),
            functions=calls,
            dispatchers={} if machine.is_gpu else launches.dispatchers(planner.choices()),
            python_kernels=tuple(planner.python_kernels()),
            notes=tuple(notes),
        ),
    )


def construct(architecture: type[Decoder], config: Mapping[str, Any]) -> Decoder:
    """A model for a config.json.

    Raises:
        ArchitectureError: The architecture cannot be made for it.
    """
    try:
        decoder = architecture(Fields(config))
    except RelaxLLMError:
        raise
    except Exception as error:  # the code is the user's
        reason = f"{type(error).__name__}: {error}"
        raise ArchitectureError(
            f"{architecture.__name__} cannot be made for this config.json: {reason}."
        ) from error
    for name in ("vocab_size", "context_length"):
        if not isinstance(getattr(decoder, name, None), int):
            raise ArchitectureError(f"{architecture.__name__} must set {name} to a whole number.")
    return decoder


def _check_space(directory: Path, weights: int) -> None:
    """Refuse to begin what cannot end: on a full disk LLVM ends the whole process."""
    for place, needed in ((directory, weights + _CODE_SPACE), (Path(tempfile.gettempdir()), _CODE_SPACE)):
        free = shutil.disk_usage(place).free
        if free < needed:
            raise ArtifactError(
                f"{place} has {free / 1e6:,.0f} MB free, and {needed / 1e6:,.0f} MB are needed; make room, or set "
                "XDG_CACHE_HOME, TMPDIR or the output to another disk."
            )


def _weights(mod: tvm.IRModule, recipes: list[Recipe]) -> list[Weight]:
    types = mod["prefill"].params[3].ty.fields
    weights: dict[str, Weight] = {}
    for recipe, type_ in zip(recipes, types, strict=True):
        name = weight_name(recipe)
        if name in weights:  # the same tensor in a second layout
            name = str(recipe)
        shape = tuple(int(size) for size in type_.shape)
        weights[name] = Weight(name, str(recipe), shape, str(type_.dtype))
    return list(weights.values())


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own, with the end token that older checkpoints keep in config.json."""
    fallback = {
        key: checkpoint.config[key] for key in ("eos_token_id",) if checkpoint.config.get(key) is not None
    }
    return {**fallback, **checkpoint.generation_config}


def _save_tokenizer(checkpoint: Checkpoint, directory: Path) -> list[str]:
    """Write the tokenizer's files; a model without one is still good for token ids, which is worth a note."""
    try:
        checkpoint.load_tokenizer().save(directory)
    except TokenizerError as error:
        return [f"The artifact has no tokenizer and takes token ids only: {error}"]
    return []
