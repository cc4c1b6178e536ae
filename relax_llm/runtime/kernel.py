"""A kernel of an artifact on its own: called with your arrays, or random ones, at any sizes."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import prod
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.implementations import Implementation, find, implementations
from relax_llm.artifact.listings import Listing
from relax_llm.artifact.memory import aligned
from relax_llm.errors import ArtifactError, InputError
from relax_llm.plan.kernel import AXES
from relax_llm.plan.plan import parts_of
from relax_llm.plan.sizes import Box
from relax_llm.runtime import vm
from relax_llm.runtime.code import HasCode
from relax_llm.runtime.dispatch import OPEN, choosing
from relax_llm.runtime.parameters import (
    Parameter,
    bind,
    check_values,
    complete,
    filled,
    is_flat,
    placed,
    signature,
)

Array = npt.NDArray[Any]

_CACHE_SPILL = 2**27  # bytes; more than the last-level cache of most machines


class CompiledKernel(HasCode):
    """A kernel of an artifact, to call. Everything it is given is looked at first.

    Attributes:
        artifact: Whose it is.
        name: What the plan calls it; of a dispatcher, which takes the plan's kernel at each size, the symbol.
        symbol: What the model calls; a dispatcher where there is a choice.
        operator: What it computes.
        problem: The fields of the problem it solves.
        sites: The places in the model where it can serve.
        sizes: What it is valid for.
        arguments: What it takes, outputs last.
    """

    def __init__(self, artifact: Artifact, found: Implementation) -> None:
        """Made by `Artifact.kernel`."""
        artifact.check_machine()
        artifact.check_kernels()
        self.artifact = artifact
        self.name = found.kernel
        self.symbol = found.symbol
        self.operator = found.operator
        self.problem: Mapping[str, Any] = artifact.manifest.kernels[found.symbol].problem
        self.sites = found.sites
        self.sizes: Box = found.sizes
        self.arguments = _parameters(artifact, found)
        self._found = found

    def __call__(self, *arguments: Any) -> Any:
        """Launch it.

        Args:
            arguments: NumPy arrays, and numbers for sizes, in the order of `arguments`; [M, K] will do for [batch, seq,
                K]. The outputs may be left out. Arrays that do not lie as compiled code needs it, at multiples of 64
                bytes and in one piece, are copied, and back.

        Returns:
            The output, or several in a tuple.

        Raises:
            InputError: There are too few or too many, one has another type or shape, or the kernel does not serve these
                sizes.
        """
        values = self._bound(arguments)
        tensors = self._placed(values)
        with self._chosen():
            self._function(*_passed(tensors))
        for one, value, used in zip(self.arguments, values, tensors, strict=True):
            if one.written and used is not value:
                value[...] = used
        count = sum(one.role == "output" for one in self.arguments)
        inputs = len(values) - count
        outputs = list(arguments[inputs:]) or values[inputs:]
        if len(arguments) == inputs and is_flat(self.arguments, arguments):
            outputs = [output.reshape(-1, *output.shape[2:]) for output in outputs]
        return outputs[0] if count == 1 else tuple(outputs)

    def random(self, seed: int = 0, **sizes: int) -> tuple[Any, ...]:
        """Arguments for one launch: random activations, weights and caches, zeroed outputs.

        Weights in a format that NumPy has no numbers for are those of the first site.

        Args:
            seed: Of the random numbers.
            sizes: M for batch * seq, or batch, seq and kv_len; what is not named is as small as it can be.

        Raises:
            InputError: The kernel has no such size.
        """
        known = complete(self.arguments, sizes, AXES.get(self.operator, ()))
        rng = np.random.default_rng(seed)
        own = iter(self.weights(self.sites[0]))
        made: list[Any] = []
        for one in self.arguments:
            stored = next(own) if one.role == "weight" else None
            if one.role == "size":
                made.append(known[one.name])
            elif stored is not None and stored.dtype.kind in "iu":
                made.append(stored)
            else:
                made.append(filled(one, known, self.problem, rng))
        return tuple(made)

    def time(self, *arguments: Any, repeat: int = 20, cold: bool = False) -> float:
        """Time launches on the same arguments, which are left as they are.

        Args:
            arguments: As for a call.
            repeat: How often it is launched.
            cold: Whether to clear the caches before each launch, as far as reading other memory does.

        Returns:
            The median in seconds.

        Raises:
            InputError: As for a call; or repeat is not positive.
        """
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise InputError(f"repeat must be a positive whole number, not {repeat!r}.")
        values = self._bound(arguments)
        kept = [
            value.copy() if one.written else value for one, value in zip(self.arguments, values, strict=True)
        ]
        tensors = self._placed(kept)
        passed = _passed(tensors)
        other = np.ones(_CACHE_SPILL // 8) if cold else None
        seconds = []
        with self._chosen():
            self._function(*passed)
            for _ in range(repeat):
                if other is not None:
                    other.sum()
                begun = time.perf_counter()
                self._function(*passed)
                seconds.append(time.perf_counter() - begun)
        return median(seconds)

    def weights(self, site: str) -> tuple[Array, ...]:
        """All weights of a site, packed as this kernel reads them: the matrix, then a bias.

        Raises:
            InputError: The kernel does not serve there.
        """
        for launch in self._found.launches:
            if site in parts_of(launch.site):
                stored = _opened(self.artifact).weights
                return tuple(stored[said.name] for said in launch.arguments if said.role == "weight")
        raise InputError(f"The {self} does not serve {site!r}; it serves {', '.join(self.sites[:5])}.")

    def weight(self, site: str) -> Array:
        """The weight of a site, packed as this kernel reads it.

        Raises:
            InputError: The kernel does not serve there, or takes no weight.
        """
        found = self.weights(site)
        if not found:
            raise InputError(f"The {self} takes no weight.")
        return found[0]

    @property
    def index(self) -> int | None:
        """Its index among the kernels of the dispatcher that the model calls; None where the model calls it."""
        return self._found.index

    @property
    def listing(self) -> Listing:
        """What it was made from and into."""
        return self.artifact.listing(self._found.code)

    def __str__(self) -> str:
        return f"kernel {self.name}" if self._found.index is None else f"kernel {self.name} of {self.symbol}"

    def __repr__(self) -> str:
        return f"<kernel {self._found}: {signature(self.arguments)}>"

    @cached_property
    def _function(self) -> Any:
        symbol = self.symbol if self._found.index is None else self.symbol + OPEN
        return _opened(self.artifact).machine.kernel(symbol)

    def _chosen(self) -> AbstractContextManager[None]:
        return nullcontext() if self._found.index is None else choosing(self._found.index)

    def _bound(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments, looked at, with new outputs where none are given."""
        inputs = [one for one in self.arguments if one.role != "output"]
        if len(arguments) == len(inputs):
            values, sizes = bind(inputs, arguments, str(self))
            values += [aligned(one.at(sizes), one.dtype) for one in self.arguments[len(inputs) :]]
        else:
            values, sizes = bind(self.arguments, arguments, str(self))
        check_values(self.arguments, values, sizes, self.problem, str(self))
        axes = AXES.get(self.operator, ())
        known = {"batch": 1, **sizes}
        if "M" in axes:
            known["M"] = prod(values[-1].shape[:-1])
        if known not in self.sizes:
            asked = ", ".join(f"{axis} = {known[axis]}" for axis in axes)
            raise InputError(f"The {self} serves {self.sizes}, not {asked}.")
        return values

    def _placed(self, values: Sequence[Any]) -> list[Any]:
        return [
            value if one.role == "size" else placed(one, value)
            for one, value in zip(self.arguments, values, strict=True)
        ]


def kernel_of(
    artifact: Artifact, name: str | None, site: str | None, operator: str | None, sizes: Mapping[str, int]
) -> CompiledKernel:
    """See `Artifact.kernel`."""
    manifest = artifact.manifest
    known = implementations(manifest, artifact.plan, kernel_codes(artifact))
    return CompiledKernel(artifact, find(known, manifest, name, site, operator, sizes))


@dataclass(frozen=True)
class _Opened:
    """An artifact's library and weights, loaded."""

    machine: vm.VirtualMachine
    weights: Mapping[str, Array]


_MOST_OPEN = 4

_open: dict[tuple[str, int, int], _Opened] = {}


def _opened(artifact: Artifact) -> _Opened:
    """The library and the weights, kept for the next kernel of the same artifact."""
    status = artifact.library.stat()
    key = str(artifact.library.resolve()), status.st_ino, status.st_mtime_ns
    if key not in _open:
        for oldest in list(_open)[: len(_open) + 1 - _MOST_OPEN]:
            del _open[oldest]
        names = (weight.name for weight in artifact.manifest.weights)
        weights = dict(zip(names, artifact.weights(), strict=True))
        _open[key] = _Opened(vm.VirtualMachine(artifact.library), weights)
    return _open[key]


def stored_weights(artifact: Artifact) -> Mapping[str, Array]:
    """The weights by name, mapped into memory."""
    return _opened(artifact).weights


def kernel_codes(artifact: Artifact) -> Mapping[str, Mapping[str, str]]:
    """For each dispatcher the symbols of its kernels' code; nothing where the artifact has no listings."""
    try:
        return artifact.listings.index.kernels
    except ArtifactError:  # it has no listings, and its kernels run all the same
        return {}


def _parameters(artifact: Artifact, found: Implementation) -> tuple[Parameter, ...]:
    launch = found.example
    return tuple(
        Parameter(
            name,
            said.role,
            said.shape,
            said.dtype,
            said.role == "output" or (said.role == "cache" and found.operator == "append"),
        )
        for name, said in zip(argument_names(artifact, found.symbol), launch.arguments, strict=True)
    )


def argument_names(artifact: Artifact, symbol: str) -> list[str]:
    """What a kernel that the model calls names its arguments; where the artifact has no listings, their roles."""
    launches = (launch for function in artifact.manifest.functions.values() for launch in function)
    arguments = next(launch.arguments for launch in launches if launch.kernel == symbol)
    try:
        return list(artifact.listing(symbol).parameters)
    except (ArtifactError, InputError):
        return [f"{said.role}{index}" for index, said in enumerate(arguments)]


def _passed(values: Sequence[Any]) -> list[Any]:
    return [vm.tensor(value) if isinstance(value, np.ndarray) else value for value in values]
