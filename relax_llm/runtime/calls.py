"""How a model's functions are called: by the virtual machine as a whole, or launch by launch.

Who wants to be in a call is asked in this order, and the first makes it, by the kernels that control chooses:

=========  ==========================================================================
observers  every launch is made from Python, with shadows beside it, or is recorded
tracer     compiled code reads the clock around every launch
control    compiled code asks which kernels to run, and what it launches is counted
nobody     the compiled function is called, and nothing else
=========  ==========================================================================

Of `Calls.steps` the caller makes the launches.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

from relax_llm.artifact.artifact import Artifact
from relax_llm.errors import InputError
from relax_llm.runtime import vm
from relax_llm.runtime.breakpoints import Breakpoints
from relax_llm.runtime.control import Control
from relax_llm.runtime.execution import Execution, Knowledge
from relax_llm.runtime.interpreter import Interpreter
from relax_llm.runtime.observers import Observers
from relax_llm.runtime.state import State
from relax_llm.runtime.stepper import Steps
from relax_llm.runtime.tensors import named_tensors, tensor_names
from relax_llm.runtime.token_ids import Ids
from relax_llm.runtime.tracing import Tracer


class Calls:
    """Calls a model's functions.

    Attributes:
        functions: The compiled functions, by name.
    """

    def __init__(
        self,
        artifact: Artifact,
        machine: vm.VirtualMachine,
        weights: Any,
        lock: Lock,
        control: Control,
        tracer: Tracer,
        observers: Observers,
    ) -> None:
        """Nothing has been called.

        Args:
            artifact: What is run.
            machine: Has the functions.
            weights: All of the artifact's, as one argument of the functions.
            lock: Held while a function runs.
            control: Chooses kernels otherwise than the plan, and counts.
            tracer: Wants to know when launches began and ended.
            observers: Look at every launch.
        """
        self.functions: dict[str, Callable[..., Any]] = {
            name: machine[name] for name in artifact.manifest.functions
        }
        self._artifact, self._machine, self._weights, self._lock = artifact, machine, weights, lock
        self._control, self._tracer, self._observers = control, tracer, observers
        self._interpreter: Interpreter | None = None

    @cached_property
    def breakpoints(self) -> Breakpoints:
        """Where steps stop."""
        return Breakpoints(self._control.lines, frozenset(tensor_names(self._artifact.manifest)))

    def evaluate(self, function: str, state: State, ids: Ids) -> Any:
        """Append tokens to a state.

        Args:
            function: "prefill", "decode", or another that takes tokens.
            state: Grows by the tokens; unchanged when the call fails.
            ids: [batch, seq], of the state's batch.

        Returns:
            What the function gives, a tensor of TVM's: [batch, seq, ...].
        """
        if self._observers.active:
            return self._observers.call(self.steps(function, state, ids, lambda result: result))
        sizes, arguments = self._arguments(state, ids)
        result = self._whole(function, sizes, arguments)
        state.append(ids)
        return result

    def evaluate_greedily(self, state: State, ids: Ids) -> tuple[Any, Any]:
        """Append tokens to a state; logits [batch, 1, vocab] and the likeliest to follow, int32 [batch, 1, 1].

        Logits may be estimates where they cannot be the largest.
        """
        # What is chosen for the head by hand is to compute all logits.
        function = self._artifact.manifest.greedy_function(ids.shape[1], whole=self._control.chooses)
        logits = self.evaluate(function, state, ids)
        sizes = {"batch": ids.shape[0], "seq": 1, "kv_len": state.length}
        return logits, self.call("greedy", sizes, logits)

    def call(self, function: str, sizes: Mapping[str, int], *arguments: Any) -> Any:
        """Call a function that changes no state; what it gives, a tensor of TVM's.

        Args:
            function: Its name.
            sizes: Its batch, seq and kv_len.
            arguments: As the function takes them.
        """
        if self._observers.active:
            return self._observers.call(self._steps(function, sizes, arguments, lambda result: result))
        return self._whole(function, sizes, arguments)

    def steps(self, function: str, state: State, ids: Ids, shaped: Callable[[Any], Any]) -> Steps:
        """The launches of a call that appends tokens to a state; nothing has been launched yet.

        Args:
            function: As for `evaluate`, and so are the others.
            state: Grows by the tokens when the last launch has been made.
            ids: [batch, seq], of the state's batch.
            shaped: Makes of the function's result what the steps end with.
        """
        sizes, arguments = self._arguments(state, ids)
        begun = state.length

        def finish(result: Any) -> Any:
            if state.length != begun:
                raise InputError(
                    f"The state had {begun} tokens when these steps began and has {state.length} now; begin again."
                )
            state.append(ids)
            return shaped(result)

        return self._steps(function, sizes, arguments, finish)

    def _arguments(self, state: State, ids: Ids) -> tuple[dict[str, int], tuple[Any, Any, Any, Any]]:
        """The sizes of a call, and what the compiled functions are called with."""
        if not state.fits(self._artifact.manifest.caches):
            raise InputError("The state belongs to another model; make one with this runner's start().")
        caches = state.reserve(ids.shape[1])
        sizes = {"batch": ids.shape[0], "seq": ids.shape[1], "kv_len": state.length + ids.shape[1]}
        return sizes, (state.argument(ids), vm.shape(sizes["kv_len"]), caches, self._weights)

    def _whole(self, function: str, sizes: Mapping[str, int], arguments: Sequence[Any]) -> Any:
        """Call a function as a whole; what it gives."""
        with self._lock:
            if self._tracer.active:
                return self._tracer.call(function, sizes, *arguments)
            if self._control.active:
                return self._control.call(function, sizes, *arguments)
            return self.functions[function](*arguments)

    def _steps(
        self,
        function: str,
        sizes: Mapping[str, int],
        arguments: Sequence[Any],
        finish: Callable[[Any], Any],
    ) -> Steps:
        manifest = self._artifact.manifest
        with self._lock:
            if self._interpreter is None:
                self._interpreter = Interpreter(self._machine)
            knowledge = Knowledge(
                self._control.line(function),
                list(self._control.rules(function)),
                manifest.kernels,
                self._artifact.plan,
                not self._control.chooses,
                self._control,
                self.breakpoints,
                lambda: named_tensors(manifest, arguments),
            )
        execution = Execution(function, sizes, knowledge, self._machine, self._lock)
        return Steps(self._interpreter, self._interpreter.start(function, *arguments), execution, finish)
