"""Who is measured: each runs the same model, on the same tokens, with the same number of threads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import relax_llm as rl


class Peer(Protocol):
    """A way to run a model."""

    name: str

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Evaluate a prompt from nothing, up to the logits of its last token."""
        ...

    def decoder(self, token_ids: Sequence[int]) -> Callable[[], None]:
        """Evaluate a context; what is returned evaluates one token more, each time after the same context."""
        ...


class RelaxLLM:
    """This project."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        """Compile the checkpoint, or take it from the cache."""
        self.artifact = rl.compile(checkpoint)
        self.name = f"relax_llm {self.artifact.manifest.weight_format}"
        self._runner = rl.Runner(self.artifact, threads=threads)

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Evaluate a prompt in a new state."""
        self._runner.prefill(self._runner.start(), token_ids)

    def decoder(self, token_ids: Sequence[int]) -> Callable[[], None]:
        """Decode, then cut the state back."""
        state = self._runner.start()
        self._runner.prefill(state, token_ids)

        def step() -> None:
            self._runner.decode(state, 0)
            state.truncate(len(token_ids))

        return step


class TorchEager:
    """`transformers` on PyTorch, f32, eager attention."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        """Load the checkpoint.

        Raises:
            ImportError: PyTorch or transformers is not installed.
        """
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch, self._cache = torch, DynamicCache
        place = {"gguf_file": checkpoint.name} if checkpoint.is_file() else {}
        directory = checkpoint.parent if checkpoint.is_file() else checkpoint
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", **place
        ).eval()
        self.name = f"torch {torch.__version__.partition('+')[0]} eager f32"

    def _run(self, token_ids: Sequence[int], cache: Any) -> None:
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(token_ids)])
            self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Evaluate a prompt with a new cache."""
        self._run(token_ids, self._cache())

    def decoder(self, token_ids: Sequence[int]) -> Callable[[], None]:
        """Decode, then crop the cache."""
        cache = self._cache()
        self._run(token_ids, cache)

        def step() -> None:
            self._run([0], cache)
            cache.crop(-1)

        return step
