"""From logits to a token: greedy or drawn, with the steps of transformers in their order, in NumPy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from relax_llm.errors import InputError, RelaxLLMError
from relax_llm.runtime.sampling_options import SamplingOptions

if TYPE_CHECKING:
    from collections.abc import Collection

    from relax_llm.runtime.interface import Likeliest

__all__ = ["Choice", "Sampler", "SamplingOptions", "TokenLogprob"]

Float32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

FIRST_NUCLEUS = 64
"""How many tokens top-p sorts first. A peaked distribution needs no more; a flat one asks for more."""


class TokenLogprob(NamedTuple):
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Choice:
    """One chosen token.

    Attributes:
        token_id: The token.
        logprob: Its log-probability under the model's own distribution; None when not asked for.
        top: The most likely tokens under that distribution, likeliest first; as many as asked for.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


class Sampler:
    """Chooses the tokens of one answer, one after another.

    Holds what the choice depends on besides the logits: the tokens seen so far and the random generator.

    Args:
        options: How to choose.
        vocab_size: Length of the logits.
        prompt_ids: Tokens of the prompt; the repetition penalty counts them as seen.

    Raises:
        InputError: A token id of the prompt or of logit_bias is outside the vocabulary.
    """

    def __init__(self, options: SamplingOptions, vocab_size: int, prompt_ids: Collection[int] = ()) -> None:
        self.options = options
        self.vocab_size = vocab_size
        self._chosen = 0
        self._refuse_outside(options.logit_bias.keys(), "logit_bias names")
        self._refuse_outside(prompt_ids, "the prompt contains")
        self._bias_ids = np.array([*options.logit_bias], np.int64)
        self._biases = np.array([*options.logit_bias.values()], np.float32)
        self._repeats = options.repetition_penalty != 1
        self._counts = options.presence_penalty != 0 or options.frequency_penalty != 0
        self._seen: Ids = np.array([*set(prompt_ids)] if self._repeats else [], np.int64)  # prompt and answer
        self._answer: Ids = np.array([], np.int64)  # distinct tokens of the answer
        self._times = np.zeros(0, np.float32)  # how often the answer contains each
        changes = not options.greedy or self._repeats or self._counts or len(self._bias_ids) > 0
        self._scores: Float32 | None = np.empty(vocab_size, np.float32) if changes else None

    def choose(self, logits: Float32) -> Choice:
        """Choose the next token, and count it as part of the answer.

        Args:
            logits: [vocab] float32, as `runner.prefill` and `runner.decode` return them; not modified.

        Raises:
            InputError: The shape is wrong, or the options rule out every token.
            RelaxLLMError: The logits have NaN or infinity in them, or rule out every token.
        """
        logits, best = self._checked(logits)
        if self.takes_likeliest:
            token_id, choice = best, Choice(best)
        else:
            with np.errstate(all="ignore"):  # what leaves float32's range is refused, or is a weight of 0
                token_id = best if self._scores is None else self._pick(logits, self._scores)
                choice = self._described(logits, best, token_id)
        self._chosen += 1
        self._remember(token_id)
        return choice

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token with the largest logit is chosen and nothing else is asked, so that `take` will do."""
        return self._scores is None and self.options.logprobs is None

    def take(self, likeliest: Likeliest) -> Choice:
        """Choose the likeliest token, found elsewhere, as `choose` would; only where `takes_likeliest`.

        Raises:
            RelaxLLMError: As for `choose`.
        """
        self._refuse_broken(likeliest.logit)
        self._chosen += 1
        return Choice(likeliest.token_id)

    def probabilities(self, logits: Float32) -> npt.NDArray[np.float64]:
        """The distribution that `choose` would draw from; nothing is drawn or counted.

        Args:
            logits: [vocab] float32; not modified.

        Returns:
            [vocab] float64, with sum 1. Greedy has a single 1 in it.

        Raises:
            InputError: As for `choose`.
            RelaxLLMError: As for `choose`.
        """
        logits, best = self._checked(logits)
        result = np.zeros(self.vocab_size)
        with np.errstate(all="ignore"):
            if self._scores is not None:
                best = self._rescore(logits, self._scores)
            if self._scores is None or self.options.greedy:
                result[best] = 1
            else:
                kept, weights = self._filter(self._scores, best)
                result[slice(None) if kept is None else kept] = weights / weights.sum(dtype=np.float64)
        return result

    def _checked(self, logits: Float32) -> tuple[Float32, int]:
        """The logits, once they are known to be usable, and the most likely token."""
        logits = np.asarray(logits, np.float32)
        if logits.shape != (self.vocab_size,):
            raise InputError(f"The logits have shape {logits.shape}; expected ({self.vocab_size},).")
        best = int(logits.argmax())  # the first NaN where there is one
        self._refuse_broken(float(logits[best]))
        return logits, best

    def _pick(self, logits: Float32, scores: Float32) -> int:
        best = self._rescore(logits, scores)
        if self.options.greedy:
            return best
        kept, weights = self._filter(scores, best)
        reached = np.cumsum(weights, dtype=np.float64)
        drawn = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        if drawn == len(reached):  # the product was rounded up to the sum
            drawn = int(np.searchsorted(reached, reached[-1]))
        return drawn if kept is None else int(kept[drawn])

    def _rescore(self, logits: Float32, scores: Float32) -> int:
        """Write the logits to `scores` with bias, penalties and temperature; return the best token now."""
        options = self.options
        np.copyto(scores, logits)
        scores[self._bias_ids] += self._biases
        if self._repeats:
            seen = scores[self._seen]
            penalty = np.float32(options.repetition_penalty)
            scores[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        if self._counts:
            scores[self._answer] -= options.frequency_penalty * self._times + options.presence_penalty
        if not options.greedy and options.temperature != 1:
            scores /= np.float32(options.temperature)
        best = int(scores.argmax())
        if not math.isfinite(scores[best]):
            raise InputError(
                "logit_bias forbids every token that the model allows; leave at least one of them."
                if scores[best] == -math.inf
                else "The penalties or biases drive a logit out of the range of float32; use milder ones."
            )
        return best

    def _filter(self, scores: Float32, best: int) -> tuple[Ids | None, Float32]:
        """What top-k, top-p and min-p leave: ids in ascending order (None for all), and weights.

        A weight is a probability divided by that of the most likely token.
        """
        options = self.options
        kept: Ids | None = None
        if 0 < options.top_k < len(scores):
            kept = _highest(scores, options.top_k)
        weights = np.exp((scores if kept is None else scores[kept]) - scores[best])
        if options.top_p < 1:
            inside = _nucleus(weights, options.top_p)
            kept, weights = (inside if kept is None else kept[inside]), weights[inside]
        if options.min_p > 0:
            inside = np.flatnonzero(weights >= np.float32(options.min_p))
            kept, weights = (inside if kept is None else kept[inside]), weights[inside]
        return kept, weights

    def _remember(self, token_id: int) -> None:
        if self._repeats and not (self._seen == token_id).any():
            self._seen = np.append(self._seen, token_id)
        if self._counts:
            known = np.flatnonzero(self._answer == token_id)
            if len(known):
                self._times[known] += 1
            else:
                self._answer = np.append(self._answer, token_id)
                self._times = np.append(self._times, np.float32(1))

    def _described(self, logits: Float32, best: int, token_id: int) -> Choice:
        """The choice with the log-probabilities asked for, from the logits as the model gave them."""
        count = self.options.logprobs
        if count is None:
            return Choice(token_id)
        shifted = logits - logits[best]
        total = math.log(np.exp(shifted).sum(dtype=np.float64))
        top: tuple[TokenLogprob, ...] = ()
        if count:
            likeliest = _highest(logits, min(count, len(logits)))
            likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")][:count]
            top = tuple(TokenLogprob(int(i), float(shifted[i]) - total) for i in likeliest)
        return Choice(token_id, float(shifted[token_id]) - total, top)

    @cached_property
    def _random(self) -> np.random.Generator:
        """Made when it is first needed: a seed of the system's takes as long as ten kernels."""
        return np.random.default_rng(self.options.seed)

    def _refuse_outside(self, ids: Collection[int], who: str) -> None:
        for token_id in (min(ids), max(ids)) if ids else ():
            if not 0 <= token_id < self.vocab_size:
                raise InputError(
                    f"Token ids go from 0 to {self.vocab_size - 1} with this model, and {who} {token_id}."
                )

    def _refuse_broken(self, worst: float) -> None:
        if math.isfinite(worst):
            return
        which = "the first new token" if self._chosen == 0 else f"new token {self._chosen + 1}"
        what = "rule out every token (all are -inf)" if worst == -math.inf else f"contain {worst}"
        raise RelaxLLMError(
            f"The model's logits for {which} {what}, so no token can be chosen. Look for NaN or infinity in "
            "the checkpoint's weights, or for a kernel of your own that computes it."
        )


def _highest(scores: Float32, count: int) -> Ids:
    """Ids of the `count` highest scores and of those equal to the lowest of them, in ascending order."""
    lowest = np.partition(scores, len(scores) - count)[len(scores) - count]
    return np.flatnonzero(scores >= lowest)


def _nucleus(weights: Float32, top_p: float) -> Ids:
    """Indices of the smallest set of heaviest weights that holds `top_p` of the sum, in ascending order.

    A weight stays when those heavier than it hold less than top_p. Among equal weights the one with the lower
    index counts as the heavier, as for greedy; transformers leaves that to an unstable sort.
    """
    enough = top_p * weights.sum(dtype=np.float64)
    count = FIRST_NUCLEUS
    while True:
        heaviest = np.sort(weights[_highest(weights, min(count, len(weights)))])[::-1]
        held = np.cumsum(heaviest, dtype=np.float64)
        if held[-1] >= enough or count >= len(weights):
            break
        count *= 16
    last = min(int(np.searchsorted(held, enough)), len(heaviest) - 1)  # the weight that reaches it is inside
    inside = weights > heaviest[last]
    inside[np.flatnonzero(weights == heaviest[last])[: last + 1 - np.count_nonzero(inside)]] = True
    return np.flatnonzero(inside)
