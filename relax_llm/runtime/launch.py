"""One launch of a kernel, in your hands: what it is called with, and what becomes of it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact import formulas
from relax_llm.errors import InputError
from relax_llm.plan.kernel import AXES
from relax_llm.runtime import vm
from relax_llm.runtime.choices import Fixed, Place
from relax_llm.runtime.dispatch import OPEN, choosing

if TYPE_CHECKING:
    from relax_llm.runtime.stepper import Steps

Array = npt.NDArray[Any]
Replacement = str | Callable[..., Any]

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


class Launch:
    """One launch of a kernel: about to be made, or made just now.

    Attributes:
        function: The function that makes it.
        index: Its place among the function's launches, from 0.
        site: The place in the model.
        operator: What is computed.
        symbol: The kernel's or its dispatcher's name in the library.
        done: "run", "skipped" or "replaced", and "" before.
    """

    def __init__(self, steps: "Steps", index: int, arguments: list[Any]) -> None:
        """Made by `Steps`."""
        self.function = steps.function
        self.index = index
        self.done = ""
        self._steps = steps
        self._described, self._where = steps.knowledge.line.launches[index]
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
        found = dict(self._steps.sizes)
        for said, value in zip(self._described.arguments, self._arguments, strict=True):
            shape = () if said.role == "size" else value.shape
            found |= {
                name: int(size) for name, size in zip(said.shape, shape, strict=True) if name.isidentifier()
            }
        if "M" in AXES.get(self.operator, ()):
            found["M"] = prod(self._arguments[-1].shape[:-1])
        return found

    @property
    def flops(self) -> float:
        """Operations of arithmetic."""
        return formulas.evaluate(self._steps.knowledge.kernels[self.symbol].flops, self.sizes)

    @property
    def bytes(self) -> float:
        """Memory that must at least be moved."""
        return formulas.evaluate(self._steps.knowledge.kernels[self.symbol].bytes, self.sizes)

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
        if not self._steps.knowledge.own:
            return "it is forced, pinned or wanted by another plan"
        for entry in self._steps.knowledge.plan.entries:
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

    def run(self) -> None:
        """Launch the kernel, or what replaces it."""
        self._check_waiting()
        replacement = self._steps.replacement(self)
        if replacement is None:
            self._launch()
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
        self._launch()

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

    def time(self, repeat: int = 20, *, cold: bool = False) -> float:
        """Time the kernel in its place, on its inputs, and leave everything as it was.

        Args:
            repeat: How often it is launched.
            cold: Whether to clear the caches before each launch, as far as reading other memory does.

        Returns:
            The median in seconds.
        """
        self._check_current()
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise InputError(f"repeat must be a positive whole number, not {repeat!r}.")
        changed = [o.value for o in self.arguments if o.role in ("output", "cache")]
        kept = [array.copy() for array in changed]
        other = np.ones(_CACHE_SPILL // 8) if cold else None
        seconds = []
        try:
            self._launch()
            for _ in range(repeat):
                if other is not None:
                    other.sum()
                begun = time.perf_counter()
                self._launch()
                seconds.append(time.perf_counter() - begun)
        finally:
            for array, before in zip(changed, kept, strict=True):
                array[...] = before
        return median(seconds)

    def __str__(self) -> str:
        return f"{self.function}[{self.index}] {self.site}: {self.kernel}"

    def __repr__(self) -> str:
        return f"<launch {self}{f', {self.done}' if self.done else ''}>"

    @property
    def _index(self) -> int:
        """The index of the kernel among the place's."""
        assert isinstance(self._where, Place)
        rule = self._steps.rule(self.index)
        return rule(tuple(self.sizes[axis] for axis in self._where.axes))

    def _check_waiting(self) -> None:
        self._check_current()
        if self.done:
            raise InputError(f"{self} was {self.done} already; it can be run again with rerun().")

    def _check_current(self) -> None:
        if self._steps.current is not self:
            raise InputError(f"{self} is over: the launches behind it may have used its memory again.")

    def _launch(self, index: int | None = None) -> None:
        """Launch a place's kernel of some index; without one, that which serves these sizes."""
        if index is None and not self._steps.knowledge.own and isinstance(self._where, Place):
            index = self._index
        if index is None:
            self._steps.launch(self.symbol, self._arguments)
        else:
            with choosing(index):
                self._steps.launch(self.symbol + OPEN, self._arguments)

    def _replace(self, replacement: Replacement) -> None:
        if isinstance(replacement, str):
            if replacement not in self.kernels:
                raise InputError(
                    f"The kernel {replacement!r} does not serve {self.site} at these sizes; there are: "
                    f"{', '.join(self.kernels)}."
                )
            self._launch(self._where.index(replacement) if isinstance(self._where, Place) else None)
            self.done = "replaced"
            return
        returned = replacement(*self.inputs)
        results = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        if len(results) != len(self.outputs):
            raise InputError(
                f"The replacement of {self} must return {len(self.outputs)} arrays, not {len(results)}."
            )
        arrays = [np.asarray(result) for result in results]
        for array, output in zip(arrays, self.outputs, strict=True):
            if array.shape != output.shape or array.dtype != output.dtype:
                raise InputError(
                    f"The replacement of {self} must return {output.dtype} of shape {output.shape}, not "
                    f"{array.dtype} of shape {array.shape}."
                )
        for array, output in zip(arrays, self.outputs, strict=True):
            output[...] = array
        self.done = "replaced"
