"""What the generation side needs of a runner and of its state, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from relax_llm.text.tokenizer import Tokenizer


class Likeliest(NamedTuple):
    """The token with the largest logit, the first of equal ones.

    Attributes:
        token_id: The token; of several sequences int32 [batch].
        logit: Its logit, which is NaN where any logit is; float32 [batch] likewise.
    """

    token_id: Any
    logit: Any


class CacheState(Protocol):
    """A KV cache with its history, as `runner.start()` gives it."""

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens in the cache, for batch 1; as long as `length` says."""
        ...

    def truncate(self, length: int, /) -> None:
        """Cut the cache back to its first `length` tokens."""
        ...

    def restore(self, token_ids: Sequence[int], /) -> bool:
        """Take tokens back that were cut off; False where the cache no longer has them."""
        ...


class LanguageModel(Protocol):
    """What turns tokens into logits. `Runner` is one."""

    @property
    def context_length(self) -> int:
        """How many tokens the cache can hold at most."""
        ...

    @property
    def vocab_size(self) -> int:
        """Length of the logits."""
        ...

    @property
    def tokens_alike(self) -> int | None:
        """How many tokens a call may have, at most, to give each the logits that it gets alone; None: any number."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, where the artifact has one."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The fields of the checkpoint's `generation_config.json`."""
        ...

    def start(self) -> Any:
        """An empty state of batch 1."""
        ...

    def prefill(
        self, state: Any, token_ids: Sequence[int], output: Literal["last", "all"] = "last", /
    ) -> npt.NDArray[np.float32]:
        """Append `token_ids` [seq] to the cache; logits after the last one [vocab], or after all [seq, vocab]."""
        ...

    def decode(self, state: Any, token_id: int, /) -> npt.NDArray[np.float32]:
        """Append one token to the cache; logits [vocab] after it."""
        ...

    def greedy(self, state: Any, token_ids: int | Sequence[int], /) -> Likeliest:
        """Append one id or `token_ids` [seq] to the cache; the likeliest token after the last one."""
        ...
