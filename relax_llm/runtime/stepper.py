"""A function of a model, launched kernel by kernel under your control."""

from collections.abc import Callable, Iterator
from typing import Any

from relax_llm.errors import ArtifactError, InputError
from relax_llm.runtime import vm
from relax_llm.runtime.breakpoints import Breakpoint, Reference, Stop, Where, breakpoint_of
from relax_llm.runtime.control import Line
from relax_llm.runtime.dispatch import OPEN, answer
from relax_llm.runtime.execution import Execution
from relax_llm.runtime.interpreter import Frame, Interpreter
from relax_llm.runtime.launch import Array, Launch
from relax_llm.runtime.listing import Listed, listed, table
from relax_llm.runtime.replacement import Replacement
from relax_llm.runtime.watching import Watch, Watched


class Steps:
    """The launches of one call of a function, one at a time, in program order.

    Iterate over it: a launch that you neither run, skip nor replace is run when you go on. Nothing of the runner waits
    for it; when it is left in the middle, the state stays as it was. `print` shows the launches as a table.

    Attributes:
        function: The function's name.
        sizes: batch, seq and kv_len of this call.
        knowledge: What is known of the launches.
        current: The launch that is about to be made or was made last; None before the first and after the end.
        stop: Why `run`, `run_until` or `step` stopped last; None: at the end, or after as many launches as were asked.
    """

    def __init__(
        self, interpreter: Interpreter, frame: Frame, execution: Execution, finish: Callable[[Any], Array]
    ) -> None:
        """Made by `Runner.steps`.

        Args:
            interpreter: Executes what is between the launches.
            frame: The call, before its first instruction.
            execution: What the launches share.
            finish: Makes of the function's result what the runner's caller gets.

        Raises:
            ArtifactError: The library launches other kernels than the manifest says.
        """
        self.function = execution.function
        self.sizes = execution.sizes
        self.knowledge = execution.knowledge
        self.current: Launch | None = None
        self.stop: Stop | None = None
        self._interpreter = interpreter
        self._frame: Frame | None = frame
        self._execution = execution
        self._finish = finish
        self._result: Array | None = None
        self._interrupted = False
        self._at = self._begun = 0
        self._made: dict[int, tuple[str, float | None]] = {}
        self._calls = interpreter.calls(self.function, self.knowledge.kernels)
        self._launches = self.knowledge.line.launches
        if self._calls.names != self.knowledge.line.symbols:
            raise self._differs()

    @property
    def launches(self) -> tuple[Listed, ...]:
        """All launches of the call, made or still to come."""
        made, index = dict(self._made), self._execution.index
        if self.current is not None and self.current.done:
            made[self.current.index] = self.current.done, self.current.seconds
        return listed(self.knowledge, self.sizes, made, index)

    @property
    def logits(self) -> Array:
        """What the function returns: as `prefill` and `decode` do.

        Raises:
            InputError: The end has not been reached.
        """
        if self._result is None:
            raise InputError(
                f"{self.function} has not ended: {self._begun} of {len(self)} launches have begun; "
                "finish() runs the rest."
            )
        return self._result

    @property
    def ended(self) -> bool:
        """Whether all launches have been made."""
        return self._result is not None

    def __len__(self) -> int:
        """The number of launches of the whole function."""
        return len(self._launches)

    def __str__(self) -> str:
        return str(table(self.launches))

    def _repr_html_(self) -> str:
        return table(self.launches, self._caption())._repr_html_()

    def __repr__(self) -> str:
        return f"<{self._caption()}>"

    def __iter__(self) -> Iterator[Launch]:
        return self

    def __next__(self) -> Launch:
        """Go on to the next launch; the present one is run, if nothing was done with it.

        Raises:
            InputError: It was closed.
        """
        if self._result is not None:
            raise StopIteration
        frame = self._go_past()
        with self._execution.lock:
            call = frame.run_to(self._calls.stops)
        if call is None:
            self._end(frame.result)
            raise StopIteration
        index, arguments = self._calls.order[frame.at], frame.arguments()
        if self.knowledge.line.sized[index] != [isinstance(value, int) for value in arguments]:
            raise self._differs()
        self._at, self._begun = frame.at, index + 1
        self._execution.index = index
        self.current = Launch(self._execution, index, arguments)
        return self.current

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, count: int = 1) -> Launch | None:
        """Go on by some launches, or up to a breakpoint of the runner's before.

        Returns:
            The launch that is about to be made, or behind which a breakpoint stopped; None when the end has come.

        Raises:
            InputError: The count is no positive whole number.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"step takes a positive whole number of launches, not {count!r}.")
        return self._go((), count)

    def run(self) -> Launch | None:
        """Go on up to the next breakpoint of the runner's.

        Returns:
            The launch, about to be made, or just made where the breakpoint is one that stops behind; None when the end
            has come. `stop` says why.
        """
        return self._go(())

    def run_until(
        self,
        *,
        site: str = "*",
        kernel: str = "*",
        operator: str = "*",
        where: Where | None = None,
        after: Callable[[Launch], bool] | None = None,
        nan: bool = False,
        differs: Reference | None = None,
        bound: float = 0.0,
    ) -> Launch | None:
        """Go on up to the next launch that all of these say yes to, or up to a breakpoint of the runner's before.

        Args:
            site: As for `Breakpoints.add`, and so are the others.
            kernel: Pattern of kernels.
            operator: Pattern of operators.
            where: Sizes, as in "M=17, kv_len>300", or a function that is asked before the launch is made.
            after: Asked when it has been made; then it stops behind it, and so do the others.
            nan: A NaN or an infinity in an output.
            differs: Outputs that are not these, or not what this function computes.
            bound: The largest difference that is none.

        Returns:
            The launch, about to be made, or just made where it stops behind; None when the end has come.

        Raises:
            InputError: The function has no such launch.
        """
        once = breakpoint_of(
            site=site,
            kernel=kernel,
            operator=operator,
            where=where,
            after=after,
            nan=nan,
            differs=differs,
            bound=bound,
            function=self.function,
        )
        self.knowledge.breakpoints.check(once)
        return self._go((once,))

    def replace(self, site: str, replacement: Replacement, operator: str = "*") -> None:
        """Have something else compute all launches from here on at some sites.

        Args:
            site: Pattern of sites.
            replacement: As for `Launch.replace`. A kernel serves where the library has it, at sizes that it is valid
                for; elsewhere nothing changes.
            operator: Pattern of operators.

        Raises:
            InputError: The function has no such site, or none of the sites such a kernel.
        """
        self._execution.replace(site, replacement, operator)

    def finish(self) -> Array:
        """Run everything that is left, past all breakpoints, with what replaces launches.

        Returns:
            What the function returns.
        """
        for _ in self:
            pass
        return self.logits

    def detach(self) -> Array:
        """Run everything that is left natively, at full speed, on the tensors as they are. No launch is made twice.

        The virtual machine executes the rest of the function as a function of its own, which begins with what the
        interpreter's registers hold. A launch that is about to be made is the first.

        Returns:
            What the function returns.

        Raises:
            InputError: Launches to come are to be replaced, which only `finish` does; or it was closed.
        """
        if self._result is not None:
            return self._result
        begun = 0 if self.current is None else self.current.index + (1 if self.current.done else 0)
        replaced = self._execution.replaced_from(begun)
        if replaced is not None:
            raise InputError(
                f"{self._launches[replaced][1].site} and what else replace() named from here on is replaced under "
                "control only; finish() does that. To run another kernel natively, use runner.force."
            )
        if self.current is not None and not self.current.done:
            frame, first = self._opened(), self.current.index
        else:
            frame = self._go_past()
            first = begun
        try:
            with self._execution.lock:
                result = self._native(frame, first)
        except BaseException:
            self.close()  # what the machine has done of it, nobody can take up
            raise
        self._end(result)
        return self.logits

    def interrupt(self) -> None:
        """Have `run`, `run_until` or `step`, which another thread is in, stop before the next launch."""
        self._interrupted = True

    def close(self) -> None:
        """Leave it in the middle: the state stays as it was, and the memory is given back."""
        self._execution.index = None
        self._frame = self.current = None

    def _caption(self) -> str:
        where = "ended" if self.ended else f"at {self.current}" if self.current else "not begun"
        return f"{len(self)} launches of {self.function}, {where}"

    def _opened(self) -> Frame:
        if self._frame is None:
            raise InputError(f"These steps of {self.function} were closed; begin again with runner.steps.")
        return self._frame

    def _go_past(self) -> Frame:
        """The call, behind its present launch, which is run if nothing was done with it."""
        frame, launch = self._opened(), self.current
        if launch is not None:
            if not launch.done:
                launch.run()
            self._made[launch.index] = launch.done, launch.seconds
            frame.at = (
                self._at + 1
            )  # said so that Ctrl-C between these lines does no harm when they are done again
            self.current = None
        return frame

    def _end(self, result: Any) -> None:
        try:
            self._result = self._finish(result)
        finally:
            self.close()

    def _go(self, once: tuple[Breakpoint, ...], most: int | None = None) -> Launch | None:
        """Go on up to a breakpoint, or by so many launches."""
        self.stop, self._interrupted = None, False
        launch, new, passed = self.current, False, 0
        if launch is None:
            launch, new, passed = next(self, None), True, 1
        every = (*self.knowledge.breakpoints, *once)
        stops = [
            (one, one.reaches(self.function, self.knowledge.line)) for one in every if one.watched is None
        ]
        watches = [(one, Watch(one.watched, self._find)) for one in every if one.watched is not None]
        while launch is not None:
            index = launch.index
            asked = [one for one, at in stops if index in at and (new or one.behind) and one.asks(launch)]
            if new:
                for one in asked:
                    if not one.behind:
                        return self._stopped(launch, one, str(one))
                if passed == most or self._interrupted:
                    return launch
            if not launch.done:
                behind = [(one, one.before(launch)) for one in asked if one.behind]
                launch.run()
                for one, kept in behind:
                    if (reason := one.verdict(launch, kept)) is not None:
                        return self._stopped(launch, one, reason)
                for one, watch in watches:
                    if (reason := watch.changes()) is not None:
                        return self._stopped(launch, one, reason)
            launch, new, passed = next(self, None), True, passed + 1
        return None

    def _stopped(self, launch: Launch, one: Breakpoint, reason: str) -> Launch:
        one.hits += 1
        self.stop = Stop(launch, one, reason)
        return launch

    def _find(self, watched: Watched) -> Iterator[tuple[str, Array]]:
        """What is there at present of what is watched: names and views."""
        if watched.array is not None:
            yield "the array", watched.array
        tensors = self.knowledge.tensors() if watched.tensors else {}
        for name in sorted(watched.tensors):
            yield name, vm.view(tensors[name])
        if not watched.sites or self._frame is None or self.current is None:
            return
        last = self.current.index if self.current.done else self.current.index - 1
        for index, (_, call) in enumerate(self._calls.each[: last + 1]):
            said, at = self._launches[index]
            if at.site not in watched.sites:
                continue
            places = [place for place, one in enumerate(said.arguments) if one.role == "output"]
            for number, place in enumerate(places):
                value = self._frame.registers[call.arguments[place].value]
                if value is not None:  # a register is emptied when nothing behind reads it
                    output = "the output" if len(places) == 1 else f"output {number}"
                    yield f"{output} of {at.site} ({at.operator}, launch {index})", vm.view(value)

    def _native(self, frame: Frame, first: int) -> Any:
        """Have TVM's own machine run the rest of a call, from a launch on; the lock is the caller's."""
        control, line = self.knowledge.control, Line(self._launches[first:])
        if self.knowledge.own and not control.is_counting:
            function, arguments = self._interpreter.rest(frame, {})
            return function(*arguments)
        opened = {place.symbol: place.symbol + OPEN for place in line.chosen}
        function, arguments = self._interpreter.rest(frame, opened)
        answer()
        rules = self.knowledge.rules[len(self.knowledge.rules) - len(line.chosen) :]
        return control.told(line, rules, self.sizes, lambda: function(*arguments))

    def _differs(self) -> ArtifactError:
        return ArtifactError(
            f"The library launches other kernels in {self.function} than the manifest says; compile the artifact again."
        )
