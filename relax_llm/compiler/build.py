"""Making an artifact: trace, run the pipeline, generate code, pack weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.support import cc

from relax_llm.artifact.artifact import LIBRARY, WEIGHTS, finish, versions
from relax_llm.artifact.manifest import Cache, Manifest, Weight
from relax_llm.artifact.weights import write
from relax_llm.checkpoint import Checkpoint
from relax_llm.compiler import launches
from relax_llm.compiler.export import export
from relax_llm.compiler.parameters import match, reader
from relax_llm.compiler.passes.lift_weights import weight_recipes
from relax_llm.compiler.pipeline import lowering, pipeline, run
from relax_llm.compiler.recipes import Array, Recipe, joined_name
from relax_llm.errors import CompileError, TokenizerError
from relax_llm.kernels.machine import Machine
from relax_llm.layers import Decoder, Fields
from relax_llm.layers.decoder import attention_layers
from relax_llm.progress import Progress

CODE_GENERATION = {"tirx.disable_storage_rewrite": True}
"""TVM's options: its storage rewriting forgets which buffers belong on the stack (see `kernels.builder.local`)."""

# Ctrl-C in a pass that is written in Python comes back through C++; unregistered it would come as a RuntimeError.
tvm_ffi.register_error("KeyboardInterrupt", KeyboardInterrupt)


def build(
    checkpoint: Checkpoint,
    architecture: type[Decoder],
    machine: Machine,
    directory: Path,
    progress: Progress,
    warn: Callable[[str], None],
) -> None:
    """Compile a checkpoint into an empty directory.

    Raises:
        CheckpointError: The tensors do not fit the architecture.
        ArchitectureError: The architecture cannot be traced or does not know the config.
        CompileError: Code generation failed.
    """
    decoder = architecture(Fields(checkpoint.config))
    tensors = match(checkpoint, decoder)
    with progress.task("Tracing", 1):
        mod = export(decoder, machine)
    passes = pipeline(machine)
    with progress.task("Passes", len(passes)) as advance:
        for step in passes:
            mod = step(mod)
            advance(1)
    calls = launches.functions(mod)
    kernels = launches.kernels(mod, calls)
    recipes = weight_recipes(mod)
    weights = _weights(mod, recipes)
    with progress.task("Compiling kernels", 1):
        _library(run(mod, lowering()), machine, directory / LIBRARY)
    warnings: list[str] = []

    def note(text: str) -> None:
        if text not in warnings:
            warnings.append(text)
            warn(text)

    read = reader(tensors, note)
    by_name = dict(zip((weight.name for weight in weights), recipes, strict=True))
    with progress.task("Packing weights", len(weights)) as advance, (directory / WEIGHTS).open("wb") as file:

        def make(weight: Weight) -> Array:
            advance(1)
            return by_name[weight.name].make(read)

        write(file, weights, make)
    notes = [*checkpoint.notes, *_save_tokenizer(checkpoint, directory), *warnings]
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
            weight_format="f32",
            vocab_size=decoder.vocab_size,
            hidden_size=int(hidden),
            context_length=decoder.context_length,
            caches=tuple(
                Cache(site, a.kv_heads, a.head_dim) for site, a in attention_layers(decoder).items()
            ),
            weights=tuple(weights),
            kernels=kernels,
            functions=calls,
            notes=tuple(notes),
        ),
    )


def _library(mod: tvm.IRModule, machine: Machine, path: Path) -> None:
    if cc.get_cc() is None:
        raise CompileError(
            "A C++ compiler is needed to link the kernels and none was found; install g++ or clang, or set CXX."
        )
    try:
        with tvm.transform.PassContext(config=CODE_GENERATION):
            executable = relax.build(mod, machine.target, relax_pipeline=tvm.transform.Sequential([]))
        executable.export_library(str(path))
    except (RuntimeError, ValueError) as error:
        raise CompileError(f"Generating code for {machine.name} failed: {error}") from error


def _weights(mod: tvm.IRModule, recipes: list[Recipe]) -> list[Weight]:
    types = mod["prefill"].params[3].ty.fields
    weights: dict[str, Weight] = {}
    for recipe, type_ in zip(recipes, types, strict=True):
        name = joined_name(recipe.sources())
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
