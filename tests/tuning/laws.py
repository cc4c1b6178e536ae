"""Kernels that obey a known law, on a clock that only they advance: tuning without a machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from relax_llm.tuning.contest import Contest, Findings, Rival
from relax_llm.tuning.law import Law
from relax_llm.tuning.rounds import Deadline
from relax_llm.tuning.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from relax_llm.tuning.rounds import Run

Rows = tuple[int, int | None]

GEMV = Law(30e-6, 1e-6, 0.0, 25e-6, 1)
SMALL = Law(30e-6, 8e-6, 24e-6, 2e-6, 4)
LARGE = Law(45e-6, 20e-6, 30e-6, 1.5e-6, 14)


@dataclass
class Clock:
    """Seconds that have passed."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def deadline(self, budget: float) -> Deadline:
        return Deadline(budget, self)


@dataclass
class Machine:
    """Runs kernels of known laws; `slowed` says by how much other work slows the launch with a number.

    Attributes:
        launches: (kernel, M, cold, count) of every run.
    """

    laws: Mapping[str, Law]
    clock: Clock = field(default_factory=Clock)
    slowed: Callable[[int], float] = lambda _: 1.0
    launches: list[tuple[str, int, bool, int]] = field(default_factory=list)

    def prepare(self, size: int, cold: bool) -> Run:
        def run(name: str, count: int) -> float:
            seconds = at(self.laws[name], size) * count * self.slowed(len(self.launches))
            self.launches.append((name, size, cold, count))
            self.clock.now += seconds
            return seconds

        return run

    def findings(
        self,
        rows: Mapping[str, Rows] | None = None,
        path: Path | None = None,
        largest: int = 2**24,
        name: str = "matmul",
    ) -> Findings:
        rivals = tuple(
            Rival(name, (rows or {}).get(name, (1, None)), f"code of {name}") for name in self.laws
        )
        return Findings(Contest(name, rivals, self.prepare, largest), Store(path))


def at(law: Law, size: int) -> float:
    """A law's seconds at one size."""
    return float(law.seconds(np.array([size]))[0])
