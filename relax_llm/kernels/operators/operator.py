"""What is known of an operator, as one record: signature, definition, float64 reference, inputs, samples, mistakes.

Correctness tests, the check at the door, the dispatcher, error tests and kernel benchmarks are all made from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tvm.tirx import PrimFunc

from relax_llm.kernels.layout import Layout
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.problem import Problem
from relax_llm.plan.kernel import AXES

Array = npt.NDArray[Any]
Sizes = Mapping[str, int]
Role = Literal["input", "weight", "updated", "output", "size"]

_LAUNCHED: Mapping[int | str, tuple[str, ...]] = {"M": ("batch", "seq")}

UNIT = 2.0**-24
"""Unit roundoff of float32: the largest relative error of one rounding."""


@dataclass(frozen=True)
class Operand:
    """One argument of a kernel.

    Attributes:
        name: What it is called.
        shape: Numbers, and the names of symbolic sizes; a size itself has no shape.
        dtype: Of its elements.
        role: "weight" is the same in every launch of a site; "updated" is read and written in place.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    role: Role = "input"

    @property
    def is_tensor(self) -> bool:
        """Whether it is memory, and not a number."""
        return self.role != "size"

    @property
    def is_result(self) -> bool:
        """Whether the kernel writes it."""
        return self.role in ("output", "updated")

    def at(self, sizes: Sizes) -> tuple[int, ...]:
        """Its shape at concrete sizes."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)

    def __str__(self) -> str:
        return (
            f"{self.name} [{', '.join(map(str, self.shape))}] {self.dtype}"
            if self.is_tensor
            else f"{self.name} int64"
        )


@dataclass(frozen=True)
class Expected:
    """What a kernel should give for one of its results.

    Attributes:
        right: The result in float64.
        bound: How far from it an honest kernel may be, element by element.
    """

    right: Array
    bound: Array


@dataclass(frozen=True)
class Mistake:
    """Fields that make no problem, and what the refusal says.

    Attributes:
        fields: Arguments of the problem.
        said: Part of the message.
    """

    fields: Mapping[str, Any]
    said: str


@dataclass(frozen=True)
class Operator:
    """Everything about an operator that does not depend on a kernel.

    Attributes:
        problem: Its kind of problem.
        operands: What a kernel takes, for a problem and the layout of its weight.
        definition: Plain loops over the same operands, the weight as in the checkpoint: what a schedule transforms.
        inputs: Random inputs, for (problem, sizes, generator, exact): where `exact`, numbers whose sums are exact.
        expected: The results, for (problem, sizes, inputs, exact).
        samples: Problems of every kind, to test kernels on.
        benchmarks: Problems of real models.
        mistakes: What must be refused.
        by_rows: Whether the rows of M are independent of each other, so that a launch is a part of a larger one.
        exact: Whether inputs exist for which every order of evaluation gives the same bits.
    """

    problem: type[Problem]
    operands: Callable[[Any, Layout | None], tuple[Operand, ...]]
    definition: Callable[[Any], PrimFunc]
    inputs: Callable[[Any, Sizes, np.random.Generator, bool], dict[str, Array]]
    expected: Callable[[Any, Sizes, Mapping[str, Array], bool], dict[str, Expected]]
    samples: Sequence[Problem]
    benchmarks: Sequence[Problem]
    mistakes: Sequence[Mistake]
    by_rows: bool = False
    exact: bool = False

    @property
    def name(self) -> str:
        """Its name in plans, problems and `relax_llm.kernel`."""
        return self.problem.operator

    @property
    def axes(self) -> tuple[str, ...]:
        """The sizes by which its kernels are chosen."""
        return AXES[self.name]

    def launched(self, problem: Any, layout: Layout | None) -> tuple[Operand, ...]:
        """What the model passes: the same with [batch, seq] for [M]."""
        return tuple(
            replace(
                operand, shape=tuple(part for size in operand.shape for part in _LAUNCHED.get(size, (size,)))
            )
            for operand in self.operands(problem, layout)
        )


Build = Callable[[Any, Machine], PrimFunc]


def rows_of(sizes: Sizes) -> int:
    """M, given as such or as batch * seq."""
    return sizes["M"] if "M" in sizes else sizes["batch"] * sizes["seq"]


def summed(length: int) -> float:
    """How many roundings, in units of the sum of the terms' magnitudes, a float32 sum of products may suffer.

    However it is ordered, a float32 sum is within g u S of the exact one, where S sums the magnitudes of the terms and
    g <= n + 2 always (Higham 2002, section 3.1), and where rounding errors of random inputs are independent,
    g <= c sqrt(n) with overwhelming probability (Higham and Mary 2019). Partial sums grow at most linearly, so the
    errors of n additions add up to a standard deviation below u S sqrt(n / 3); c = 4 is seven of these, and 4 more
    roundings cover products and what is added once.
    """
    return min(length + 2.0, 4.0 * float(np.sqrt(length)) + 4.0)
