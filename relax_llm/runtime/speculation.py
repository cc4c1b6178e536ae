"""Prompt-lookup decoding: what followed the last tokens once before is drafted, and verified in one call.

The draft costs nothing and needs no second model: it is copied from the prompt or from the answer (Saxena, "Prompt
Lookup Decoding", 2023). The model evaluates a chosen token and the draft behind it together, and gives its logits after
each of them. The next tokens are then chosen from these logits one by one, exactly as they are without drafts, for as
long as they are the drafted ones; so greedy answers, draws under a seed, penalties and log-probabilities are those of
plain decoding. For a draft without alternatives this is speculative sampling (Leviathan et al., 2023): a drafted token
is kept as often as the model itself would draw it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    import numpy as np
    import numpy.typing as npt

    from relax_llm.runtime.interface import CacheState, LanguageModel

DEFAULT_NGRAM = 3
"""How many of the last tokens are looked up, where they are found together."""


class History:
    """Tokens, with the places where each of their n-grams was seen last.

    Args:
        ngram: The longest n-gram.
        tokens: What there is at the start.
    """

    def __init__(self, ngram: int, tokens: Iterable[int] = ()) -> None:
        self._ngram = ngram
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # an n-gram that something follows: where that begins
        for token_id in tokens:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Take in one token more."""
        for ending in self._endings():
            self._behind[ending] = len(self._tokens)
        self._tokens.append(token_id)

    def continuation(self, count: int) -> list[int]:
        """What may come next: `count` tokens that followed the longest n-gram at the end when it was seen last.

        Where these reach the end of the tokens they go on with themselves, so a loop is drafted for any length. Empty
        where no n-gram at the end was seen before.
        """
        begin = next((self._behind[ending] for ending in self._endings() if ending in self._behind), None)
        if begin is None:
            return []
        seen = self._tokens[begin : begin + count]
        return [seen[index % len(seen)] for index in range(count)]

    def _endings(self) -> Iterable[tuple[int, ...]]:
        """The n-grams at the end, longest first."""
        longest = min(self._ngram, len(self._tokens))
        return (tuple(self._tokens[-length:]) for length in range(longest, 0, -1))


class PromptLookup:
    """Decodes one answer with drafts.

    The length of drafts grows by one with each token that is kept and is halved by each that is not, so that text
    without repetitions costs little.

    Args:
        runner: Evaluates tokens.
        prompt: The tokens in front of the answer.
        most: The most tokens of a draft.
        ngram: How many of the last tokens are looked up.
        ends: Tokens that end the answer; nothing is drafted behind one.

    Attributes:
        drafted: Tokens drafted so far.
        accepted: Of these, tokens that the answer has.
    """

    def __init__(
        self, runner: LanguageModel, prompt: Iterable[int], most: int, ngram: int, ends: Collection[int]
    ) -> None:
        self.drafted = self.accepted = 0
        self._runner = runner
        self._history = History(ngram, prompt)
        self._most = self._length = most
        self._ends = ends
        self._verified: deque[tuple[int, npt.NDArray[np.float32]]] = deque()

    def decode(self, cache: CacheState, token_id: int, left: int) -> npt.NDArray[np.float32]:
        """Append one token to the cache, as `runner.decode` does: of a draft it holds what was chosen, and no more.

        Args:
            cache: Grows by one.
            token_id: The token that was chosen.
            left: How many tokens the answer can have behind it.

        Returns:
            Logits after it: [vocab].
        """
        self._history.append(token_id)
        if self._verified:
            drafted, logits = self._verified.popleft()
            if drafted == token_id and cache.restore([token_id]):
                self.accepted += 1
                self._length = min(self._length + 1, self._most)
                return logits
            self._length = max(self._length // 2, 1)
            self._verified.clear()
        draft = self._draft(cache, left)
        return self._verify(cache, token_id, draft) if draft else self._runner.decode(cache, token_id)

    def _draft(self, cache: CacheState, left: int) -> list[int]:
        """At most as many tokens as can be of use: the last of an answer, and one that ends it, need no logits."""
        room = self._runner.context_length - cache.length - 1
        draft = self._history.continuation(min(self._length, left - 1, room))
        end = next((index for index, token_id in enumerate(draft) if token_id in self._ends), len(draft))
        return draft[:end]

    def _verify(self, cache: CacheState, token_id: int, draft: list[int]) -> npt.NDArray[np.float32]:
        length = cache.length + 1
        try:
            logits = self._runner.prefill(cache, [token_id, *draft], "all")
        finally:
            if cache.length > length:  # also where Ctrl-C comes now: a draft is no part of the answer
                cache.truncate(length)
        self._verified.extend(zip(draft, logits[1:], strict=True))
        self.drafted += len(draft)
        first: npt.NDArray[np.float32] = logits[0]
        return first
