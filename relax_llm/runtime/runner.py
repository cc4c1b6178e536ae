"""The runner: an artifact in execution."""

from collections.abc import Generator, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.artifact import Artifact
from relax_llm.errors import InputError
from relax_llm.runtime import generation, vm
from relax_llm.runtime.answer import Generation, Piece
from relax_llm.runtime.state import State
from relax_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

Floats = npt.NDArray[np.float32]
TokenIds = Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]]
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

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        """Load an artifact's code and map its weights.

        Args:
            artifact: From `compile` or `load`.
            threads: Threads that kernels use; by default all cores of this process. One number for a process.

        Raises:
            ArtifactError: The library or the weights cannot be loaded.
            InputError: The process already uses another number of threads.
        """
        if threads is not None:
            vm.set_threads(threads)
        artifact.check_kernels()
        manifest = artifact.manifest
        self.artifact = artifact
        self.vocab_size = manifest.vocab_size
        self.context_length = manifest.context_length
        self.generation_config = manifest.generation_config
        self._machine = vm.VirtualMachine(artifact.library)
        self._weights = vm.pack([vm.tensor(array) for array in artifact.weights()])
        self._functions = {name: self._machine[name] for name in manifest.functions}
        self._running = Lock()  # the virtual machine has one set of registers

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if the artifact has one."""
        return self.artifact.tokenizer

    def start(self, batch: int = 1) -> State:
        """An empty state.

        Args:
            batch: Number of sequences, all of one length.
        """
        whole = isinstance(batch, int | np.integer) and not isinstance(batch, bool)
        if not whole or batch < 1:
            raise InputError(f"batch must be a positive whole number, not {batch!r}.")
        return State(self.artifact.manifest.caches, int(batch), self.context_length)

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
        ids, flat = self._ids(state, token_ids)
        result = self._call(_FUNCTIONS[output], state, ids)
        if output == "last":
            result = result[:, -1]
        return result[0] if flat else result

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
        array = _array(token_id)
        if array.ndim > 1:
            raise InputError(
                f"decode takes one token for each sequence, not an array of shape {array.shape}."
            )
        ids, _ = self._ids(state, array.reshape(-1, 1))
        result = self._call("decode", state, ids)[:, 0]
        return result[0] if array.ndim == 0 else result

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

    def _call(self, function: str, state: State, ids: npt.NDArray[np.int32]) -> Floats:
        if not state.fits(self.artifact.manifest.caches):
            raise InputError("The state belongs to another model; make one with this runner's start().")
        caches = state.reserve(ids.shape[1])
        length = vm.shape(state.length + ids.shape[1])
        with self._running:
            result = self._functions[function](vm.tensor(ids), length, caches, self._weights)
        state.append(ids)
        return vm.numpy(result)

    def _ids(self, state: State, token_ids: Any) -> tuple[npt.NDArray[np.int32], bool]:
        """Token ids as int32 [batch, seq], and whether they came without a batch axis."""
        array = _array(token_ids)
        if array.ndim not in (1, 2):
            raise InputError(
                f"Token ids must form [seq] or [batch, seq], not an array of shape {array.shape}."
            )
        if array.size == 0:
            raise InputError("There are no tokens to evaluate; a prompt needs at least one.")
        if array.dtype.kind not in "iu":
            raise InputError(f"Token ids must be whole numbers, not {array.dtype}.")
        ids = array if array.ndim == 2 else array[None]
        if ids.shape[0] != state.batch:
            raise InputError(f"The state has {state.batch} sequences, but the token ids have {ids.shape[0]}.")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise InputError(f"Token id {bad} is outside the vocabulary of {self.vocab_size}.")
        return np.array(ids, np.int32, order="C"), array.ndim == 1  # a copy: DLPack refuses read-only memory


def _array(token_ids: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(token_ids)
    except ValueError as error:
        raise InputError(
            "Token ids must form [seq] or [batch, seq]; the sequences differ in length."
        ) from error
