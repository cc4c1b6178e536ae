"""A stepped run over a text: its prompt, then token after token, with what is to hold in all calls."""

from collections.abc import Sequence
from contextlib import suppress
from threading import Event
from typing import Any

import numpy as np

from relax_llm.errors import InputError
from relax_llm.runtime.launch import Launch
from relax_llm.runtime.runner import Runner
from relax_llm.runtime.stepper import Steps


class Session:
    """A text that a model continues under control: each call of a function is stepped through, one after the other.

    Attributes:
        runner: Evaluates.
        tokens: The prompt and the tokens chosen since.
        steps: The launches of the present call.
    """

    def __init__(self, runner: Runner, prompt: Sequence[int]) -> None:
        """Stand before the first launch that evaluates the prompt.

        Args:
            runner: Evaluates.
            prompt: At least one token id.

        Raises:
            InputError: The prompt cannot be evaluated.
        """
        self.runner = runner
        self.tokens = list(prompt)
        self._state = runner.start()
        self._replacements: list[tuple[str, str]] = []
        self._interrupted = Event()
        self.steps: Steps = runner.steps("prefill", self._state, self.tokens)
        self.step(1)

    @property
    def launch(self) -> Launch:
        """The launch at which the run stands.

        Raises:
            InputError: The call has ended.
        """
        if self.steps.current is None:
            raise InputError(
                f"All launches of this {self.steps.function} have been made; `next` begins with the next token."
            )
        return self.steps.current

    @property
    def text(self) -> str:
        """All tokens as text; as numbers where there is no tokenizer."""
        tokenizer = self.runner.tokenizer
        if tokenizer is None:
            return " ".join(map(str, self.tokens))
        return tokenizer.decode(self.tokens, skip_special_tokens=False)

    @property
    def interrupted(self) -> bool:
        """Whether the last command was interrupted."""
        return self._interrupted.is_set()

    def interrupt(self) -> None:
        """Stop the command that is being carried out, before its next launch; from any thread."""
        self._interrupted.set()
        self.steps.interrupt()

    def begin(self) -> None:
        """A command begins: what was interrupted before is over."""
        self._interrupted.clear()

    def step(self, count: int) -> None:
        """Go on by some launches, or up to a breakpoint."""
        self._check_going()
        self.steps.step(count)

    def go(self, **condition: Any) -> None:
        """Go on up to a breakpoint, or to what `Steps.run_until` takes, or to the end of the call."""
        self._check_going()
        if condition:
            self.steps.run_until(**condition)
        else:
            self.steps.run()

    def end(self) -> None:
        """Go on to the end of the call, past all breakpoints."""
        self._check_going()
        for _ in self.steps:
            if self.interrupted:
                return

    def likeliest(self, count: int) -> list[tuple[int, float]]:
        """The tokens that the model expects next, and how probable each is.

        Raises:
            InputError: The call has not ended, or a logit is NaN.
        """
        logits = self.steps.logits.astype(np.float64)
        if not np.isfinite(logits.max()):
            bad = int((~np.isfinite(logits)).sum())
            raise InputError(
                f"{bad} of {logits.size} logits are no finite numbers, so no token is the likeliest; `break nan` finds "
                "the first launch that computes such a thing."
            )
        shares = np.exp(logits - logits.max())
        best = np.argsort(-shares, kind="stable")[:count]
        return [(int(token), float(shares[token] / shares.sum())) for token in best]

    def next_token(self) -> int | None:
        """Run what is left of the call, append the likeliest token, and stand before the first launch for it.

        Returns:
            The token; None where it was interrupted before the end of the call.

        Raises:
            ContextLengthError: The context is full.
            InputError: A logit is NaN.
        """
        if not self.steps.ended:
            self.end()
        if not self.steps.ended:
            return None
        ((token, _),) = self.likeliest(1)
        steps = self.runner.steps("decode", self._state, token)
        for site, kernel in reversed(self._replacements):
            with suppress(InputError):  # a function need not have every site of another one
                steps.replace(site, kernel)
        self.tokens.append(token)
        self.steps = steps
        self.step(1)
        return token

    def replace(self, site: str, kernel: str) -> None:
        """Have a kernel serve all launches from here on at some sites, in this call and those after it.

        Raises:
            InputError: The model has no such site, or none of the sites has the kernel.
        """
        self.steps.replace(site, kernel)
        self._replacements.insert(0, (site, kernel))

    def _check_going(self) -> None:
        if self.steps.ended:
            _ = self.launch  # says so

    def close(self) -> None:
        """Give the memory of the run back."""
        self.steps.close()
