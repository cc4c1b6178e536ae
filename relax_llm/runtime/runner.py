"""The runner: an artifact in execution."""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from ctypes import c_float, c_int32
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.artifact import Artifact
from relax_llm.errors import InputError
from relax_llm.plan.kernel import Selection
from relax_llm.runtime import generation, vm
from relax_llm.runtime.answer import Generation, Piece
from relax_llm.runtime.breakpoints import Breakpoints
from relax_llm.runtime.calls import Calls
from relax_llm.runtime.control import Control, Forced, Planned
from relax_llm.runtime.counts import Counts
from relax_llm.runtime.interface import Likeliest
from relax_llm.runtime.limits import limits as machine_limits
from relax_llm.runtime.observers import Observers
from relax_llm.runtime.pages import Pages
from relax_llm.runtime.program import Program
from relax_llm.runtime.recording.file import LIMIT
from relax_llm.runtime.recording.recorder import Recording
from relax_llm.runtime.shadow import Beside, Shadow
from relax_llm.runtime.state import State
from relax_llm.runtime.stepper import Steps
from relax_llm.runtime.token_ids import Floats, TokenIds, array_of, ids_of, next_ids_of, require_id, shaped
from relax_llm.runtime.tracing import Tracer
from relax_llm.text.tokenizer import Tokenizer
from relax_llm.tracing.limits import Limits
from relax_llm.tracing.trace import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack

Output = Literal["last", "all", "hidden"]

_FUNCTIONS: Mapping[str, str] = {"last": "prefill", "all": "logits", "hidden": "hidden"}


class Runner:
    """Runs a compiled model: prefill, decode, generate.

    Several threads may use one runner, each with states of its own; their calls wait for each other.

    Attributes:
        artifact: What is run.
        vocab_size: Width of the logits.
        context_length: The most tokens a state can hold.
        generation_config: The checkpoint's defaults for generation.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        selection: Selection = "dynamic",
        mapped: bool | None = None,
    ) -> None:
        """Load an artifact's code and its weights.

        Args:
            artifact: From `compile` or `load`.
            threads: Threads that kernels use; by default all cores of this process. One number for a process.
            selection: "dynamic": at each size the kernel that the plan has for it; "pinned": at each site one kernel
                for every size, so that results are bitwise the same however tokens are divided among calls.
            mapped: Whether to map the weights' file, whose pages are read when first used and shared between processes,
                or to copy it into large pages; by default the map, where the system keeps files in large pieces.

        Raises:
            ArtifactError: The library or the weights cannot be loaded, or selection is pinned and a site has no
                kernel for every size.
            InputError: The process already uses another number of threads, or the selection is unknown.
        """
        if threads is not None:
            vm.set_threads(threads)
        artifact.check_machine()
        artifact.check_kernels()
        manifest = artifact.manifest
        self.artifact = artifact
        self.vocab_size = manifest.vocab_size
        self.context_length = manifest.context_length
        self.generation_config = manifest.generation_config
        self._machine = vm.VirtualMachine(artifact.library)
        weights = vm.pack([vm.tensor(array) for array in artifact.weights(mapped=mapped)])
        self._pages = Pages()
        self._running = Lock()  # the virtual machine has one set of registers
        self._control = Control(artifact, self._machine, selection, self._running)
        self._tracer = Tracer(artifact, self._machine, self._control, self.limits)
        self._observers = Observers(artifact, self._control)
        self._calls = Calls(
            artifact, self._machine, weights, self._running, self._control, self._tracer, self._observers
        )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if the artifact has one."""
        return self.artifact.tokenizer

    @property
    def program(self) -> Program:
        """What the virtual machine executes."""
        return self._machine.program

    @property
    def tokens_alike(self) -> int | None:
        """How many tokens of a sequence a call may have, at most, for its kernels to be those of one; None: any number.

        So many get the logits that they get one by one, to the last bit. It depends on what is forced now, too.
        """
        return self._control.tokens_alike()

    def start(self, batch: int = 1) -> State:
        """An empty state.

        Args:
            batch: Number of sequences, all of one length.
        """
        whole = isinstance(batch, int | np.integer) and not isinstance(batch, bool)
        if not whole or batch < 1:
            raise InputError(f"batch must be a positive whole number, not {batch!r}.")
        return State(self.artifact.manifest.caches, int(batch), self.context_length, self._pages)

    def prefill(self, state: State, token_ids: TokenIds, output: Output = "last") -> Floats:
        """Append tokens to a state.

        Args:
            state: Grows by the tokens; unchanged when the call fails.
            token_ids: [seq], or [batch, seq].
            output: "last": logits after the last token, [vocab]; "all": after every token, [seq, vocab]; "hidden":
                hidden states after the final norm, [seq, hidden].

        Returns:
            float32; with a leading batch axis where token_ids has one.

        Raises:
            InputError: No tokens, ids outside the vocabulary, or another batch than the state's.
            ContextLengthError: The tokens do not fit.
        """
        if not isinstance(output, str) or output not in _FUNCTIONS:
            raise InputError(f'output must be "last", "all" or "hidden", not {output!r}.')
        ids, flat = ids_of(token_ids, state.batch, self.vocab_size)
        function = _FUNCTIONS[output]
        return shaped(function, vm.numpy(self._calls.evaluate(function, state, ids)), flat)

    def decode(self, state: State, token_id: int | Sequence[int] | npt.NDArray[np.integer[Any]]) -> Floats:
        """Append one token to each sequence of a state.

        Args:
            state: Grows by one.
            token_id: One id, or an id for each sequence: [batch].

        Returns:
            Logits after it: float32 [vocab], or [batch, vocab].

        Raises:
            InputError: An id outside the vocabulary, or another batch than the state's.
            ContextLengthError: The context is full.
        """
        ids, flat = next_ids_of(token_id, state.batch, self.vocab_size)
        return shaped("decode", vm.numpy(self._calls.evaluate("decode", state, ids)), flat)

    def greedy(self, state: State, token_ids: int | TokenIds) -> Likeliest:
        """Append tokens to a state and give the likeliest one to follow; the logits stay in the library.

        ::

            token_id, _ = runner.greedy(state, prompt_ids)
            while token_id != end:
                token_id, _ = runner.greedy(state, token_id)

        Args:
            state: Grows by the tokens; unchanged when the call fails.
            token_ids: One id, [seq], or [batch, seq].

        Returns:
            The token and its logit; of a batch [batch] of each.

        Raises:
            InputError: No tokens, ids outside the vocabulary, or another batch than the state's.
            ContextLengthError: The tokens do not fit.
        """
        if type(token_ids) is int and state.batch == 1:
            # Text is generated so: in few steps, for a cold cache makes each of them slow.
            require_id(token_ids, self.vocab_size)
            logits, found = self._calls.evaluate_greedily(state, state.one(token_ids))
            token_id = vm.item(found, 0, c_int32)
            return Likeliest(token_id, vm.item(logits, token_id, c_float))
        array = array_of(token_ids)
        ids, flat = ids_of(array[None] if array.ndim == 0 else array, state.batch, self.vocab_size)
        values, tokens = map(vm.numpy, self._calls.evaluate_greedily(state, ids))
        chosen = Likeliest(tokens[:, 0, 0], values[np.arange(len(tokens)), 0, tokens[:, 0, 0]])
        return Likeliest(int(chosen.token_id[0]), float(chosen.logit[0])) if flat else chosen

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        state: State | None = None,
        **options: "Unpack[generation.GenerationOptions]",
    ) -> Generation:
        """Continue a prompt; see `relax_llm.runtime.generation.generate` for the options."""
        return generation.generate(self, prompt, state=state, **options)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        state: State | None = None,
        **options: "Unpack[generation.GenerationOptions]",
    ) -> Generator[Piece, None, None]:
        """Continue a prompt piece by piece; see `relax_llm.runtime.generation.stream` for the options."""
        return generation.stream(self, prompt, state=state, **options)

    @overload
    def force(self, site: str, kernel: str) -> Forced: ...
    @overload
    def force(self, site: str, kernel: None) -> None: ...
    def force(self, site: str, kernel: str | None) -> Forced | None:
        """Run one of an artifact's kernels at a site from now on, in all threads, whatever the plan says.

        ::

            runner.force("layers.3.mlp.down_proj", "my_gemv")      # until it is taken back:
            runner.force("layers.3.mlp.down_proj", None)
            with runner.force("layers.*.mlp.*", "my_gemv"): ...    # or for a while

        The kernel serves the sizes that it is valid for; at others the plan is followed. The kernel forced last
        counts, and also under another plan.

        Args:
            site: A place in the model, or a pattern with *; one that was fused answers to each of its parts.
            kernel: A name as in the plan; None takes back what is forced at these sites.

        Returns:
            A context that takes it back at its end; its text says where and at which sizes the kernel serves.

        Raises:
            InputError: No site matches, or none of them has the kernel; those that are known are listed.
            ArtifactError: The library cannot be controlled; it was compiled by another version.
        """
        return self._control.force(site, kernel)

    def plan(self, plan: Planned) -> AbstractContextManager[None]:
        """Run by another plan inside of a `with`; within another such context, by that one again afterwards.

        Args:
            plan: A plan, the path of one, or kernels by site: {"layers.*.mlp.down_proj": "my_gemv"}. Sites that it
                does not name are served as before.

        Raises:
            PlanError: The plan cannot be read, or wants what this artifact's library does not have.
            InputError: A site or kernel of the mapping is unknown.
        """
        return self._control.plan(plan)

    def counting(self) -> AbstractContextManager[Counts]:
        """Count inside of a `with` which kernel serves how many launches at which sizes.

        ::

            with runner.counting() as counts:
                runner.prefill(state, token_ids)
            print(counts)
        """
        return self._control.counting()

    def tracing(self, limits: Limits | None = None) -> AbstractContextManager[Trace]:
        """Trace what runs inside of a `with`: when each launch began and ended, which kernel it was, at which sizes.

        ::

            with runner.tracing() as trace:
                runner.generate("My favorite music is", max_new_tokens=16)
            print(trace)
            trace.save("trace.json")               # for Perfetto

        Compiled code reads the clock; no Python runs between two launches. What `steps` launches is not in it.

        Args:
            limits: What the machine can do, to compare with; by default `limits()`, when the trace is looked at.

        Raises:
            ArtifactError: The library has no clock; it was compiled by another version.
        """
        return self._tracer.tracing(limits, self._running)

    def shadow(
        self, site: str, beside: Beside, *, operator: str = "*", bound: float | None = None
    ) -> AbstractContextManager[Shadow]:
        """Have something else compute beside the kernels of some sites inside of a `with`, and compare.

        ::

            with runner.shadow("layers.*.mlp.*", "tiled") as shadow:
                runner.generate("My favorite music is", max_new_tokens=16)
            print(shadow)

        The model goes on with its own kernels' results; caches and all else that the shadow touched are put back. Every
        call is made launch by launch, with breakpoints passed over.

        Args:
            site: Pattern of sites; one that was fused answers to its parts.
            beside: A kernel of the library, where it is valid and is not the one that serves; a function of the inputs
                that returns the outputs, as `Launch.replace` takes it; or `rl.float64`, the operators' reference.
            operator: Pattern of operators.
            bound: The largest difference that is none, as a share of the largest number in its row; by default by what
                is computed. Beside `rl.float64`: in multiples of what each element may be off.

        Raises:
            InputError: No launch matches, or none has such a kernel.
        """
        return self._observers.shadow(site, beside, operator, bound)

    def recording(
        self,
        path: str | os.PathLike[str],
        *,
        site: str = "*",
        kernel: str = "*",
        operator: str = "*",
        weights: Literal["reference", "values"] = "reference",
        limit: int = LIMIT,
    ) -> AbstractContextManager[Recording]:
        """Record launches inside of a `with`: what went in and what came out, for `relax_llm.replay`.

        ::

            with runner.recording("down.rec", site="layers.3.mlp.down_proj"):
                runner.generate("My favorite music is", max_new_tokens=16)

        The file is written at the end; what was recorded before an error is kept. Every call is made launch by launch.

        Args:
            path: The file.
            site: Pattern of sites; one that was fused answers to its parts.
            kernel: Pattern of kernels.
            operator: Pattern of operators.
            weights: "reference": by name and digest, to be read from the artifact; "values": in the file, each once.
            limit: The most bytes of tensors.

        Raises:
            InputError: No launch can match, an option is not known, or another recording is being made.
            RecordingError: Nothing was recorded, the limit is reached, or the file cannot be written.
        """
        return self._observers.recording(
            path, site=site, kernel=kernel, operator=operator, weights=weights, limit=limit
        )

    def limits(self, *, anew: bool = False) -> Limits:
        """What this machine can do at most: arithmetic in registers, and reading memory.

        Measured once, for about half a second, with the code and the threads that kernels have, and kept in the cache.

        Args:
            anew: Measure again, for what a machine can do changes with what else it does.
        """
        with self._running:
            return machine_limits(self._machine, self.artifact.manifest, anew=anew)

    def steps(self, function: str, state: State, token_ids: Any) -> Steps:
        """Launch a function kernel by kernel, under your control.

        ::

            for launch in runner.steps("decode", state, next_id):
                print(launch.site, launch.kernel, launch.shapes)
                launch.run()

        Args:
            function: "prefill", "decode", or another of the manifest's functions.
            state: Grows by the tokens when the last launch has been made, as by a call of the function.
            token_ids: As `prefill` or `decode` take them.

        Returns:
            The launches, to iterate over; nothing has been launched yet.

        Raises:
            InputError: There is no such function, or the tokens cannot be evaluated.
            ContextLengthError: The tokens do not fit.
            ArtifactError: The library cannot be stepped through; it was compiled by another version.
        """
        functions = self._calls.functions
        if not isinstance(function, str) or function not in functions:
            raise InputError(f"There is no function {function!r}; there are: {', '.join(functions)}.")
        if function == "greedy":
            raise InputError("greedy is a function of logits, not of tokens; Runner.greedy calls it.")
        checked = next_ids_of if function == "decode" else ids_of
        ids, flat = checked(token_ids, state.batch, self.vocab_size)
        return self._calls.steps(
            function, state, ids, lambda result: shaped(function, vm.numpy(result), flat)
        )

    @property
    def breakpoints(self) -> Breakpoints:
        """Where stepped runs of this runner stop, in all functions and calls."""
        return self._calls.breakpoints
