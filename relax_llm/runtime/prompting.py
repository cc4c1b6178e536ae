"""The prompt: from text or token ids to a filled cache and the logits of the next token."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, TypeVar

from relax_llm.errors import ContextLengthError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from relax_llm.runtime.interface import CacheState, LanguageModel

Result = TypeVar("Result")


def prompt_ids(
    runner: LanguageModel, prompt: str | Iterable[int], *, add_special_tokens: bool = True
) -> list[int]:
    """The token ids of a prompt.

    Args:
        runner: Its tokenizer encodes text, and its sizes say what fits.
        prompt: Text, or token ids that are taken as they are.
        add_special_tokens: Whether text gets the tokens its model expects around it.

    Raises:
        InputError: The prompt is empty, an id is not one of the vocabulary, or text meets no tokenizer.
        ContextLengthError: The prompt is longer than the model's context.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InputError(
                "The prompt is empty; give some text, or token ids (a start token alone will do)."
            )
        if runner.tokenizer is None:
            raise InputError("This artifact has no tokenizer; give the prompt as token ids.")
        ids = runner.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        try:
            if isinstance(prompt, bytes):
                raise TypeError
            ids = [operator.index(token_id) for token_id in prompt]
        except TypeError:
            raise InputError(
                "The prompt must be text or a sequence of whole numbers, one for each token."
            ) from None
    if not ids:
        raise InputError("The prompt has no tokens; give at least one.")
    outside = next((token_id for token_id in ids if not 0 <= token_id < runner.vocab_size), None)
    if outside is not None:
        raise InputError(
            f"The prompt contains token id {outside}; ids go from 0 to {runner.vocab_size - 1} here."
        )
    if len(ids) > runner.context_length:
        raise ContextLengthError(
            f"The prompt has {len(ids)} tokens and the model's context holds {runner.context_length}; "
            "shorten the prompt."
        )
    return ids


def reuse_prefix(state: CacheState, ids: Sequence[int]) -> int:
    """Cut the cache back to the tokens it shares with `ids`, and return how many there are.

    At least the last of `ids` is left out, because evaluating it is what gives the logits of the next token.
    """
    cached = state.tokens
    most = min(len(cached), len(ids) - 1)
    shared = next((index for index in range(most) if cached[index] != ids[index]), most)
    state.truncate(shared)
    return shared


def prefill_in_chunks(
    evaluate: Callable[[CacheState, Sequence[int]], Result],
    state: CacheState,
    ids: Sequence[int],
    *,
    chunk: int,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Append `ids` to the cache, at most `chunk` at a time: a call's working memory grows with its tokens.

    An exception (Ctrl-C included) leaves in the cache the chunks that were done, for the next call to reuse.

    Args:
        evaluate: Appends tokens: `runner.prefill`, or `runner.greedy`.
        state: Its cache is extended.
        ids: At least one token id.
        chunk: How many tokens to evaluate in one call.
        progress: Called with (tokens done, tokens in all) at the start and after each chunk.

    Returns:
        What `evaluate` gives after the last token.
    """
    if progress is not None:
        progress(0, len(ids))
    for begin in range(0, len(ids), chunk):
        result = evaluate(state, ids[begin : begin + chunk])
        if progress is not None:
            progress(min(begin + chunk, len(ids)), len(ids))
    return result
