"""Prompt lookup: the same answers, token for token, from fewer calls."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies

import relax_llm as rl
from relax_llm.runtime.answer import Generation, Piece
from relax_llm.runtime.generation import generate, stream
from relax_llm.runtime.speculation import History

from .fake_runner import FakeRunner, FakeState, byte_tokenizer, speaker

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TOKENIZER = byte_tokenizer()
ECHO = "to be or not to be, that is to be or not to be, to be, to be"


def answers(generation: Generation) -> tuple[Any, ...]:
    """All of an answer but what it cost."""
    return (
        generation.text,
        generation.token_ids,
        generation.logprobs,
        generation.top_logprobs,
        generation.finish_reason,
    )


def saying(answer: str, prompt: str, **more: Any) -> FakeRunner:
    return FakeRunner(tokenizer=TOKENIZER, says=speaker(TOKENIZER, prompt, answer), **more)


def expected_continuation(tokens: Sequence[int], ngram: int, count: int) -> list[int]:
    """By trying every place, and by writing down one token after another."""
    for length in range(min(ngram, len(tokens)), 0, -1):
        ending = list(tokens[len(tokens) - length :])
        for begin in range(len(tokens) - length - 1, -1, -1):
            if list(tokens[begin : begin + length]) == ending:
                text = list(tokens)
                for at in range(begin + length, begin + length + count):
                    text.append(text[at])
                return text[len(tokens) :]
    return []


@settings(max_examples=300, deadline=None)
@given(
    strategies.lists(strategies.integers(0, 3), max_size=30),
    strategies.integers(1, 5),
    strategies.integers(-1, 9),
)
def test_a_continuation_is_that_of_the_longest_ngram_seen_last(
    tokens: list[int], ngram: int, count: int
) -> None:
    expected = expected_continuation(tokens, ngram, max(count, 0))
    assert History(ngram, tokens).continuation(count) == expected
    history = History(ngram)
    for token_id in tokens:
        history.append(token_id)
    assert history.continuation(count) == expected


@pytest.mark.parametrize("most", [1, 2, 7, 1000])
@pytest.mark.parametrize("ngram", [1, 2, 3, 8])
def test_answers_are_the_same_and_take_fewer_calls(most: int, ngram: int) -> None:
    plain, drafting = saying(ECHO, ECHO), saying(ECHO, ECHO)
    expected = generate(plain, ECHO)
    answer = generate(drafting, ECHO, prompt_lookup=most, prompt_lookup_ngram=ngram)
    assert answers(answer) == answers(expected)
    timings = answer.timings
    assert 0 < timings.accepted_tokens <= timings.drafted_tokens
    decoded = len(answer.token_ids) - 1
    assert len(drafting.evaluated) - 1 == decoded - timings.accepted_tokens < len(plain.evaluated) - 1
    assert max(drafting.evaluated[1:]) <= 1 + most
    assert (expected.timings.drafted_tokens, expected.timings.accepted_tokens) == (0, 0)


@settings(max_examples=200, deadline=None)
@given(
    strategies.text("ab", min_size=1, max_size=12),
    strategies.text("ab", max_size=20),
    strategies.integers(1, 9),
    strategies.integers(1, 4),
    strategies.integers(1, 25),
    strategies.integers(1, 30),
    strategies.lists(strategies.sampled_from(["a", "bb", "aba", "bbab"]), max_size=2),
)
def test_whatever_ends_the_answer(
    prompt: str, script: str, most: int, ngram: int, limit: int, room: int, stops: list[str]
) -> None:
    """Stop tokens, stop strings, the limit and the end of the context, inside of a draft and at its ends."""
    options: dict[str, Any] = {"max_new_tokens": limit, "stop": stops}
    for stop_tokens in (None, TOKENIZER.encode("b"), []):
        results = []
        for lookup in (0, most):
            runner = saying(script, prompt, context_length=len(prompt) + room)
            state = runner.start()
            answer = generate(
                runner,
                prompt,
                state=state,
                stop_tokens=stop_tokens,
                prompt_lookup=lookup,
                prompt_lookup_ngram=ngram,
                **options,
            )
            results.append((answers(answer), state.tokens, len(runner.evaluated)))
        assert results[1][:2] == results[0][:2]
        assert results[1][2] <= results[0][2]


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 4},
    {"temperature": 2.0, "logprobs": 3},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 0},
    {"temperature": 1.0, "min_p": 0.01, "presence_penalty": 1.0, "logit_bias": {7: 3.0}},
]


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_draws_are_the_same_under_a_seed(options: dict[str, Any]) -> None:
    """A network that repeats itself often, but not always."""

    class Repeating(FakeRunner):
        def prefill(self, state: FakeState, token_ids: Sequence[int], output: str = "last") -> Any:
            logits = super().prefill(state, token_ids, output)
            before = (
                state.tokens[len(state.tokens) - len(token_ids) :] if output == "all" else state.tokens[-1:]
            )
            for row, token_id in zip(np.atleast_2d(logits), before, strict=True):
                row[(token_id + 1) % 5] += 7
            return logits

    drafted = kept = 0
    for seed in range(5):
        runner = Repeating()
        expected = generate(runner, [1, 2, 3, 4, 0, 1], max_new_tokens=60, seed=seed, **options)
        answer = generate(
            runner, [1, 2, 3, 4, 0, 1], max_new_tokens=60, seed=seed, prompt_lookup=5, **options
        )
        assert answers(answer) == answers(expected)
        kept += answer.timings.accepted_tokens
        drafted += answer.timings.drafted_tokens
    assert drafted > kept > 0


def test_at_every_piece_the_state_is_that_of_plain_decoding() -> None:
    states = []
    for lookup in (0, 6):
        runner = saying(ECHO, ECHO)
        state = runner.start()
        pieces = stream(runner, ECHO, state=state, prompt_lookup=lookup)
        states.append([(list(state.tokens), piece.text) for piece in pieces])
    assert states[0] == states[1]


@pytest.mark.parametrize("taken", range(1, 30, 4))
def test_an_answer_may_be_abandoned_inside_of_a_draft(taken: int) -> None:
    runner = saying(ECHO, ECHO)
    state = runner.start()
    pieces = stream(runner, ECHO, state=state, prompt_lookup=6)
    seen = list(itertools.islice(pieces, taken))
    pieces.close()
    begun = TOKENIZER.encode(ECHO)
    assert state.tokens == [*begun, *(piece.token_id for piece in seen[:-1])]
    again = generate(runner, [*state.tokens, seen[-1].token_id], state=state, max_new_tokens=5)
    assert again.text == ECHO[taken : taken + 5]


def test_a_state_used_between_two_pieces_and_put_back() -> None:
    """What was verified is gone then, and is evaluated again."""
    runner = saying(ECHO, ECHO)
    state = runner.start()
    text = ""
    for piece in stream(runner, ECHO, state=state, prompt_lookup=6):
        text += piece.text
        runner.decode(state, 9)
        state.truncate(state.length - 1)
    assert text == ECHO


def test_ctrl_c_in_a_verification_leaves_no_draft_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = saying(ECHO, ECHO)
    state = runner.start()
    prefill = FakeRunner.prefill

    def interrupted(
        self: FakeRunner, state: FakeState, token_ids: Sequence[int], output: str = "last"
    ) -> Any:
        logits = prefill(self, state, token_ids, output)
        if output == "all":
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(FakeRunner, "prefill", interrupted)
    seen: list[Piece] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(stream(runner, ECHO, state=state, prompt_lookup=6))
    said = TOKENIZER.encode(ECHO)
    answered = len(state.tokens) - len(said)
    assert state.tokens == [*said, *said[:answered]]
    assert answered > 0


def test_drafts_grow_where_they_are_kept_and_shrink_where_they_are_not() -> None:
    loop = FakeRunner(says=lambda tokens: 1 + len(tokens) % 3)
    generate(loop, [1, 2, 3] * 3, max_new_tokens=40, prompt_lookup=4)
    assert loop.evaluated[1] == 5
    wrong = FakeRunner(says=lambda tokens: 5 if len(tokens) % 2 else 6 + len(tokens))
    generate(wrong, [5, 1, 5, 2, 5, 3, 5, 4], max_new_tokens=60, prompt_lookup=16)
    assert wrong.evaluated[1] == 17 or wrong.evaluated[2] == 17
    assert max(wrong.evaluated[12:]) <= 2


@pytest.mark.parametrize("alike", [1, 2, 5])
def test_drafts_are_as_short_as_the_kernels_of_one_token_serve(alike: int) -> None:
    runner = FakeRunner(says=lambda tokens: 1 + len(tokens) % 3, tokens_alike=alike)
    answer = generate(runner, [1, 2, 3] * 3, max_new_tokens=40, prompt_lookup=16)
    assert max(runner.evaluated[1:]) == alike
    assert (answer.timings.drafted_tokens > 0) == (alike > 1)


def test_answers_where_more_rows_are_rounded_otherwise(models: dict[str, Path]) -> None:
    """A kernel for up to 4 rows that sums in float64, beside those of this project for more."""

    @rl.kernel("matmul", form="python", m=(1, 4), sites="layers.*.mlp.*")
    def precise(problem: object, x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
        out[:] = x.astype(np.float64) @ weight.T.astype(np.float64)

    runner = rl.Runner(rl.compile(models["llama"], kernels=[precise]))
    assert runner.tokens_alike == 4
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    alone = [runner.decode(state, token_id) for state in [runner.start()] for token_id in ids]
    assert (runner.prefill(runner.start(), ids, output="all") != alone).any()
    options: dict[str, Any] = {"max_new_tokens": 60, "logprobs": 2, "stop_tokens": []}
    expected = runner.generate(ids * 2, **options)
    with runner.counting() as counts:
        answer = runner.generate(ids * 2, prompt_lookup=16, **options)
    assert answers(answer) == answers(expected)
    assert answer.timings.accepted_tokens > 0
    assert counts.kernel("precise", M=4) > 0


@pytest.mark.parametrize("selection", ["dynamic", "pinned"])
@pytest.mark.parametrize("ngram", [1, 3])
def test_compiled_models(model: rl.Runner, ngram: int, selection: Any) -> None:
    """Bitwise the same logits, with the kernels of plain decoding."""
    runner = rl.Runner(model.artifact, selection=selection)
    random = np.random.default_rng(0)
    kept = 0
    for length in (1, 5, 16, 30):
        prompt = random.integers(0, runner.vocab_size, length).tolist() * 2
        states = runner.start(), runner.start()
        options: dict[str, Any] = {"max_new_tokens": 60, "logprobs": 2, "stop_tokens": []}
        expected = runner.generate(prompt, state=states[0], **options)
        answer = runner.generate(
            prompt, state=states[1], prompt_lookup=7, prompt_lookup_ngram=ngram, **options
        )
        assert answers(answer) == answers(expected)
        assert states[0].tokens == states[1].tokens
        kept += answer.timings.accepted_tokens
        np.testing.assert_array_equal(runner.decode(states[0], 3), runner.decode(states[1], 3))
    assert kept > 0


def test_to_the_end_of_a_compiled_models_context(models: dict[str, Path], plainer_machine: None) -> None:
    runner = rl.Runner(rl.compile(models["llama"]), selection="pinned")
    prompt = [3, 1, 4, 1, 5] * ((runner.context_length - 20) // 5)
    results = [
        runner.generate(prompt, max_new_tokens=999, stop_tokens=[], prompt_lookup=lookup) for lookup in (0, 9)
    ]
    assert answers(results[0]) == answers(results[1])
    assert results[1].finish_reason == "context"
