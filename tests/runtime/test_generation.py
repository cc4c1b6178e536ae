"""Generation over a small NumPy model whose text depends on every token in its cache."""

from __future__ import annotations

import gc
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from relax_llm.errors import ContextLengthError, InputError, RelaxLLMError
from relax_llm.runtime.answer import Generation, Timings
from relax_llm.runtime.generation import DEFAULT_NEW_TOKENS, generate, stream
from relax_llm.runtime.generation_config import unapplied_settings
from relax_llm.runtime.prompting import reuse_prefix
from relax_llm.text.tokenizer import Tokenizer

from .fake_runner import FakeRunner, FakeState, byte_tokenizer, speaker

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_id
assert END is not None


def by_hand(runner: FakeRunner, ids: list[int], count: int) -> list[int]:
    """Greedy decoding without any of what is tested here."""
    state = runner.start()
    logits = runner.prefill(state, ids)
    chosen = []
    for _ in range(count):
        chosen.append(int(logits.argmax()))
        logits = runner.decode(state, chosen[-1])
    return chosen


def saying(answer: str, prompt: str = "Q", **more: Any) -> FakeRunner:
    return FakeRunner(tokenizer=TOKENIZER, says=speaker(TOKENIZER, prompt, answer), **more)


def test_greedy_is_the_most_likely_token_at_each_step() -> None:
    runner = FakeRunner()
    answer = generate(runner, [5, 6, 7], max_new_tokens=20)
    assert list(answer.token_ids) == by_hand(FakeRunner(), [5, 6, 7], 20)
    assert answer.finish_reason == "length"
    assert answer.text == ""  # there is no tokenizer
    assert answer.logprobs == ()
    assert answer.top_logprobs == ()


def test_prompts_may_be_text_or_any_sequence_of_ids() -> None:
    runner = FakeRunner(tokenizer=TOKENIZER)
    ids = TOKENIZER.encode("Hello")
    expected = generate(runner, "Hello", max_new_tokens=5)
    for prompt in (ids, tuple(ids), np.array(ids), iter(ids)):
        again = generate(runner, prompt, max_new_tokens=5)
        assert (again.token_ids, again.text) == (expected.token_ids, expected.text)


def test_stop_token_ends_the_answer_and_has_no_text() -> None:
    runner = saying("An answer.")
    pieces = list(stream(runner, "Q"))
    assert "".join(piece.text for piece in pieces) == "An answer."
    assert pieces[-1].token_id == END
    assert pieces[-1].text == ""
    assert pieces[-1].finish_reason == "stop_token"
    assert all(piece.finish_reason is None and piece.timings is None for piece in pieces[:-1])
    assert len(pieces) == len("An answer.") + 1


def test_an_ordinary_token_that_stops_has_no_text_either() -> None:
    dot = TOKENIZER.encode(".")[0]
    answer = generate(saying("An answer. More."), "Q", stop_tokens=dot)
    assert (answer.text, answer.finish_reason) == ("An answer", "stop_token")
    assert answer.token_ids[-1] == dot


def test_stop_tokens_of_the_generation_config_come_before_the_tokenizers() -> None:
    dot, comma = (TOKENIZER.encode(character)[0] for character in ".,")
    for eos, expected in [(dot, "a,b"), ([comma, dot], "a"), ([dot, 9999], "a,b")]:
        runner = saying("a,b.c", generation_config={"eos_token_id": eos})
        assert generate(runner, "Q").text == expected
    runner = saying("a,b", generation_config={"eos_token_id": dot})
    assert generate(runner, "Q", max_new_tokens=9).finish_reason == "length"
    assert generate(runner, "Q", max_new_tokens=9, stop_tokens=[comma]).text == "a"


def test_without_stop_tokens_the_answer_runs_on() -> None:
    answer = generate(saying("ab"), "Q", stop_tokens=[], max_new_tokens=6)
    assert answer.finish_reason == "length"
    assert answer.token_ids[2:] == (END,) * 4
    assert answer.text == "ab"  # special tokens are not written


def test_stop_string_across_tokens_is_cut_out() -> None:
    pieces = list(stream(saying("one\ntwo\n\nthree"), "Q", stop=["\n\n", "zzz"]))
    assert [piece.text for piece in pieces] == ["o", "n", "e", "", "\nt", "w", "o", "", ""]
    assert pieces[-1].finish_reason == "stop_string"
    assert Generation.of(pieces).text == "one\ntwo"
    assert len(Generation.of(pieces).token_ids) == len("one\ntwo\n\n")


@pytest.mark.parametrize(
    ("limit", "text", "reason"),
    [(3, "abE", "length"), (4, "abEN", "length"), (5, "ab", "stop_string"), (None, "ab", "stop_string")],
)
def test_what_was_held_back_comes_out_at_the_end(limit: int | None, text: str, reason: str) -> None:
    answer = generate(saying("abEND"), "Q", stop="END", max_new_tokens=limit)
    assert (answer.text, answer.finish_reason) == (text, reason)


def test_held_text_comes_out_before_a_stop_token() -> None:
    answer = generate(saying("abEN"), "Q", stop="END")
    assert (answer.text, answer.finish_reason) == ("abEN", "stop_token")


def test_stop_strings_of_the_generation_config_are_the_default() -> None:
    runner = saying("a|b#c", generation_config={"stop_strings": ["#"]})
    assert generate(runner, "Q").text == "a|b"
    assert generate(runner, "Q", stop="|").text == "a"
    assert generate(runner, "Q", stop=[]).text == "a|b#c"


def test_characters_of_many_tokens_are_never_cut() -> None:
    text = "naïve 音楽 🎵!"
    pieces = list(stream(saying(text), "Q"))
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text in ("", *text) for piece in pieces)
    assert len(pieces) == len(text.encode()) + 1
    half = generate(saying("é🎵"), "Q", max_new_tokens=4)
    assert half.text == "é\ufffd"  # two of the four bytes of a note
    assert half.finish_reason == "length"


def test_a_character_begun_in_the_prompt_is_completed_in_the_answer() -> None:
    note = TOKENIZER.encode("🎵")
    script = [*note[1:], *TOKENIZER.encode("!")]
    runner = FakeRunner(tokenizer=TOKENIZER, says=lambda tokens: script[len(tokens) - 1])
    assert generate(runner, note[:1], max_new_tokens=4).text == "🎵!"


def sentencepiece_like() -> Tokenizer:
    """Llama's decoder: a space in front of words, one token for each byte, the first space dropped."""
    words = ["<unk>", "▁is", "▁jazz", "zy", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer.build(backend, {}, {})


@pytest.mark.parametrize(
    ("prompt", "script", "text"),
    [
        (
            ["▁is"],
            ["▁jazz", "zy"],
            " jazzzy",
        ),  # and not "jazzzy", which is what decoding the answer alone gives
        (["▁is", "<0x0A>"], ["▁jazz"], " jazz"),  # the newline is the prompt's, though it is decoded later
        (["▁is", "<0x0A>"], ["<0x0A>", "zy"], "\nzy"),
        (["▁is", "<0xC3>"], ["<0xA9>", "zy"], "ézy"),
        (["▁is", "<0x0A>"], ["<0x41>"], "A"),
    ],
)
def test_the_text_continues_the_prompts(prompt: list[str], script: list[str], text: str) -> None:
    tokenizer = sentencepiece_like()
    given, says = ([tokenizer.token_to_id(token) for token in tokens] for tokens in (prompt, script))
    runner = FakeRunner(tokenizer=tokenizer, says=lambda tokens: says[len(tokens) - len(given)] or 0)
    answer = generate(runner, [token or 0 for token in given], max_new_tokens=len(script))
    assert answer.text == text


@pytest.mark.parametrize("prompt_length", [1, 3, 9, 10])
def test_the_answer_ends_where_the_context_does(prompt_length: int) -> None:
    runner = FakeRunner(context_length=10)
    state = runner.start()
    answer = generate(runner, range(prompt_length), state=state, max_new_tokens=50)
    assert answer.finish_reason == "context"
    assert len(answer.token_ids) == 10 - prompt_length + 1  # the last one is chosen and no longer evaluated
    assert state.length == 10
    exact = generate(runner, range(prompt_length), max_new_tokens=10 - prompt_length + 1)
    assert exact.finish_reason == "length"


def test_how_many_tokens_when_nobody_says() -> None:
    assert len(generate(FakeRunner(), [1]).token_ids) == DEFAULT_NEW_TOKENS
    assert len(generate(FakeRunner(generation_config={"max_new_tokens": 7}), [1]).token_ids) == 7
    assert (
        len(generate(FakeRunner(generation_config={"max_new_tokens": 7}), [1], max_new_tokens=2).token_ids)
        == 2
    )


@pytest.mark.parametrize("chunk", [1, 2, 7, 8, 512])
def test_prefill_in_chunks_gives_the_same(chunk: int) -> None:
    runner = FakeRunner()
    prompt = list(range(30, 45))
    steps: list[tuple[int, int]] = []
    answer = generate(
        runner,
        prompt,
        max_new_tokens=4,
        prefill_chunk=chunk,
        progress=lambda done, of: steps.append((done, of)),
    )
    assert list(answer.token_ids) == by_hand(FakeRunner(), prompt, 4)
    bounds = [*range(0, 15, chunk), 15]
    assert steps == [(done, 15) for done in bounds]
    assert runner.evaluated == [b - a for a, b in itertools.pairwise(bounds)] + [1, 1, 1]


def test_sampling_repeats_under_a_seed_and_follows_the_generation_config() -> None:
    config = {"do_sample": True, "temperature": 1.3, "top_k": 100}
    runner = FakeRunner(generation_config=config)
    greedy = by_hand(runner, [1, 2], 12)

    def answer(**options: Any) -> tuple[int, ...]:
        return generate(runner, [1, 2], max_new_tokens=12, **options).token_ids

    assert answer(seed=3) == answer(seed=3) != answer(seed=4)
    assert answer(seed=3) != tuple(greedy)
    assert answer(temperature=0) == answer(do_sample=False) == answer(top_k=1) == tuple(greedy)
    plain = FakeRunner(generation_config={"temperature": 1.3, "top_k": 100})
    assert generate(plain, [1, 2], max_new_tokens=12).token_ids == tuple(greedy)


def test_penalties_see_prompt_and_answer() -> None:
    runner = FakeRunner(says=lambda _: 7)
    assert set(generate(runner, [1], max_new_tokens=6).token_ids) == {7}
    banned = generate(runner, [1], max_new_tokens=6, logit_bias={7: -math.inf})
    assert 7 not in banned.token_ids
    once = generate(runner, [1], max_new_tokens=6, presence_penalty=200.0)
    assert once.token_ids[0] == 7
    assert 7 not in once.token_ids[1:]
    never = generate(runner, [1, 7], max_new_tokens=6, repetition_penalty=1000.0)
    assert 7 not in never.token_ids


def test_log_probabilities_belong_to_their_tokens() -> None:
    runner = FakeRunner()
    answer = generate(runner, [4, 5], max_new_tokens=5, temperature=1.5, seed=0, logprobs=3)
    assert len(answer.logprobs) == len(answer.top_logprobs) == 5
    state = runner.start()
    logits = runner.prefill(state, [4, 5]).astype(np.float64)
    for token_id, logprob, top in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True):
        expected = logits - np.log(np.exp(logits).sum())
        assert logprob == pytest.approx(expected[token_id], abs=1e-5)
        assert [entry.token_id for entry in top] == np.argsort(-expected)[:3].tolist()
        logits = runner.decode(state, token_id).astype(np.float64)


@pytest.mark.parametrize(
    ("cached", "ids", "kept"),
    [
        ([], [1, 2], 0),
        ([1, 2], [1, 2], 1),
        ([1, 2, 3], [1, 2], 1),
        ([1, 2], [1, 2, 3], 2),
        ([1, 9, 3], [1, 2, 3], 1),
        ([9], [1, 2], 0),
        ([1], [1], 0),
        ([1, 2, 3], [3], 0),
    ],
)
def test_reuse_prefix(cached: list[int], ids: list[int], kept: int) -> None:
    runner = FakeRunner()
    state = runner.start()
    if cached:
        runner.prefill(state, cached)
    assert reuse_prefix(state, ids) == kept
    assert state.tokens == ids[:kept]
    assert state.length == kept


def test_a_conversation_evaluates_only_what_is_new() -> None:
    runner = FakeRunner()
    state = runner.start()
    first = generate(runner, [1, 2, 3], state=state, max_new_tokens=4)
    conversation = [1, 2, 3, *first.token_ids, 9, 9]
    runner.evaluated.clear()
    second = generate(runner, conversation, state=state, max_new_tokens=4)
    assert runner.evaluated == [3, 1, 1, 1]  # the last token of the first answer was never evaluated
    assert second.timings.reused_tokens == 6
    assert second.token_ids == generate(FakeRunner(), conversation, max_new_tokens=4).token_ids


def test_the_same_prompt_again_gives_the_same_answer_at_once() -> None:
    runner = FakeRunner()
    state = runner.start()
    first = generate(runner, range(20), state=state, max_new_tokens=6)
    runner.evaluated.clear()
    again = generate(runner, range(20), state=state, max_new_tokens=6)
    assert again.token_ids == first.token_ids
    assert runner.evaluated == [1] * 6
    assert again.timings.reused_tokens == 19


def usable(runner: FakeRunner, state: FakeState, prompt: Sequence[int]) -> bool:
    """Whether the state holds what its tokens say, and goes on as a fresh one would."""
    fresh = FakeRunner()
    copy = fresh.start()
    if state.tokens:
        fresh.prefill(copy, state.tokens)
    same = state.length == copy.length and all(map(np.array_equal, state.hidden, copy.hidden))
    again = generate(runner, prompt, state=state, max_new_tokens=3)
    return same and again.token_ids == generate(fresh, prompt, max_new_tokens=3).token_ids


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_an_answer_may_be_abandoned(taken: int) -> None:
    runner = FakeRunner()
    state = runner.start()
    pieces = stream(runner, range(8), state=state, max_new_tokens=10)
    seen = list(itertools.islice(pieces, taken))
    pieces.close()
    assert len(seen) == taken
    assert state.length == (8 + taken - 1 if taken else 0)
    assert usable(runner, state, [*range(8), 30])


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_in_the_model_leaves_the_state_usable(
    calls: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = FakeRunner()
    state = runner.start()
    prefill = FakeRunner.prefill

    def interrupted(self: FakeRunner, state: FakeState, token_ids: Sequence[int]) -> Any:
        if len(self.evaluated) == calls and not after:
            raise KeyboardInterrupt
        logits = prefill(self, state, token_ids)
        if len(self.evaluated) > calls:
            raise KeyboardInterrupt
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(FakeRunner, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(runner, range(8), state=state, max_new_tokens=10, prefill_chunk=3)
    assert usable(runner, state, range(9))


def test_nothing_is_evaluated_before_the_first_piece() -> None:
    runner = FakeRunner()
    state = runner.start()
    pieces = stream(runner, [1, 2], state=state)
    assert runner.evaluated == []
    del pieces
    gc.collect()
    assert state.length == 0


def test_a_state_used_between_two_pieces_is_noticed() -> None:
    runner = FakeRunner()
    state = runner.start()
    pieces = stream(runner, [1, 2], state=state)
    next(pieces)
    fork = state.fork()
    runner.decode(fork, 5)
    next(pieces)
    runner.decode(state, 5)
    with pytest.raises(InputError, match=r"The state has 4 tokens where this answer left 3.*fork"):
        next(pieces)


def test_nan_stops_with_a_sentence() -> None:
    class Broken(FakeRunner):
        def prefill(self, state: FakeState, token_ids: Sequence[int], output: str = "last") -> Any:
            logits = super().prefill(state, token_ids, output)
            if state.length == 4:
                logits[100] = np.nan
            return logits

    pieces = stream(Broken(), [1, 2])
    with pytest.raises(RelaxLLMError, match="logits for new token 3 contain nan"):
        list(pieces)


def test_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the model moves: 1 s for each token, and the caller's hour between pieces."""
    now = [0.0]
    monkeypatch.setattr("relax_llm.runtime.generation.time.perf_counter", lambda: now[0])

    class Slow(FakeRunner):
        def prefill(self, state: FakeState, token_ids: Sequence[int], output: str = "last") -> Any:
            now[0] += len(token_ids)
            return super().prefill(state, token_ids, output)

    runner = Slow()
    state = runner.start()
    runner.prefill(state, [0, 1])
    timings = None
    for piece in stream(runner, range(10), state=state, max_new_tokens=5):
        timings = piece.timings
        now[0] += 3600
    assert timings == Timings(10, 2, 8.0, 5, 4.0, 8.0)
    assert timings is not None
    assert timings.prefill_tokens_per_second == 1.0
    assert timings.decode_tokens_per_second == 1.0
    assert timings.as_dict()["decode_tokens_per_second"] == 1.0
    assert timings.as_dict()["reused_tokens"] == 2


def test_rates_of_nothing_are_zero() -> None:
    timings = generate(FakeRunner(), [1], max_new_tokens=1).timings
    assert timings.decode_tokens_per_second == 0.0
    assert timings.decode_seconds == 0.0
    assert timings.time_to_first_token >= timings.prefill_seconds > 0


WRONG: list[tuple[Any, dict[str, Any], type[InputError], str]] = [
    ("", {}, InputError, "The prompt is empty"),
    ([], {}, InputError, "The prompt has no tokens"),
    (["a"], {}, InputError, "must be text or a sequence of whole numbers"),
    ([1.0], {}, InputError, "must be text or a sequence of whole numbers"),
    (7, {}, InputError, "must be text or a sequence of whole numbers"),
    (b"abc", {}, InputError, "must be text or a sequence of whole numbers"),
    (np.array([[1, 2]]), {}, InputError, "must be text or a sequence of whole numbers"),
    ([1, -1], {}, InputError, "prompt contains token id -1; ids go from 0 to 263"),
    ([264], {}, InputError, "prompt contains token id 264"),
    ([2**80], {}, InputError, f"prompt contains token id {2**80}"),
    (range(31), {}, ContextLengthError, "The prompt has 31 tokens and the model's context holds 30"),
    ("x" * 31, {}, ContextLengthError, "The prompt has 31 tokens"),
    ("x", {"max_new_tokens": 0}, InputError, "max_new_tokens is 0; it must be a whole number, 1 or above"),
    ("x", {"max_new_tokens": 2.5}, InputError, "max_new_tokens is 2.5"),
    ("x", {"max_new_tokens": True}, InputError, "max_new_tokens is True"),
    ("x", {"prefill_chunk": 0}, InputError, "prefill_chunk is 0"),
    ("x", {"prompt_lookup": -1}, InputError, "prompt_lookup is -1; it must be a whole number, 0 or above"),
    ("x", {"prompt_lookup": True}, InputError, "prompt_lookup is True"),
    ("x", {"prompt_lookup_ngram": 0}, InputError, "prompt_lookup_ngram is 0"),
    ("x", {"temperature": -1}, InputError, "temperature is -1"),
    ("x", {"top_q": 1}, InputError, "no option 'top_q'"),
    ("x", {"stop": [""]}, InputError, "stop strings contain ''"),
    ("x", {"stop_tokens": [264]}, InputError, "stop_tokens contains 264"),
    ("x", {"logit_bias": {264: 1}}, InputError, "logit_bias names 264"),
]


@pytest.mark.parametrize(("prompt", "options", "kind", "sentence"), WRONG, ids=lambda value: str(value)[:20])
def test_wrong_calls_are_refused_before_anything_is_evaluated(
    prompt: Any, options: dict[str, Any], kind: type[InputError], sentence: str
) -> None:
    runner = FakeRunner(tokenizer=TOKENIZER, context_length=30)
    state = runner.start()
    runner.prefill(state, [1, 2, 3])
    with pytest.raises(InputError, match=sentence) as caught:
        stream(runner, prompt, state=state, **options)
    assert type(caught.value) is kind
    assert state.tokens == [1, 2, 3]
    assert runner.evaluated == [3]


def test_without_a_tokenizer_text_and_stop_strings_are_refused() -> None:
    with pytest.raises(InputError, match="no tokenizer; give the prompt as token ids"):
        stream(FakeRunner(), "text")
    with pytest.raises(InputError, match=r"no stop string can be found; pass stop=\[\]"):
        stream(FakeRunner(), [1], stop="x")


def test_a_state_of_more_than_one_sequence_is_refused() -> None:
    runner = FakeRunner()
    state = runner.start()
    state.batch = 3  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="This state has batch 3"):
        stream(runner, [1], state=state)


def test_pieces_without_their_end_are_no_answer() -> None:
    pieces = list(stream(FakeRunner(), [1], max_new_tokens=3))
    assert len(Generation.of(pieces).token_ids) == 3
    for part in ([], pieces[:2]):
        with pytest.raises(InputError, match="no whole answer"):
            Generation.of(part)


def test_settings_that_are_not_applied_are_named() -> None:
    config = {"num_beams": 4, "no_repeat_ngram_size": 0, "typical_p": 0.9, "bad_words_ids": None, "top_k": 5}
    assert unapplied_settings(config) == (
        "The checkpoint's generation config sets num_beams to 4, which is not applied.",
        "The checkpoint's generation config sets typical_p to 0.9, which is not applied.",
    )
    from transformers import GenerationConfig

    assert unapplied_settings(GenerationConfig._get_default_generation_params()) == ()
