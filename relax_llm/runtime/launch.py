"""One launch of a kernel, in your hands: what it is called with, and what becomes of it."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.costs import Cost, cost, own_sizes
from relax_llm.artifact.listings import Listing
from relax_llm.errors import InputError
from relax_llm.plan.kernel import AXES
from relax_llm.runtime import vm
from relax_llm.runtime.choices import Fixed, Place
from relax_llm.runtime.code import HasCode
from relax_llm.runtime.counts import Key
from relax_llm.runtime.dispatch import OPEN, choosing
from relax_llm.runtime.execution import Execution
from relax_llm.runtime.recording.file import LIMIT
from relax_llm.runtime.replacement import Replacement, compute
from relax_llm.runtime.shown import launch_html

Array = npt.NDArray[Any]

_CACHE_SPILL = 2**27  # bytes; more than the last-level cache of most machines


@dataclass(frozen=True)
class Operand:
    """One argument of a launch.

    Attributes:
        role: "activation", "weight", "cache", "size" or "output".
        name: The weight's or cache's name; empty for activations.
        value: A view of the tensor's memory, to read and to write, or a number for a size. What it shows is good until
            the next launch: the memory is used again. Copy what you keep.
    """

    role: str
    name: str
    value: Any


class Launch(HasCode):
    """One launch of a kernel: about to be made, or made just now.

    Attributes:
        function: The function that makes it.
        index: Its place among the function's launches, from 0.
        site: The place in the model.
        operator: What is computed.
        symbol: The kernel's or its dispatcher's name in the library.
        done: "run", "skipped" or "replaced", and "" before.
        seconds: How long it took when it was made last; None before, and where it was skipped.
    """

    def __init__(self, execution: Execution, index: int, arguments: list[Any]) -> None:
        """Made by `Steps`."""
        self.function = execution.function
        self.index = index
        self.done = ""
        self.seconds: float | None = None
        self._execution = execution
        self._described, self._where = execution.knowledge.line.launches[index]
        self.site = self._where.site
        self.operator = self._where.operator
        self.symbol = self._described.kernel
        self._arguments = arguments

    @cached_property
    def arguments(self) -> tuple[Operand, ...]:
        """What the kernel is called with, outputs last."""
        return tuple(
            Operand(said.role, said.name, value if said.role == "size" else vm.view(value))
            for said, value in zip(self._described.arguments, self._arguments, strict=True)
        )

    @property
    def inputs(self) -> tuple[Array, ...]:
        """Views of all tensors but the outputs: activations, weights and caches, in the kernel's order."""
        return tuple(o.value for o in self.arguments if o.role not in ("size", "output"))

    @property
    def outputs(self) -> tuple[Array, ...]:
        """Views of the outputs. A kernel that works in place, as the cache's, may have more than these."""
        return tuple(o.value for o in self.arguments if o.role == "output")

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all tensors, outputs last."""
        return tuple(
            tuple(value.shape)
            for said, value in zip(self._described.arguments, self._arguments, strict=True)
            if said.role != "size"
        )

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The value of each symbolic size: batch, seq, kv_len, M where it has rows, and others of its tensors."""
        found = own_sizes(self.operator, self._described, self._execution.sizes)
        for said, value in zip(self._described.arguments, self._arguments, strict=True):
            shape = () if said.role == "size" else value.shape
            found |= {
                name: int(size) for name, size in zip(said.shape, shape, strict=True) if name.isidentifier()
            }
        return found

    @property
    def flops(self) -> float:
        """Operations of arithmetic."""
        return self._cost.flops

    @property
    def bytes(self) -> float:
        """Memory that must at least be moved."""
        return self._cost.bytes

    @property
    def kernel(self) -> str:
        """The name of the kernel that serves these sizes."""
        if isinstance(self._where, Fixed):
            return self._where.kernel
        return self._where.kernels[self._index][0]

    @property
    def why(self) -> str:
        """Why this kernel serves these sizes."""
        if isinstance(self._where, Fixed):
            return "it is the only kernel here"
        if not self._execution.knowledge.own:
            return "it is forced, pinned or wanted by another plan"
        for entry in self._execution.knowledge.plan.entries:
            if self.site in entry.sites and entry.operator == self.operator:
                for candidate in entry.candidates:
                    if candidate.kernel == self.kernel:
                        return candidate.reason
        return "the plan has it for these sizes"

    @property
    def kernels(self) -> tuple[str, ...]:
        """All kernels that can be launched here at these sizes."""
        if isinstance(self._where, Fixed):
            return (self._where.kernel,)
        return tuple(name for name, valid in self._where.kernels if self.sizes in valid)

    @property
    def listing(self) -> Listing:
        """What the kernel that serves these sizes was made from and into."""
        artifact = self._execution.knowledge.control.artifact
        kernels = artifact.listings.index.kernels.get(self.symbol, {})
        return artifact.listing(kernels.get(self.kernel, self.symbol))

    def record(self, path: str | os.PathLike[str], *, weights: str = "reference", limit: int = LIMIT) -> None:
        """Run it, and write what went in and what came out to a file, for `relax_llm.replay`.

        Args:
            path: The file.
            weights: "reference": by name and digest; "values": in the file.
            limit: The most bytes of tensors.

        Raises:
            InputError: It has been run already.
            RecordingError: The file cannot be written, or would exceed the limit.
        """
        from relax_llm.runtime.recording.recorder import Recording

        self._check_waiting()
        recording = Recording(self._execution.knowledge.control.artifact, path, weights=weights, limit=limit)
        recording.run(self)
        recording.finish()

    def run(self) -> None:
        """Launch the kernel, or what replaces it."""
        self._check_waiting()
        replacement = self._execution.replacement(self.index, lambda: self.kernels)
        if replacement is None:
            self.seconds = self._launch()
            self.done = "run"
        else:
            self._replace(replacement)

    def rerun(self) -> None:
        """Launch the kernel once more, on what the inputs hold now.

        Raises:
            InputError: It has not been launched, or the next launch has begun.
        """
        self._check_current()
        if not self.done:
            raise InputError(f"{self} has not been run; there is nothing to run again.")
        self.seconds = self._launch()

    def skip(self) -> None:
        """Launch nothing; the outputs keep what they hold, or what you put there."""
        self._check_waiting()
        self.done = "skipped"

    def replace(self, replacement: Replacement) -> None:
        """Have something else compute this launch, now.

        Args:
            replacement: The name of one of `kernels`, or a function of the `inputs` that returns the outputs: an array,
                or several in a tuple. Where there are no outputs it returns None, and writes into its inputs.

        Raises:
            InputError: No such kernel serves these sizes, or what is returned has another shape or type.
        """
        self._check_waiting()
        self._replace(replacement)

    def time(self, repeat: int = 20, *, cold: bool = False, kernel: Replacement | None = None) -> float:
        """Time the kernel in its place, on its inputs, and leave everything as it was.

        Args:
            repeat: How often it is launched.
            cold: Whether to clear the caches before each launch, as far as reading other memory does.
            kernel: Time this in its place: one of `kernels`, or a function as `replace` takes it. A kernel that is
                named is chosen by Python, which adds about a microsecond; name all that you compare.

        Returns:
            The median in seconds.

        Raises:
            InputError: The launch is over, no such kernel serves these sizes, or what a function returns does not fit.
        """
        self._check_current()
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise InputError(f"repeat must be a positive whole number, not {repeat!r}.")
        if isinstance(kernel, str):
            self._check_kernel(kernel)
        other = np.ones(_CACHE_SPILL // 8) if cold else None
        seconds = []
        with self._restored():
            self._timed(kernel)
            for _ in range(repeat):
                if other is not None:
                    other.sum()
                seconds.append(self._timed(kernel))
        return median(seconds)

    @contextmanager
    def trying(self, kernel: Replacement) -> Iterator[None]:
        """Have something else compute here; inside of a `with` its outputs are there, behind it all is as it was.

        Args:
            kernel: As for `replace`. It counts as nothing done.

        Raises:
            InputError: The launch is over, no such kernel serves these sizes, or what a function returns does not fit.
        """
        self._check_current()
        if isinstance(kernel, str):
            self._check_kernel(kernel)
        with self._restored():
            self._timed(kernel)
            yield

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Put back at the end what kernels may write: they may work in place on whatever is no weight."""
        changed = [o.value for o in self.arguments if o.role not in ("size", "weight")]
        kept = [array.copy() for array in changed]
        try:
            yield
        finally:
            for array, before in zip(changed, kept, strict=True):
                array[...] = before

    def fitting(self, returned: Any, what: str) -> tuple[Array, ...]:
        """What a function returned for the outputs, as arrays of their shapes and types.

        Args:
            returned: An array, several in a tuple, or None where there are no outputs.
            what: What it comes from, for messages.

        Raises:
            InputError: It does not fit.
        """
        results = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        if len(results) != len(self.outputs):
            raise InputError(
                f"The {what} of {self} must return {len(self.outputs)} arrays, not {len(results)}."
            )
        arrays = tuple(np.asarray(result) for result in results)
        for array, output in zip(arrays, self.outputs, strict=True):
            if array.shape != output.shape or array.dtype != output.dtype:
                raise InputError(
                    f"The {what} of {self} must return {output.dtype} of shape {output.shape}, not "
                    f"{array.dtype} of shape {array.shape}."
                )
        return arrays

    def __str__(self) -> str:
        return f"{self.function}[{self.index}] {self.site}: {self.kernel}"

    def _repr_html_(self) -> str:
        return launch_html(self)

    def __repr__(self) -> str:
        return f"<launch {self}{f', {self.done}' if self.done else ''}>"

    @cached_property
    def _cost(self) -> Cost:
        kernel = self._execution.knowledge.kernels[self.symbol]
        return cost(kernel, self._described, self._execution.sizes)

    @property
    def _index(self) -> int:
        """The index of the kernel among the place's."""
        assert isinstance(self._where, Place)
        rule = self._execution.knowledge.rule[self.index]
        return rule(tuple(self.sizes[axis] for axis in self._where.axes))

    def _check_waiting(self) -> None:
        self._check_current()
        if self.done:
            raise InputError(f"{self} was {self.done} already; it can be run again with rerun().")

    def _check_current(self) -> None:
        if self._execution.index != self.index:
            raise InputError(f"{self} is over: the launches behind it may have used its memory again.")

    def _launch(self, index: int | None = None, *, counts: bool = True) -> float:
        """Launch a place's kernel of some index; without one, that which serves these sizes.

        Returns:
            The seconds it took.
        """
        place = self._where if isinstance(self._where, Place) else None
        if (
            place is not None
            and index is None
            and (not self._execution.knowledge.own or self._execution.counts)
        ):
            index = self._index  # said to the dispatcher, so that what is counted is what ran
        key = (lambda: self._key(index)) if counts else None
        if index is None or place is None:
            return self._execution.launch(self.symbol, self._arguments, key)
        with choosing(index):
            return self._execution.launch(self.symbol + OPEN, self._arguments, key)

    def _key(self, index: int | None) -> Key:
        """What this launch counts as."""
        place = self._where
        kernel = (
            place.kernel
            if isinstance(place, Fixed)
            else place.kernels[self._index if index is None else index][0]
        )
        axes = AXES.get(self.operator, ("batch", "seq", "kv_len"))
        return self.site, self.operator, kernel, tuple((axis, self.sizes[axis]) for axis in axes)

    def _timed(self, kernel: Replacement | None) -> float:
        """Launch once, uncounted; what it takes."""
        if kernel is None or isinstance(kernel, str):
            return self._launch(None if kernel is None else self._index_of(kernel), counts=False)
        begun = time.perf_counter()
        compute(self, kernel)
        return time.perf_counter() - begun

    def _check_kernel(self, name: str) -> None:
        if name not in self.kernels:
            raise InputError(
                f"The kernel {name!r} does not serve {self.site} at these sizes; there are: {', '.join(self.kernels)}."
            )

    def _index_of(self, kernel: str) -> int | None:
        return self._where.index(kernel) if isinstance(self._where, Place) else None

    def _replace(self, replacement: Replacement) -> None:
        if isinstance(replacement, str):
            self._check_kernel(replacement)
            self.seconds = self._launch(self._index_of(replacement))
        else:
            begun = time.perf_counter()
            compute(self, replacement)
            self.seconds = time.perf_counter() - begun
        self.done = "replaced"
