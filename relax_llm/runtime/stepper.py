"""A function of a model, launched kernel by kernel under your control."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from threading import Lock
from typing import Any

from relax_llm.artifact import manifest
from relax_llm.errors import ArtifactError, InputError
from relax_llm.plan.plan import Plan, parts_of
from relax_llm.runtime.choices import Place, Rule
from relax_llm.runtime.control import Line
from relax_llm.runtime.interpreter import Frame, Interpreter
from relax_llm.runtime.launch import Array, Launch, Replacement
from relax_llm.runtime.program import Call


@dataclass(frozen=True)
class Knowledge:
    """What is known of a function's launches before they are made.

    Attributes:
        line: The launches.
        rules: What chooses the kernels of those that have a choice.
        kernels: The manifest's descriptions.
        plan: The artifact's.
        own: Whether the kernels are chosen as the plan has it.
    """

    line: Line
    rules: Sequence[Rule]
    kernels: Mapping[str, manifest.Kernel]
    plan: Plan
    own: bool


class Steps:
    """The launches of one call of a function, one at a time, in program order.

    Iterate over it: a launch that you neither run, skip nor replace is run when you go on. Nothing of the runner waits
    for it; when it is left in the middle, the state stays as it was.

    Attributes:
        function: The function's name.
        sizes: batch, seq and kv_len of this call.
        current: The launch that is about to be made or was made last; None before the first and after the end.
        knowledge: What is known of the launches.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        frame: Frame,
        function: str,
        sizes: Mapping[str, int],
        knowledge: Knowledge,
        lock: Lock,
        finish: Callable[[Any], Array],
    ) -> None:
        """Made by `Runner.steps`."""
        self.function = function
        self.sizes = sizes
        self.knowledge = knowledge
        self.current: Launch | None = None
        self._interpreter = interpreter
        self._frame: Frame | None = frame
        self._call: Call | None = None
        self._lock = lock
        self._finish = finish
        self._next = 0
        self._result: Array | None = None
        self._kernels: dict[str, Callable[..., Any]] = {}
        self._replacements: list[tuple[str, str, Replacement]] = []
        table = enumerate(interpreter.program.functions)
        self._stops = frozenset(index for index, function in table if function.name in knowledge.kernels)
        order = [index for index, (_, at) in enumerate(knowledge.line.launches) if isinstance(at, Place)]
        self._rules = dict(zip(order, knowledge.rules, strict=True))

    def __len__(self) -> int:
        """The number of launches of the whole function."""
        return len(self.knowledge.line.launches)

    def __iter__(self) -> Iterator[Launch]:
        return self

    def __next__(self) -> Launch:
        """Go on to the next launch; the present one is run, if nothing was done with it.

        Raises:
            InputError: It was closed.
        """
        if self._result is not None:
            raise StopIteration
        if self._frame is None:
            raise InputError(f"These steps of {self.function} were closed; begin again with runner.steps.")
        if self.current is not None and self._call is not None:
            if not self.current.done:
                self.current.run()
            self.current = None
            self._frame.complete()
        with self._lock:
            self._call = self._frame.run_to(self._stops)
        if self._call is None:
            if self._next != len(self):
                raise self._differs()
            result, self._frame = self._frame.result, None
            self._result = self._finish(result)
            raise StopIteration
        arguments = self._frame.arguments()
        if not self._is_next(self._call, arguments):
            raise self._differs()
        self.current = Launch(self, self._next, arguments)
        self._next += 1
        return self.current

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def logits(self) -> Array:
        """What the function returns: as `prefill` and `decode` do.

        Raises:
            InputError: The end has not been reached.
        """
        if self._result is None:
            raise InputError(
                f"{self.function} has not ended: {self._next} of {len(self)} launches have begun; "
                "finish() runs the rest."
            )
        return self._result

    def step(self, count: int = 1) -> Launch | None:
        """Go on by some launches; the last of them is about to be made. None when the end comes before."""
        for _ in range(count - 1):
            if next(self, None) is None:
                return None
        return next(self, None)

    def run_until(
        self,
        *,
        site: str = "*",
        kernel: str = "*",
        operator: str = "*",
        where: Callable[[Launch], bool] | None = None,
        after: Callable[[Launch], bool] | None = None,
    ) -> Launch | None:
        """Go on up to the next launch that all of these say yes to.

        Args:
            site: Pattern of sites; one that was fused answers to its parts.
            kernel: Pattern of kernels.
            operator: Pattern of operators.
            where: Asked before the launch is made.
            after: Asked when it has been made; then it stops behind it.

        Returns:
            The launch, about to be made, or just made where `after` is given; None when the end has come.

        Raises:
            InputError: The function has no such site or operator.
        """
        self._check_pattern(site, operator)
        for launch in self:
            if not (
                _matches(launch.site, site)
                and fnmatchcase(launch.operator, operator)
                and (kernel == "*" or fnmatchcase(launch.kernel, kernel))
                and (where is None or where(launch))
            ):
                continue
            if after is None:
                return launch
            if not launch.done:
                launch.run()
            if after(launch):
                return launch
        return None

    def replace(self, site: str, replacement: Replacement, operator: str = "*") -> None:
        """Have something else compute all launches from here on at some sites.

        Args:
            site: Pattern of sites.
            replacement: As for `Launch.replace`.
            operator: Pattern of operators.

        Raises:
            InputError: The function has no such site.
        """
        self._check_pattern(site, operator)
        self._replacements.insert(0, (site, operator, replacement))

    def finish(self) -> Array:
        """Run everything that is left.

        Returns:
            What the function returns.
        """
        for _ in self:
            pass
        return self.logits

    def close(self) -> None:
        """Leave it in the middle: the state stays as it was, and the memory is given back."""
        self._frame = self._call = self.current = None

    def rule(self, index: int) -> Rule:
        """What chooses the kernel of a launch."""
        return self._rules[index]

    def launch(self, symbol: str, arguments: list[Any]) -> None:
        """Call a kernel of the library while nothing else of the runner runs."""
        function = self._kernels.get(symbol)
        if function is None:
            function = self._kernels[symbol] = self._interpreter.machine.kernel(symbol)
        with self._lock:
            function(*arguments)

    def replacement(self, launch: Launch) -> Replacement | None:
        """What computes a launch in place of its kernel."""
        for site, operator, replacement in self._replacements:
            if _matches(launch.site, site) and fnmatchcase(launch.operator, operator):
                return replacement
        return None

    def _check_pattern(self, site: str, operator: str) -> None:
        launches = [at for _, at in self.knowledge.line.launches]
        if not any(_matches(at.site, site) and fnmatchcase(at.operator, operator) for at in launches):
            sites = ", ".join(list(dict.fromkeys(at.site for at in launches))[:5])
            operators = ", ".join(sorted({at.operator for at in launches}))
            raise InputError(
                f"{self.function} launches no {operator!r} at {site!r}; sites are named like {sites}, operators are "
                f"{operators}."
            )

    def _is_next(self, call: Call, arguments: list[Any]) -> bool:
        """Whether the manifest has this call as the next launch."""
        if self._next == len(self):
            return False
        said = self.knowledge.line.launches[self._next][0]
        name = self._interpreter.program.functions[call.function].name
        return name == said.kernel and [argument.role == "size" for argument in said.arguments] == [
            isinstance(argument, int) for argument in arguments
        ]

    def _differs(self) -> ArtifactError:
        return ArtifactError(
            f"The library launches other kernels in {self.function} than the manifest says; compile the artifact again."
        )


def _matches(site: str, pattern: str) -> bool:
    return any(fnmatchcase(part, pattern) for part in parts_of(site))
