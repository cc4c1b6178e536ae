"""From a prompt to an answer: one piece for each token as it comes, or all of it at the end."""

from __future__ import annotations

import numbers
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relax_llm.errors import InputError
from relax_llm.runtime.answer import Generation, Piece, Timings
from relax_llm.runtime.prompting import prefill_in_chunks, prompt_ids, reuse_prefix
from relax_llm.runtime.sampling import Sampler, SamplingOptions
from relax_llm.runtime.sampling_options import SamplingOverrides
from relax_llm.runtime.speculation import DEFAULT_NGRAM, PromptLookup
from relax_llm.runtime.stopping import StopStrings, end_tokens, stop_strings
from relax_llm.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from typing_extensions import Unpack

    from relax_llm.runtime.answer import FinishReason
    from relax_llm.runtime.interface import CacheState, LanguageModel
    from relax_llm.text.tokenizer import Tokenizer

__all__ = ["Generation", "GenerationOptions", "Piece", "Timings", "generate", "stream"]

DEFAULT_NEW_TOKENS = 256
"""How long an answer may get where neither the caller nor the generation config says."""

DEFAULT_PREFILL_CHUNK = 1024
"""How many tokens of a prompt are evaluated in one call."""


class GenerationOptions(SamplingOverrides, total=False):
    """The keywords of `stream`, for what passes them on."""

    max_new_tokens: int | None
    stop: str | Iterable[str] | None
    stop_tokens: int | Iterable[int] | None
    add_special_tokens: bool
    prefill_chunk: int
    progress: Callable[[int, int], None] | None
    prompt_lookup: int
    prompt_lookup_ngram: int


def stream(
    runner: LanguageModel,
    prompt: str | Iterable[int],
    *,
    state: Any = None,
    max_new_tokens: int | None = None,
    stop: str | Iterable[str] | None = None,
    stop_tokens: int | Iterable[int] | None = None,
    add_special_tokens: bool = True,
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
    prompt_lookup: int = 0,
    prompt_lookup_ngram: int = DEFAULT_NGRAM,
    **sampling: Unpack[SamplingOverrides],
) -> Generator[Piece, None, None]:
    """Answer a prompt, yielding each token as it is chosen.

    Options are checked here and now; the work begins with the first piece that is asked for. It may be
    abandoned at any time (`close`, an exception, Ctrl-C): the state then holds the tokens evaluated so far,
    and can be used.

    Args:
        runner: Evaluates tokens.
        prompt: Text, or token ids.
        state: A state of `runner.start()` to work in, batch 1. What its cache shares with the prompt is not
            evaluated again, and the rest of it is cut off: to continue a conversation, give all its tokens.
            None starts a new one.
        max_new_tokens: How many tokens the answer may have. None takes the generation config's, or else 256.
        stop: Strings that end the answer and are not part of its text. None takes the generation config's.
        stop_tokens: Token ids that end it. None takes the checkpoint's; an empty list lets it run on.
        add_special_tokens: Whether text gets the tokens its model expects around it.
        prefill_chunk: How many tokens of the prompt to evaluate in one call.
        progress: Called with (tokens done, tokens to do) while the prompt is evaluated.
        prompt_lookup: How many tokens to draft at most: what followed the last tokens once before is verified in
            one call of the model. The answer is the one without drafts; where they agree it comes sooner. So drafts
            are no longer than the kernels of one token serve (`Runner.tokens_alike`). 0 is off.
        prompt_lookup_ngram: How many of the last tokens are looked up, where they are found together.
        **sampling: `do_sample` and the fields of `SamplingOptions`: temperature, top_k, top_p, min_p,
            repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed, logprobs. What is not
            said comes from the generation config (see `SamplingOptions.from_generation_config`); where that
            says nothing, decoding is greedy.

    Yields:
        One piece for each token; the last has the finish reason and the timings.

    Raises:
        InputError: An option is outside its limits, or the prompt is empty or not usable.
        ContextLengthError: The prompt is longer than the model's context.
        RelaxLLMError: The model computes NaN.
    """
    began = time.perf_counter()
    config, tokenizer = runner.generation_config, runner.tokenizer
    options = SamplingOptions.from_generation_config(config, **sampling)
    limit = _whole("max_new_tokens", _first(max_new_tokens, config.get("max_new_tokens"), DEFAULT_NEW_TOKENS))
    chunk = _whole("prefill_chunk", prefill_chunk)
    drafted = _whole("prompt_lookup", prompt_lookup, least=0)
    ngram = _whole("prompt_lookup_ngram", prompt_lookup_ngram)
    stops = stop_strings(stop, config)
    if tokenizer is None and stops:
        raise InputError("This artifact has no tokenizer, so no stop string can be found; pass stop=[].")
    ends = end_tokens(stop_tokens, config, tokenizer.stop_ids if tokenizer else (), runner.vocab_size)
    if state is not None and getattr(state, "batch", 1) != 1:
        raise InputError(f"This state has batch {state.batch}; text is generated in a state of batch 1.")
    ids = prompt_ids(runner, prompt, add_special_tokens=add_special_tokens)
    sampler = Sampler(options, runner.vocab_size, ids)
    text = _AnswerText(tokenizer, ids, StopStrings(stops))
    if drafted and (alike := runner.tokens_alike) is not None:
        drafted = min(drafted, alike - 1)
    lookup = PromptLookup(runner, ids, drafted, ngram, ends) if drafted else None
    task = _Task(runner, ids, sampler, text, ends, limit, chunk, progress, lookup)
    return _pieces(task, state, time.perf_counter() - began)


def generate(
    runner: LanguageModel,
    prompt: str | Iterable[int],
    *,
    state: Any = None,
    **options: Unpack[GenerationOptions],
) -> Generation:
    """Answer a prompt and return the whole answer. Takes and refuses what `stream` does."""
    return Generation.of(stream(runner, prompt, state=state, **options))


@dataclass(frozen=True)
class _Task:
    """All that is settled before the first token is evaluated."""

    runner: LanguageModel
    ids: list[int]
    sampler: Sampler
    text: _AnswerText
    ends: frozenset[int]
    limit: int
    chunk: int
    progress: Callable[[int, int], None] | None
    lookup: PromptLookup | None


def _pieces(task: _Task, state: CacheState | None, encoding_seconds: float) -> Generator[Piece, None, None]:
    runner, ids = task.runner, task.ids
    resumed = time.perf_counter()
    cache: CacheState = runner.start() if state is None else state
    reused = reuse_prefix(cache, ids)
    greedy = task.lookup is None and task.sampler.takes_likeliest  # then nobody looks at the logits
    evaluate: Callable[[Any, Sequence[int]], Any] = runner.greedy if greedy else runner.prefill
    found = prefill_in_chunks(evaluate, cache, ids[reused:], chunk=task.chunk, progress=task.progress)
    prefill_seconds = time.perf_counter() - resumed
    first_token_seconds = decode_seconds = 0.0
    count = 0
    while True:
        choice = task.sampler.take(found) if greedy else task.sampler.choose(found)
        count += 1
        text, reason = _read(task, choice.token_id, last=count == task.limit, full=_is_full(runner, cache))
        now = time.perf_counter()
        if count == 1:
            first_token_seconds = encoding_seconds + now - resumed
        else:
            decode_seconds += now - resumed
        if reason is not None:
            drafts = (task.lookup.drafted, task.lookup.accepted) if task.lookup else ()
            timings = Timings(
                len(ids), reused, prefill_seconds, count, decode_seconds, first_token_seconds, *drafts
            )
            yield Piece(text, choice.token_id, choice.logprob, choice.top, reason, timings)
            return
        evaluated = cache.length
        yield Piece(text, choice.token_id, choice.logprob, choice.top)
        resumed = time.perf_counter()
        if cache.length != evaluated:
            raise InputError(
                f"The state has {cache.length} tokens where this answer left {evaluated}: it was used for "
                "something else between two pieces. Give that a copy of it: state.fork()."
            )
        if greedy:
            found = runner.greedy(cache, choice.token_id)
        elif task.lookup is None:
            found = runner.decode(cache, choice.token_id)
        else:
            found = task.lookup.decode(cache, choice.token_id, task.limit - count)


def _is_full(runner: LanguageModel, cache: CacheState) -> bool:
    return cache.length >= runner.context_length


def _read(task: _Task, token_id: int, *, last: bool, full: bool) -> tuple[str, FinishReason | None]:
    """The text that a token adds, and whether it ends the answer."""
    if token_id in task.ends:
        return task.text.finish(), "stop_token"
    text = task.text.push(token_id)
    if not task.text.stopped and (last or full):
        text += task.text.finish()
    if task.text.stopped:
        return text, "stop_string"
    if last:
        return text, "length"
    return text, "context" if full else None


class _AnswerText:
    """Text of the answer's tokens, with what may be half a character or a stop string held back.

    The detokenizer reads the prompt first, so that the answer's text continues it: a SentencePiece decoder
    drops the space in front of the first token it sees. What it holds back of the prompt is not the answer's.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], strings: StopStrings) -> None:
        self._strings = strings
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._owed = ""
        if tokenizer is not None and self._detokenizer is not None:
            self._owed = tokenizer.decode(prompt)[len(self._detokenizer.read(prompt)) :]

    @property
    def stopped(self) -> bool:
        return self._strings.found is not None

    def push(self, token_id: int) -> str:
        if self._detokenizer is None:
            return ""
        return self._strings.push(self._without_owed(self._detokenizer.push(token_id)))

    def finish(self) -> str:
        if self._detokenizer is None:
            return ""
        return self._strings.push(self._without_owed(self._detokenizer.flush())) + self._strings.flush()

    def _without_owed(self, text: str) -> str:
        if text and self._owed:
            text, self._owed = text.removeprefix(self._owed), ""
        return text


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _whole(name: str, value: Any, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number, {least} or above.")
    return int(value)
