"""What an engine has to be measured by."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.models import Forms

Stamps = list[tuple[int, float]]
"""Tokens, with the time on `time.perf_counter` at which each was known."""

Answer = Callable[[Sequence[int], int], Stamps]
"""Evaluate a prompt from nothing, then decode greedily until there are so many tokens, whatever they are."""


class Engine(Protocol):
    """A module of this folder. What it measures is imported inside of its functions alone."""

    @property
    def NAME(self) -> str:  # noqa: N802
        """What the engine is called."""
        ...

    @property
    def PACKAGE(self) -> str:  # noqa: N802
        """What is installed for it."""
        ...

    @property
    def VARIANTS(self) -> Mapping[str, Sequence[str]]:  # noqa: N802
        """The ways in which it can hold the weights, by our name of the format: every one is measured."""
        ...

    @property
    def prepare(self) -> Callable[[Forms, str], Path]:
        """Bring a model into the engine's own form, for a variant: what is not measured."""
        ...

    @property
    def load(self) -> Callable[[Path, str, int], Answer]:
        """Load what was prepared, for a variant and a number of threads: what is measured as the time to load."""
        ...
