"""One stepped call of a function, as its launches know it: what is known before, and how a kernel is called."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from threading import Lock
from time import perf_counter
from typing import Any

from relax_llm.artifact import manifest
from relax_llm.errors import InputError
from relax_llm.plan.plan import Plan
from relax_llm.runtime.breakpoints import Breakpoint, Breakpoints
from relax_llm.runtime.choices import Place, Rule
from relax_llm.runtime.control import Control, Line
from relax_llm.runtime.counts import Key
from relax_llm.runtime.replacement import Replacement
from relax_llm.runtime.vm import VirtualMachine


@dataclass(frozen=True)
class Knowledge:
    """What is known of a function's launches before they are made.

    Attributes:
        line: The launches.
        rules: What chooses the kernels of those that have a choice.
        kernels: The manifest's descriptions.
        plan: The artifact's.
        own: Whether the kernels are chosen as the plan has it.
        control: What counts launches.
        breakpoints: The runner's.
        tensors: Gives weights and caches by name.
    """

    line: Line
    rules: Sequence[Rule]
    kernels: Mapping[str, manifest.Kernel]
    plan: Plan
    own: bool
    control: Control
    breakpoints: Breakpoints
    tensors: Callable[[], Mapping[str, Any]]

    @cached_property
    def rule(self) -> Mapping[int, Rule]:
        """What chooses the kernel of each launch that has a choice."""
        places = [index for index, (_, at) in enumerate(self.line.launches) if isinstance(at, Place)]
        return dict(zip(places, self.rules, strict=True))


class Execution:
    """What the launches of one call share. It holds none of them: who drops a stepper gets its memory back at once.

    Attributes:
        function: The function's name.
        sizes: batch, seq and kv_len of this call.
        knowledge: What is known of its launches.
        lock: Held while anything of the runner runs.
        index: Of the launch that is about to be made or was made last; None before the first and after the end.
    """

    def __init__(
        self,
        function: str,
        sizes: Mapping[str, int],
        knowledge: Knowledge,
        machine: VirtualMachine,
        lock: Lock,
    ) -> None:
        """Nothing has begun.

        Args:
            function: The function's name.
            sizes: batch, seq and kv_len of this call.
            knowledge: What is known of its launches.
            machine: Has the kernels.
            lock: Held while anything of the runner runs.
        """
        self.function = function
        self.sizes = sizes
        self.knowledge = knowledge
        self.index: int | None = None
        self._machine = machine
        self.lock = lock
        self._kernels: dict[str, Callable[..., Any]] = {}
        self._replacements: list[tuple[frozenset[int], Replacement]] = []

    @property
    def counts(self) -> bool:
        """Whether anybody counts launches."""
        return self.knowledge.control.is_counting

    def launch(self, symbol: str, arguments: list[Any], key: Callable[[], Key] | None) -> float:
        """Call a kernel of the library while nothing else of the runner runs.

        Args:
            symbol: Its name.
            arguments: What it is called with.
            key: What it counts as; None: nothing.

        Returns:
            The seconds it took.
        """
        function = self._kernels.get(symbol)
        if function is None:
            function = self._kernels[symbol] = self._machine.kernel(symbol)
        with self.lock:
            begun = perf_counter()
            function(*arguments)
            seconds = perf_counter() - begun
            if key is not None and self.counts:
                self.knowledge.control.count(lambda: [key()])
        return seconds

    def replace(self, site: str, replacement: Replacement, operator: str) -> None:
        """See `Steps.replace`."""
        named = isinstance(replacement, str)
        if not named and not callable(replacement):
            raise InputError(
                f"What replaces {site!r} must be the name of a kernel or a function, not an object of type "
                f"{type(replacement).__name__}."
            )
        kernel = escape(str(replacement)) if named else "*"
        meant = Breakpoint(function=self.function, site=site, operator=operator, kernel=kernel)
        self.knowledge.breakpoints.check(meant)
        self._replacements.insert(0, (meant.places(self.knowledge.line), replacement))

    def replacement(self, index: int, valid: Callable[[], Iterable[str]]) -> Replacement | None:
        """What computes a launch in place of its kernel: a kernel only where it is valid at these sizes."""
        for places, replacement in self._replacements:
            if index in places and not (isinstance(replacement, str) and replacement not in valid()):
                return replacement
        return None

    def replaced_from(self, index: int) -> int | None:
        """The first launch from one on that something was to compute in place of its kernel."""
        waiting = [at for places, _ in self._replacements for at in places if at >= index]
        return min(waiting, default=None)
