"""Recorded launches, made again: alone, timed, checked against what was recorded, with other kernels."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.artifact import Artifact, load
from relax_llm.artifact.implementations import find, implementations
from relax_llm.errors import ArtifactError, InputError, RecordingError
from relax_llm.numerics.difference import Difference, difference
from relax_llm.plan.kernel import AXES
from relax_llm.runtime.kernel import CompiledKernel, kernel_codes, stored_weights
from relax_llm.runtime.recording import file
from relax_llm.runtime.recording.file import Contents, Made, Origin
from relax_llm.runtime.recording.recorder import digest

Array = npt.NDArray[Any]
Other = str | Callable[..., Any] | None
"""A kernel's name; a function of the inputs that returns the outputs; None: the kernel that was recorded."""


@dataclass(frozen=True)
class Checked:
    """How far what a launch gives now is from what was recorded.

    Attributes:
        launch: The launch.
        kernel: What computed it now.
        differences: For each output, and each cache that was written, by name.
        equal: Whether all bits are the same.
    """

    launch: "RecordedLaunch"
    kernel: str
    differences: Mapping[str, Difference]
    equal: bool

    @property
    def max_abs(self) -> float:
        """The largest difference."""
        return max(found.max_abs for found in self.differences.values())

    @property
    def ulp(self) -> float:
        """The largest number of float32 numbers between two values."""
        return max(found.ulp for found in self.differences.values())

    def __str__(self) -> str:
        if self.equal:
            return f"{self.launch.title} by {self.kernel}: equal bit for bit"
        worst = max(self.differences.values(), key=lambda found: found.max_abs)
        where = next(name for name, found in self.differences.items() if found is worst)
        return (
            f"{self.launch.title} by {self.kernel}: off by at most {self.max_abs:.3g} ({self.ulp:,.0f} ULP), "
            f"{where}{list(worst.index)} is {worst.value:.9g} and was {worst.reference:.9g}"
        )


class RecordedLaunch:
    """One launch of a recording.

    Attributes:
        made: What the file says of it.
        function: What was called.
        site: Where in the model.
        operator: What is computed.
        kernel: What computed it.
        sizes: Its sizes.
    """

    def __init__(self, replay: "Replay", made: Made) -> None:
        """Made by `replay`."""
        self.made = made
        self.function, self.site, self.operator = made.function, made.site, made.operator
        self.kernel, self.sizes = made.kernel, made.sizes
        self._replay = replay

    @property
    def artifact(self) -> Artifact:
        """The artifact that was recorded."""
        return self._replay.artifact

    @property
    def title(self) -> str:
        """Its place: the call, the function, the index and the site."""
        return f"{self.made.call}:{self.function}[{self.made.index}] {self.site}"

    @cached_property
    def results(self) -> Mapping[str, Array]:
        """What it wrote, by the arguments' names: outputs, and caches where they grew."""
        tensors = self._replay.contents.tensors
        return {one.name: tensors[one.after] for one in self.made.arguments if one.after}

    def inputs(self, artifact: Artifact | None = None) -> dict[str, Any]:
        """What went in, by the arguments' names: tensors, and numbers for sizes. What grows in place is a copy.

        Args:
            artifact: Has the weights that are not in the recording; by default the one recorded.

        Raises:
            RecordingError: A weight is another than was recorded.
            ArtifactError: The artifact that was recorded is not there any more.
        """
        found: dict[str, Any] = {}
        for one in self.made.arguments:
            if one.role == "size":
                found[one.name] = one.value
            elif one.before:
                tensor = self._replay.contents.tensors[one.before]
                found[one.name] = tensor.copy() if one.after else tensor
            elif one.role == "weight":
                found[one.name] = self._weight(one, artifact or self._replay.artifact)
        return found

    def run(self, artifact: Artifact | None = None, *, kernel: Other = None) -> Mapping[str, Array]:
        """Make it again.

        Args:
            artifact: Whose kernel runs; by default the one recorded.
            kernel: Another kernel of the artifact by name, or a function of the inputs that returns the outputs.

        Returns:
            What it wrote, as `results`.

        Raises:
            InputError: The artifact has no such kernel there, or what a function returns does not fit.
            RecordingError: A weight is another than was recorded.
            ArtifactError: The artifact cannot run here, or is not there any more.
        """
        inputs = self.inputs(artifact)
        if callable(kernel):
            outputs = self._fitting(kernel(*self._arrays(inputs)))
        else:
            compiled = self.compiled(artifact, kernel)
            given = compiled(*inputs.values(), *self._outputs())
            outputs = given if isinstance(given, tuple) else (given,)
        names = [one.name for one in self.made.arguments if one.role == "output"]
        return {
            name: array
            for name, array in {**inputs, **dict(zip(names, outputs, strict=True))}.items()
            if name in self.results
        }

    def check(self, artifact: Artifact | None = None, *, kernel: Other = None) -> Checked:
        """Make it again, and compare with what was recorded; arguments and errors are those of `run`."""
        found = self.run(artifact, kernel=kernel)
        differences = {name: difference(found[name], was) for name, was in self.results.items()}
        equal = all(found[name].tobytes() == was.tobytes() for name, was in self.results.items())
        return Checked(self, self._name(kernel), differences, equal)

    def time(
        self, artifact: Artifact | None = None, *, kernel: Other = None, repeat: int = 20, cold: bool = False
    ) -> float:
        """Time it; arguments and errors are those of `run` and `CompiledKernel.time`.

        Returns:
            The median in seconds.
        """
        inputs = self.inputs(artifact)
        if not callable(kernel):
            return self.compiled(artifact, kernel).time(
                *inputs.values(), *self._outputs(), repeat=repeat, cold=cold
            )
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise InputError(f"repeat must be a positive whole number, not {repeat!r}.")
        seconds = []
        for _ in range(repeat + 1):
            begun = time.perf_counter()
            kernel(*self._arrays(inputs))
            seconds.append(time.perf_counter() - begun)
        return median(seconds[1:])

    def compiled(self, artifact: Artifact | None = None, kernel: str | None = None) -> CompiledKernel:
        """The kernel of an artifact that computes this launch, to call with arrays of yours.

        Args:
            artifact: Whose; by default the one recorded.
            kernel: Its name; by default the one that was recorded.

        Raises:
            InputError: There is none of this name that serves these sizes; those there are are listed.
        """
        artifact = artifact or self._replay.artifact
        manifest = artifact.manifest
        name = kernel or self.kernel
        known = implementations(manifest, artifact.plan, kernel_codes(artifact))
        same = [one for one in known if one.symbol == self.made.symbol and one.is_at(self.site)]
        axes = {axis: self.sizes[axis] for axis in AXES.get(self.operator, ())}
        return CompiledKernel(artifact, find(same or known, manifest, name, self.site, self.operator, axes))

    def repro(self, directory: str | os.PathLike[str], artifact: Artifact | None = None) -> Path:
        """Write a directory with which this launch can be made by anyone who has TVM, without this package.

        Args:
            directory: A new or empty one, or an earlier repro, which is replaced.
            artifact: Has the listings, and the weights that are not in the recording; by default the one recorded.

        Returns:
            The script to run in it.

        Raises:
            RecordingError: The kernel cannot do without this package, or the directory cannot be written.
        """
        from relax_llm.runtime.recording.repro import write_repro

        return write_repro(self, directory, artifact)

    @property
    def shown_sizes(self) -> str:
        """The sizes that its kernel is chosen by, as text."""
        axes = AXES.get(self.operator, ())
        return ", ".join(f"{axis} = {self.sizes[axis]}" for axis in axes if axis in self.sizes)

    def __str__(self) -> str:
        return f"{self.title}: {self.operator} by {self.kernel} ({self.shown_sizes})"

    def __repr__(self) -> str:
        return f"<recorded {self}>"

    def _name(self, kernel: Other) -> str:
        return str(getattr(kernel, "__name__", "a function")) if callable(kernel) else kernel or self.kernel

    def _arrays(self, inputs: Mapping[str, Any]) -> list[Array]:
        return [value for value in inputs.values() if isinstance(value, np.ndarray)]

    def _outputs(self) -> list[Array]:
        return [np.zeros(one.shape, one.dtype) for one in self.made.arguments if one.role == "output"]

    def _fitting(self, returned: Any) -> tuple[Array, ...]:
        outputs = self._outputs()
        results = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        arrays = tuple(np.asarray(result) for result in results)
        if [(a.shape, a.dtype) for a in arrays] != [(a.shape, a.dtype) for a in outputs]:
            wanted = ", ".join(f"{one.dtype} of shape {one.shape}" for one in outputs)
            found = ", ".join(f"{one.dtype} of shape {one.shape}" for one in arrays) or "nothing"
            raise InputError(f"What replaces the kernel of {self.title} must return {wanted}, not {found}.")
        return arrays

    def _weight(self, one: file.Taken, artifact: Artifact) -> Array:
        found: Array | None = stored_weights(artifact).get(one.weight)
        if found is None or self._replay.digest(artifact, one.weight, found) != one.digest:
            wrong = "is not there" if found is None else "is another"
            raise RecordingError(
                f"{self._replay.path} holds {one.weight} by reference, and in {artifact.path} it {wrong}. Replay with "
                f'{self._replay.origin.artifact}, or record with weights="values".'
            )
        return found


class Replay(Sequence[RecordedLaunch]):
    """The launches of a recording, in the order in which they were made.

    Attributes:
        path: The file.
        contents: What is in it.
    """

    def __init__(self, path: Path) -> None:
        """Made by `replay`."""
        self.path = path
        self.contents: Contents = file.read(path)
        self._launches = [RecordedLaunch(self, made) for made in self.contents.launches]
        self._digests: dict[tuple[str, str], str] = {}

    @property
    def origin(self) -> Origin:
        """What was recorded."""
        return self.contents.origin

    @cached_property
    def artifact(self) -> Artifact:
        """The artifact that was recorded.

        Raises:
            ArtifactError: It is not there any more.
        """
        try:
            return load(self.origin.artifact)
        except ArtifactError as error:
            raise ArtifactError(
                f"The artifact that {self.path} was recorded from cannot be opened; name another. {error}"
            ) from error

    def check(self, artifact: Artifact | None = None, *, kernel: Other = None) -> list[Checked]:
        """Make every launch again, and compare; arguments and errors are those of `RecordedLaunch.run`."""
        return [launch.check(artifact, kernel=kernel) for launch in self]

    def at(self, site: str) -> list[RecordedLaunch]:
        """The launches of a site.

        Raises:
            InputError: There are none.
        """
        found = [launch for launch in self if launch.site == site]
        if not found:
            sites = ", ".join(dict.fromkeys(launch.site for launch in self))
            raise InputError(f"{self.path} has no launch of {site!r}; it has {sites}.")
        return found

    def digest(self, artifact: Artifact, name: str, weight: Array) -> str:
        """The digest of an artifact's weight, worked out once."""
        key = str(artifact.path.resolve()), name
        if key not in self._digests:
            self._digests[key] = digest(weight)
        return self._digests[key]

    @overload
    def __getitem__(self, index: int) -> RecordedLaunch: ...
    @overload
    def __getitem__(self, index: slice) -> list[RecordedLaunch]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._launches[index]

    def __len__(self) -> int:
        return len(self._launches)

    def __iter__(self) -> Iterator[RecordedLaunch]:
        return iter(self._launches)

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def __repr__(self) -> str:
        return f"<recording {self.path}: {len(self)} launches>"


def replay(path: str | os.PathLike[str]) -> Replay:
    """Open a recording.

    ::

        for launch in rl.replay("down_proj.rec"):
            print(launch.check(artifact, kernel="blocked"), launch.time(artifact))

    Args:
        path: A file that `runner.recording`, `launch.record` or `relax-llm record` wrote.

    Raises:
        RecordingError: It is none, is truncated or damaged.
    """
    return Replay(Path(path))
