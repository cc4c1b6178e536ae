"""What is run to find something out: a prompt, and some tokens after it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relax_llm.errors import InputError
from relax_llm.runtime.runner import Runner

PROMPT = "The capital of France is Paris, and that of Japan is Tokyo. One, two, three, four,"
DECODES = 3

_RANDOM = 17  # tokens where there is no tokenizer: more than a tile of the cache


@dataclass(frozen=True)
class Workload:
    """A prompt, and how many tokens are decoded after it.

    Attributes:
        prompt: Token ids.
        decodes: Calls of decode; each is given the token that the reference finds likeliest.
    """

    prompt: tuple[int, ...]
    decodes: int = DECODES


def workload(
    runner: Runner,
    prompt: str | Sequence[int] | None = None,
    decodes: int = DECODES,
    length: int | None = None,
) -> Workload:
    """Tokens for a model.

    Args:
        runner: The model.
        prompt: Text or token ids; None for a sentence, or for random tokens where there is no tokenizer.
        decodes: How many tokens follow.
        length: Instead of a prompt: so many random tokens, the same ones each time.

    Raises:
        InputError: There is no token, text cannot be encoded without a tokenizer, or they do not fit the context.
    """
    whole = isinstance(decodes, int) and not isinstance(decodes, bool)
    if not whole or decodes < 0:
        raise InputError(f"decodes must be a whole number from 0 on, not {decodes!r}.")
    if length is not None:
        if prompt is not None:
            raise InputError("A prompt has a length of its own; give one or the other.")
        if length < 1:
            raise InputError(f"length must be at least 1, not {length}.")
    tokenizer = runner.tokenizer
    if prompt is None and length is None and tokenizer is not None:
        prompt = PROMPT
    if prompt is None:
        drawn = np.random.default_rng(0).integers(0, runner.vocab_size, length or _RANDOM)
        ids = [int(token) for token in drawn]
    elif isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("The artifact has no tokenizer; give the prompt as token ids, or a length.")
        ids = list(tokenizer.encode(prompt))
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise InputError("The prompt has no tokens; give at least one.")
    if len(ids) + decodes > runner.context_length:
        raise InputError(
            f"{len(ids)} tokens and {decodes} more exceed the model's context of {runner.context_length}; "
            "shorten the prompt."
        )
    return Workload(tuple(ids), decodes)
