"""Taking launches down while a model runs: what went in, what came out, and what they were."""

import hashlib
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.artifact import Artifact
from relax_llm.errors import InputError, RecordingError
from relax_llm.plan.plan import parts_of
from relax_llm.runtime.breakpoints import kernels_of
from relax_llm.runtime.control import Line
from relax_llm.runtime.kernel import argument_names
from relax_llm.runtime.launch import Launch, Operand
from relax_llm.runtime.recording.file import LIMIT, Made, Origin, Taken, Writer
from relax_llm.runtime.stepper import Steps

Array = npt.NDArray[Any]

_WEIGHTS = ("reference", "values")
_SAMPLED = 64 * 2**20
_SAMPLE = 4096
_SAMPLES = 256


class Recording:
    """A recording that is being made.

    Attributes:
        path: The file that it becomes.
        launches: What has been recorded so far.
    """

    def __init__(
        self,
        artifact: Artifact,
        path: str | os.PathLike[str],
        *,
        site: str = "*",
        kernel: str = "*",
        operator: str = "*",
        weights: str = "reference",
        limit: int = LIMIT,
        lines: Iterable[Line] | None = None,
    ) -> None:
        """Begin; made by `Runner.recording` and `Launch.record`.

        Args:
            artifact: What is run.
            path: Where the file goes.
            site: Pattern of sites; one that was fused answers to its parts.
            kernel: Pattern of kernels.
            operator: Pattern of operators.
            weights: "reference": by name and digest; "values": in the file, each once.
            limit: The most bytes of tensors.
            lines: The launches that there can be; one must match. None: they are not looked at.

        Raises:
            InputError: No launch can match, or an option is not known.
            RecordingError: The file cannot be written.
        """
        if weights not in _WEIGHTS:
            raise InputError(f'weights must be "reference" or "values", not {weights!r}.')
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InputError(f"limit must be a positive whole number of bytes, not {limit!r}.")
        self.path = Path(path)
        self.launches: list[Made] = []
        self._artifact = artifact
        self._site, self._kernel, self._operator = site, kernel, operator
        self._by_value = weights == "values"
        self._calls = 0
        self._digests: dict[str, str] = {}
        if lines is not None:
            self._check(lines)
        self._writer = Writer(self.path, limit)

    def matches(self, site: str, operator: str) -> bool:
        """Whether launches of a site may be among those to record."""
        return fnmatchcase(operator, self._operator) and any(
            fnmatchcase(part, self._site) for part in parts_of(site)
        )

    def run(self, launch: Launch) -> None:
        """Make a launch and record it, if its kernel is one of those.

        Raises:
            RecordingError: The limit is reached, or the disk is full.
        """
        if not fnmatchcase(launch.kernel, self._kernel):
            return
        names = argument_names(self._artifact, launch.symbol)
        where = f"{self._calls}.{launch.function}.{launch.index}.{launch.site}"
        taken, kept = [], []
        for name, operand in zip(names, launch.arguments, strict=True):
            taken.append(self._before(f"{where}.{name}", name, operand))
            kept.append(operand.value.copy() if operand.role in ("activation", "cache") else None)
        launch.run()
        arguments = [
            self._after(f"{where}.{one.name}", one, operand.value, before, launch.operator)
            for one, operand, before in zip(taken, launch.arguments, kept, strict=True)
        ]
        self.launches.append(
            Made(
                self._calls,
                launch.function,
                launch.index,
                launch.site,
                launch.operator,
                launch.kernel,
                launch.symbol,
                launch.done,
                dict(launch.sizes),
                tuple(arguments),
            )
        )

    def ended(self) -> None:
        """Count a call."""
        self._calls += 1

    def finish(self, *, required: bool = True) -> None:
        """Write the file.

        Args:
            required: Whether it is an error that nothing was recorded.

        Raises:
            RecordingError: There is nothing to write, or it cannot be written.
        """
        if not self.launches:
            self._writer.close()
            if not required:
                return
            raise RecordingError(
                f"Nothing was recorded: no launch of {self._kernel!r} at {self._site!r} was made; {self.path} is not "
                "written."
            )
        self._writer.finish(_origin(self._artifact), self.launches)

    def __str__(self) -> str:
        return (
            f"{len(self.launches)} launches, {self._writer.nbytes / 1e6:,.1f} MB of tensors, in {self.path}"
        )

    def _before(self, place: str, name: str, operand: Operand) -> Taken:
        if operand.role == "size":
            return Taken(name, "size", "int64", value=int(operand.value))
        array: Array = operand.value
        common = name, operand.role, str(array.dtype), array.shape
        if operand.role == "output":
            return Taken(*common)
        if operand.role != "weight":
            return Taken(*common, before=self._writer.put(f"{place}.before", array))
        if operand.name not in self._digests:
            self._digests[operand.name] = digest(array)
        held = self._writer.put(f"weight.{operand.name}", array) if self._by_value else ""
        return Taken(*common, before=held, weight=operand.name, digest=self._digests[operand.name])

    def _after(self, place: str, one: Taken, value: Any, before: Array | None, operator: str) -> Taken:
        """What a launch has written; a cache that grew, even if memory used before held the same already."""
        written = one.role == "output" or (one.role == "cache" and operator == "append")
        if written or (before is not None and value.tobytes() != before.tobytes()):
            fields = {**vars(one), "after": self._writer.put(f"{place}.after", value)}
            return Taken(**fields)
        return one

    def _check(self, lines: Iterable[Line]) -> None:
        places = list(dict.fromkeys(at for line in lines for _, at in line.launches))
        there = [at for at in places if self.matches(at.site, at.operator)]
        if not there:
            what = "launch" if self._operator == "*" else repr(self._operator)
            sites = ", ".join(list(dict.fromkeys(at.site for at in places))[:5])
            raise InputError(f"There is no {what} at {self._site!r} to record; sites are named like {sites}.")
        known = list(dict.fromkeys(name for at in there for name in kernels_of(at)))
        if not any(fnmatchcase(name, self._kernel) for name in known):
            raise InputError(
                f"No kernel {self._kernel!r} serves {self._site!r}; there are: {', '.join(known)}."
            )


def recorded(steps: Steps, recording: Recording) -> Array:
    """Make all launches of a call, and record those that are wanted; the result of the call."""
    with steps:
        for launch in steps:
            if recording.matches(launch.site, launch.operator):
                recording.run(launch)
        recording.ended()
        return steps.logits


def digest(array: Array) -> str:
    """A digest of a tensor's bytes; of those over 64 MiB it covers 256 samples."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    made = hashlib.blake2b(digest_size=16)
    if data.nbytes <= _SAMPLED:
        made.update(data.data)
    else:
        for index in range(_SAMPLES):
            at = index * (data.nbytes - _SAMPLE) // (_SAMPLES - 1)
            made.update(data[at : at + _SAMPLE].data)
    return made.hexdigest()


def _origin(artifact: Artifact) -> Origin:
    manifest = artifact.manifest
    made = hashlib.blake2b(manifest.to_json().encode(), digest_size=16).hexdigest()
    return Origin(str(artifact.path.resolve()), made, manifest.target, dict(manifest.versions))
