"""An artifact: a directory with all that is needed to run a compiled model."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from relax_llm import cpu
from relax_llm.artifact import weights
from relax_llm.artifact.kernel_list import KernelList, kernel_uses
from relax_llm.artifact.listings import LISTINGS, Listing, Listings
from relax_llm.artifact.manifest import File, Manifest
from relax_llm.errors import ArtifactError
from relax_llm.plan.kernel import Kernel
from relax_llm.plan.plan import Plan
from relax_llm.plan.python_kernel import register_given, require
from relax_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from relax_llm.runtime.kernel import CompiledKernel

MANIFEST = "manifest.json"
LIBRARY = "lib.so"
OBJECTS = "lib.tar"
WEIGHTS = "weights.safetensors"
CHANNELS = "channels.safetensors"
TOKENIZER = "tokenizer.json"
PLAN = "plan.json"
SOURCE = "kernels.cu"

HOW_TO_RUN_ON_GPU = (
    "that takes an NVIDIA GPU, a build of TVM's runtime with CUDA and a host program that keeps its tensors there; "
    f"`Runner` runs on processors. {SOURCE} is the source of the kernels."
)

_SAMPLED = 64 * 2**20
_SAMPLE = 4096
_SAMPLES = 256


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk.

    Attributes:
        path: The directory.
        manifest: What it says of itself.
    """

    path: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The compiled kernels and functions."""
        return self.path / LIBRARY

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if the checkpoint had one."""
        return Tokenizer.load(self.path) if TOKENIZER in self.manifest.files else None

    @cached_property
    def plan(self) -> Plan:
        """Which kernel serves each matmul at which sizes, and why."""
        path = self.path / PLAN
        return Plan.from_json(path.read_text(encoding="utf-8"), str(path))

    @cached_property
    def channels(self) -> Mapping[str, npt.NDArray[Any]]:
        """By parameter, for matrices whose columns are some factors times the checkpoint's: the factors, f32 [K].

        What these matrices read is so much smaller; see `relax_llm.compiler.equalize`.
        """
        from relax_llm.artifact import channels

        return channels.read(self.path / CHANNELS) if CHANNELS in self.manifest.files else {}

    @cached_property
    def kernels(self) -> KernelList:
        """Every kernel that the model launches, with its problem, sites and costs; shown as a table."""
        return kernel_uses(self.manifest)

    def check_machine(self) -> None:
        """Refuse to run what was made for another machine, where it was opened all the same.

        Raises:
            ArtifactError: Another TVM or processor is needed, or a GPU.
        """
        _check_machine(self.path, self.manifest)

    def check_kernels(self) -> None:
        """Refuse to run without the kernels written in Python that it calls.

        Raises:
            ArtifactError: One was not given to `load`.
        """
        require(self.manifest.python_kernels, str(self.path))

    @cached_property
    def listings(self) -> Listings:
        """What every function of the library was made from and into.

        Raises:
            ArtifactError: It was compiled by a version that kept none.
        """
        if LISTINGS not in self.manifest.files:
            raise ArtifactError(f"{self.path} has no listings of its kernels; compile the artifact again.")
        return Listings(self.path / LISTINGS)

    def listing(self, name: str) -> Listing:
        """What a function was made from and into: its source, TVMScript, LLVM IR and assembly.

        Args:
            name: Its symbol, as the manifest, `launch.symbol` and the listings themselves name it.

        Raises:
            InputError: There is no function of this name; those there are are listed.
            ArtifactError: The listings cannot be read.
        """
        return self.listings[name]

    def kernel(
        self, name: str | None = None, *, site: str | None = None, operator: str | None = None, **sizes: int
    ) -> "CompiledKernel":
        """A kernel on its own, to call with arrays of yours.

        ::

            kernel = artifact.kernel("tiled", site="layers.3.mlp.down_proj")
            out = kernel(*kernel.random(M=17))

        Args:
            name: What the plan calls it, or a symbol of the library; by default the one that the plan has, by size.
            site: A place in the model; needed where several places have a kernel of this name.
            operator: What is computed there, where that is more than one thing.
            sizes: Only a kernel that serves these; without a name, the one that the plan has for them.

        Raises:
            InputError: There is none, or more than one; they are listed.
            ArtifactError: It cannot run here.
        """
        from relax_llm.runtime.kernel import kernel_of

        return kernel_of(self, name, site, operator, sizes)

    def weights(self, *, mapped: bool | None = None) -> list[npt.NDArray[Any]]:
        """The packed weights in the order of the functions' argument; see `relax_llm.artifact.weights.read`."""
        return weights.read(self.path / WEIGHTS, self.manifest.weights, mapped=mapped)

    def save(self, directory: str | os.PathLike[str], *, python_kernels: bool = False) -> "Artifact":
        """Copy the artifact to a directory of yours.

        Args:
            directory: A new or empty directory, or one that holds an artifact, which is replaced.
            python_kernels: Save although it calls kernels written in Python, which are not in it: whoever loads it must
                give kernels of the same names, `relax_llm.load(directory, kernels=[...])`.

        Raises:
            ArtifactError: The directory holds something else, or cannot be written; or the artifact calls kernels
                written in Python, and `python_kernels` is not said.
        """
        if self.manifest.python_kernels and not python_kernels:
            names = ", ".join(dict.fromkeys(python.kernel for python in self.manifest.python_kernels))
            raise ArtifactError(
                f"The artifact calls kernels written in Python ({names}), which cannot be saved; write them as "
                "TVMScript or C, or save with python_kernels=True and give them by name to "
                "relax_llm.load(..., kernels=[...])."
            )
        target = Path(directory)
        if target.resolve() == self.path.resolve():
            return self
        with replacing(target) as temporary:
            linked = (
                self.library.is_file() and LIBRARY not in self.manifest.files
            )  # by the user, from the objects
            for name in [MANIFEST, *self.manifest.files, *([LIBRARY] if linked else [])]:
                weights.copy(self.path / name, temporary / name)
        return Artifact(target, self.manifest)


def load(
    directory: str | os.PathLike[str], *, kernels: Sequence[Kernel] = (), for_this_machine: bool = True
) -> Artifact:
    """Open an artifact and check that it is whole and made for this machine.

    Args:
        directory: Where it is.
        kernels: Kernels written in Python that the artifact calls by name.
        for_this_machine: Refuse what this processor cannot run; else it may be looked at and copied.

    Raises:
        ArtifactError: A file is missing or changed, or another TVM or processor is needed.
    """
    path = Path(directory)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        hint = "the directory does not exist" if not path.exists() else f"it has no {MANIFEST}"
        raise ArtifactError(
            f"{path} is not an artifact: {hint}. Make one with `relax-llm compile CHECKPOINT -o DIR`."
        )
    manifest = Manifest.from_json(
        manifest_path.read_text(encoding="utf-8", errors="replace"), str(manifest_path)
    )
    if for_this_machine:
        _check_machine(path, manifest)
    unlinked = OBJECTS in manifest.files
    if unlinked and for_this_machine and not (path / LIBRARY).is_file():
        raise ArtifactError(
            f"{path} was compiled where no linker for {manifest.target} was installed, so its code is objects only; "
            f"{how_to_link(manifest.target)}"
        )
    for name in (OBJECTS if unlinked else LIBRARY, WEIGHTS):
        if name not in manifest.files:
            raise ArtifactError(f"{manifest_path} does not list {name}; compile the artifact again.")
    for name, expected in manifest.files.items():
        file = path / name
        if Path(name).name != name:
            raise ArtifactError(f"{manifest_path}: the file name {name!r} points outside the artifact.")
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; the artifact is incomplete, compile it again.")
        if describe(file) != expected:
            raise ArtifactError(f"{file} has changed since the artifact was made; compile it again.")
    register_given(manifest.python_kernels, kernels)
    return Artifact(path, manifest)


def how_to_link(architecture: str) -> str:
    """What to do with an artifact's objects, as a sentence."""
    return (
        f"link them in its directory, on {architecture}: "
        f"`mkdir objects && tar xf {OBJECTS} -C objects && g++ -shared -o {LIBRARY} objects/*.o`."
    )


def versions() -> dict[str, str]:
    """The versions that an artifact depends on."""
    return {name: metadata.version(name) for name in ("relax-llm", "apache-tvm", "apache-tvm-ffi")}


def _check_machine(path: Path, manifest: Manifest) -> None:
    for name in ("apache-tvm", "apache-tvm-ffi"):
        made, here = manifest.versions.get(name), metadata.version(name)
        if made != here:
            raise ArtifactError(
                f"{path} was compiled with {name} {made}, but {here} is installed; compile it again."
            )
    missing = sorted(set(manifest.features) - cpu.features()) if cpu.features() else []
    if manifest.target == "cuda":
        raise ArtifactError(f"{path} was compiled for cuda and cannot run here: {HOW_TO_RUN_ON_GPU}")
    family = "x86_64" if manifest.target.startswith("x86-64") else manifest.target
    if family != cpu.architecture():
        raise ArtifactError(
            f"{path} was compiled for {manifest.target}, but this processor is {cpu.architecture()}."
        )
    if missing:
        raise ArtifactError(
            f"{path} was compiled for {manifest.target}; this processor lacks {', '.join(missing)}. "
            "Compile it again here, or with a lower --target."
        )


def describe(file: Path) -> File:
    """Size and digest of a file; of files over 64 MiB the digest covers 256 samples and both ends."""
    size = file.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        if size <= _SAMPLED:
            digest.update(stream.read())
        else:
            for i in range(_SAMPLES):
                stream.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return File(size, digest.hexdigest())


def finish(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a directory that holds all other files."""
    files = {file.name: describe(file) for file in sorted(directory.iterdir()) if file.name != MANIFEST}
    (directory / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place at the end, or vanishes when something fails.

    Raises:
        ArtifactError: `target` holds something that is not an artifact, or the disk refuses.
    """
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file; an artifact is a directory.")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise ArtifactError(
            f"{target} holds something that is not an artifact; choose another or an empty directory."
        )
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / "artifact")
        temporary.rename(target)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
