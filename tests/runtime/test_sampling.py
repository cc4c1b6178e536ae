"""Options, and tokens chosen from logits: compared with transformers' own processors, and with statistics."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tracemalloc
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from relax_llm.errors import InputError, RelaxLLMError
from relax_llm.runtime.sampling import Sampler, SamplingOptions

if TYPE_CHECKING:
    import numpy.typing as npt

VOCAB = 1000

TINY = 1e-37
"""Below this a float32 probability loses digits, and what is left of them differs."""

RELATIVE = 1e-5
"""Of a probability: the difference of two float32 logits up to 64 apart is rounded by up to 2e-6, and exp
turns that into a relative error; temperatures and penalties add a rounding each."""


def some_logits(seed: int, size: int = VOCAB, spread: float = 3.0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(scale=spread, size=size).astype(np.float32)


def tied_logits(seed: int, size: int = VOCAB) -> npt.NDArray[np.float32]:
    """Few distinct values, as low-precision models give: every threshold falls on a tie."""
    return (np.round(some_logits(seed, size) * 2) / 2).astype(np.float32)


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    weights = np.exp(wide - wide.max())
    return np.asarray(weights / weights.sum())


def transformers_probabilities(
    logits: npt.NDArray[np.float32], tokens: list[int], **settings: Any
) -> npt.NDArray[np.float64]:
    """The distribution transformers samples from, its processors made and ordered by its own code."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    bias = settings.pop("logit_bias", None)
    config = GenerationConfig(**{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings})
    if bias:
        config.sequence_bias = {(token_id,): float(value) for token_id, value in bias.items()}
    owner = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda default, custom: default,
    )
    processors = GenerationMixin._get_logits_processor(owner, config, input_ids_seq_length=len(tokens))
    ids, scores = torch.tensor([tokens]), torch.from_numpy(logits.copy())[None]
    return np.asarray(torch.softmax(processors(ids, scores)[0], -1))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB},
    {"top_k": VOCAB + 5},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.4, "top_k": 200, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.2},
    {"logit_bias": {3: 4.0, 5: -100.0, 999: 2.5}},
    {
        "logit_bias": {3: 4.0, 5: -2.0},
        "repetition_penalty": 1.5,
        "temperature": 0.8,
        "top_k": 12,
        "min_p": 0.1,
    },
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s) or "plain")
@pytest.mark.parametrize("make", [some_logits, tied_logits])
def test_distribution_is_that_of_transformers(make: Any, settings: dict[str, Any]) -> None:
    prompt = [3, 5, 5, 17, 400]
    options = SamplingOptions.from_generation_config({}, **{"temperature": 1.0, **settings})
    for seed in range(5):
        logits = make(seed)
        ours = Sampler(options, VOCAB, prompt).probabilities(logits)
        theirs = transformers_probabilities(logits, prompt, **settings)
        if make is tied_logits:  # which of several equal ones top-p keeps is up to torch's unstable sort
            ours, theirs = np.sort(ours), np.sort(theirs)
        assert np.array_equal(ours > TINY, theirs > TINY)
        np.testing.assert_allclose(ours, theirs, rtol=RELATIVE, atol=TINY)


def test_top_p_of_a_flat_distribution_needs_every_round_of_sorting() -> None:
    flat = some_logits(0, size=VOCAB * 5, spread=0.01)
    for top_p in (0.01, 0.2, 0.9, 0.999):
        ours = Sampler(SamplingOptions(temperature=1, top_p=top_p), VOCAB * 5).probabilities(flat)
        theirs = transformers_probabilities(flat, [0], top_p=top_p)
        # float32 sums of 5,000 nearly equal probabilities may put the edge one token to either side
        assert abs(np.count_nonzero(ours) - np.count_nonzero(theirs)) <= 1
        assert ours.sum() == pytest.approx(1)


def test_top_p_of_equal_logits_keeps_the_first_as_many_as_are_needed() -> None:
    ours = Sampler(SamplingOptions(temperature=1, top_p=0.5), 8).probabilities(np.zeros(8, np.float32))
    assert ours.tolist() == [0.25, 0.25, 0.25, 0.25, 0, 0, 0, 0]


def test_repetition_penalty_counts_the_answer_too() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=1.8), 4, [3])
    logits = np.array([2.0, 1.9, 1.2, 0.1], np.float32)
    chosen = [sampler.choose(logits).token_id for _ in range(3)]
    assert chosen == [0, 1, 2]  # 2 / 1.8 = 1.11 < 1.9, then 1.9 / 1.8 = 1.06 < 1.2
    sampled = Sampler(SamplingOptions(temperature=1, repetition_penalty=1.8), 4, [3])
    sampled._remember(0)
    np.testing.assert_allclose(
        sampled.probabilities(logits),
        transformers_probabilities(logits, [3, 0], repetition_penalty=1.8),
        rtol=RELATIVE,
    )


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    """OpenAI's formula: mu[j] -= c[j] * frequency + (c[j] > 0) * presence, c counted over the answer."""
    options = SamplingOptions(temperature=1, presence_penalty=0.7, frequency_penalty=0.4)
    sampler = Sampler(options, 50, prompt_ids=[1, 2, 3])
    logits = some_logits(1, 50)
    counts = np.zeros(50)
    for _ in range(40):
        expected = softmax(logits - (counts * 0.4 + (counts > 0) * 0.7).astype(np.float32))
        np.testing.assert_allclose(sampler.probabilities(logits), expected, rtol=RELATIVE)
        counts[sampler.choose(logits).token_id] += 1
    assert counts.max() > 1, "no token came twice, so the frequency penalty was not tried"


def test_bias_forbids_and_forces() -> None:
    logits = some_logits(2)
    best, second = np.argsort(-logits)[:2]
    assert (
        Sampler(SamplingOptions(logit_bias={int(best): -math.inf}), VOCAB).choose(logits).token_id == second
    )
    assert Sampler(SamplingOptions(logit_bias={7: 1000}), VOCAB).choose(logits).token_id == 7
    with pytest.raises(InputError, match="forbids every token"):
        Sampler(SamplingOptions(logit_bias=dict.fromkeys(range(VOCAB), -math.inf)), VOCAB).choose(logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 6},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1, "logit_bias": {2: 1.0}},
    ],
    ids=lambda s: ",".join(s),
)
@pytest.mark.parametrize("seed", [0, 1])
def test_draws_follow_the_distribution(settings: dict[str, Any], seed: int) -> None:
    """Chi-square over 8,000 draws; the limit is passed by chance once in a million."""
    logits = some_logits(seed, 12, spread=1.0)
    sampler = Sampler(SamplingOptions(**settings, seed=seed), 12)
    expected = sampler.probabilities(logits) * 8_000
    drawn = np.bincount([sampler.choose(logits).token_id for _ in range(8_000)], minlength=12)
    possible = expected > 0
    assert not drawn[~possible].any()
    freedom = np.count_nonzero(possible) - 1
    statistic = ((drawn - expected)[possible] ** 2 / expected[possible]).sum()
    # Wilson and Hilferty: the cube root of chi-square over its freedom is nearly normal; 4.75 sigma
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert 0 < statistic < limit


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = [some_logits(step, spread=1.0) for step in range(30)]

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1, seed=seed), VOCAB)
        return [sampler.choose(row).token_id for row in logits]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_no_draw_lands_on_an_impossible_token() -> None:
    """The ends of the unit interval, with weights of 0 at both ends of the vocabulary."""
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0, -np.inf], np.float32)
    sampler = Sampler(SamplingOptions(temperature=1), 5)
    for drawn, expected in [(0.0, 1), (0.49, 1), (0.51, 3), (math.nextafter(1, 0), 3), (1.0, 3)]:
        sampler._random = SimpleNamespace(random=lambda drawn=drawn: drawn)  # type: ignore[assignment]
        assert sampler.choose(logits).token_id == expected


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = some_logits(4)
    expected = np.log(softmax(logits))
    order = np.argsort(-expected)
    changed: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "logit_bias": {int(order[5]): 50.0}}
    for settings in ({}, changed):
        choice = Sampler(SamplingOptions(logprobs=4, **settings), VOCAB).choose(logits)
        assert choice.token_id == (order[5] if settings else order[0])
        assert choice.logprob == pytest.approx(expected[choice.token_id], abs=1e-6)
        assert [top.token_id for top in choice.top] == order[:4].tolist()
        assert [top.logprob for top in choice.top] == pytest.approx(expected[order[:4]], abs=1e-6)
    chosen_only = Sampler(SamplingOptions(logprobs=0), VOCAB).choose(logits)
    assert chosen_only.top == ()
    assert chosen_only.logprob == pytest.approx(expected.max(), abs=1e-6)
    assert Sampler(SamplingOptions(), VOCAB).choose(logits).logprob is None
    assert len(Sampler(SamplingOptions(logprobs=9), 3).choose(np.zeros(3, np.float32)).top) == 3


def test_log_probabilities_hold_for_extreme_logits() -> None:
    lowest = np.finfo(np.float32).min
    logits = np.array([lowest, 5.0, -np.inf, 5.0], np.float32)
    choice = Sampler(SamplingOptions(temperature=1, seed=0, logprobs=2), 4).choose(logits)
    assert choice.logprob == pytest.approx(math.log(0.5))
    assert [top.token_id for top in choice.top] == [1, 3]


def test_greedy_takes_the_first_of_the_highest_and_copies_nothing() -> None:
    logits = some_logits(3, 49_152)
    logits[[40, 9_000]] = 99
    sampler = Sampler(SamplingOptions(), 49_152, range(2_000))
    assert sampler.choose(logits).token_id == 40
    tracemalloc.start()
    for _ in range(10):
        sampler.choose(logits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000  # a copy of the logits would be 196,608 bytes


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8}, {"temperature": 1, "top_k": 3, "logprobs": 2}]
)
@pytest.mark.parametrize("position", [0, 1, 17, 63, 64, 999])
@pytest.mark.parametrize(
    ("value", "says"), [(math.nan, "contain nan"), (-math.nan, "contain nan"), (math.inf, "contain inf")]
)
def test_broken_logits_are_refused(settings: dict[str, Any], position: int, value: float, says: str) -> None:
    sampler = Sampler(SamplingOptions(**settings), VOCAB)
    good = some_logits(5)
    sampler.choose(good)
    bad = good.copy()
    bad[position] = value
    with pytest.raises(RelaxLLMError, match=f"new token 2 {says}"):
        sampler.choose(bad)
    with pytest.raises(RelaxLLMError, match=says):
        sampler.probabilities(bad)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}])
def test_logits_that_rule_out_everything_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RelaxLLMError, match="the first new token rule out every token"):
        Sampler(SamplingOptions(**settings), 4).choose(np.full(4, -np.inf, np.float32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e-38},
        {"presence_penalty": -3e38, "frequency_penalty": -3e38},
        {"logit_bias": {1: 3e38}, "repetition_penalty": 0.01},
    ],
)
def test_options_that_leave_the_range_of_float32_are_refused(
    settings: dict[str, Any], temperature: float
) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature, **settings), 3, [0, 1, 2])
    sampler._remember(1)
    with pytest.raises(InputError, match="milder"):
        sampler.choose(np.array([0.0, 900.0, 900.0], np.float32))


def test_wrong_shapes_and_ids_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(3,\); expected \(4,\)"):
        Sampler(SamplingOptions(), 4).choose(np.zeros(3, np.float32))
    with pytest.raises(InputError, match=r"shape \(1, 4\)"):
        Sampler(SamplingOptions(), 4).choose(np.zeros((1, 4), np.float32))
    for outside in (4, 2**70):
        with pytest.raises(InputError, match=f"logit_bias names {outside}"):
            Sampler(SamplingOptions(logit_bias={0: 1, outside: 1}), 4)
    for outside in (-1, 4, 2**70):
        with pytest.raises(InputError, match=f"prompt contains {outside}"):
            Sampler(SamplingOptions(repetition_penalty=2), 4, [0, outside])


WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
    ({"temperature": 1e-9}, "temperature is 1e-09; it must be 0 .greedy. or at least"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
    ({"temperature": True}, "temperature is True"),
    ({"top_p": 0}, "top_p is 0; it must be above 0"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": -1}, "top_p is -1"),
    ({"top_k": -1}, "top_k is -1; it must be a whole number"),
    ({"top_k": 2.5}, "top_k is 2.5"),
    ({"top_k": True}, "top_k is True"),
    ({"min_p": -0.1}, "min_p is -0.1"),
    ({"min_p": 1.1}, "min_p is 1.1"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"repetition_penalty": -2}, "repetition_penalty is -2"),
    ({"presence_penalty": math.nan}, "presence_penalty is nan"),
    ({"frequency_penalty": 1e39}, "frequency_penalty is 1e.39; it must be a finite number that float32"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": "x"}, "seed is 'x'"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"logprobs": True}, "logprobs is True"),
    ({"logit_bias": [1]}, "logit_bias is .1.; it must map"),
    ({"logit_bias": {"a": 1}}, "a token id in logit_bias is 'a'"),
    ({"logit_bias": {-1: 1}}, "a token id in logit_bias is -1"),
    ({"logit_bias": {1: "x"}}, "logit_bias of token 1 is 'x'"),
    ({"logit_bias": {1: math.inf}}, "logit_bias of token 1 is inf"),
    ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 is nan"),
]


@pytest.mark.parametrize(("settings", "sentence"), WRONG_OPTIONS, ids=lambda value: str(value)[:30])
def test_wrong_options_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        SamplingOptions(**settings)
    with pytest.raises(InputError, match=sentence):
        SamplingOptions.from_generation_config({}, **settings)


def test_options_are_data() -> None:
    options = SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(3), logit_bias={np.int64(1): 2})
    assert options == SamplingOptions(temperature=0.5, top_k=3, logit_bias={1: 2.0})
    assert hash(options) == hash(SamplingOptions(temperature=0.5, top_k=3, logit_bias={1: 2.0}))
    assert dataclasses.asdict(options)["logit_bias"] == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.top_k = 4  # type: ignore[misc]


SAMPLING_CONFIG = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}

FROM_CONFIG: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {}),
    ({"temperature": 0.6, "top_p": 0.9}, {}, {}),
    ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {}, {}),
    ({"do_sample": None, "temperature": None, "repetition_penalty": None}, {}, {}),
    ({"repetition_penalty": 1.1}, {}, {"repetition_penalty": 1.1}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    (SAMPLING_CONFIG, {}, {"temperature": 0.6, "top_p": 0.9, "top_k": 50}),
    ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}),
    ({"do_sample": True, "top_k": 0, "min_p": 0.1}, {}, {"temperature": 1.0, "min_p": 0.1}),
    (SAMPLING_CONFIG, {"temperature": 0}, {"top_p": 0.9, "top_k": 50}),
    (SAMPLING_CONFIG, {"do_sample": False}, {}),
    (SAMPLING_CONFIG, {"top_p": 1.0, "top_k": 0}, {"temperature": 0.6}),
    (
        SAMPLING_CONFIG,
        {"temperature": None, "seed": 3},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "seed": 3},
    ),
    (
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": True},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 50},
    ),
    ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.8}, {"temperature": 0.8}),
    ({}, {"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
    ({}, {"top_k": 5}, {"temperature": 1.0, "top_k": 5}),
    ({}, {"min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
    ({}, {"top_p": 1.0, "top_k": 0, "seed": 1}, {"seed": 1}),
    ({}, {"temperature": 0, "top_p": 0.9}, {"top_p": 0.9}),
    ({"do_sample": True, "top_p": 7}, {"top_p": 0.5}, {"temperature": 1.0, "top_k": 50, "top_p": 0.5}),
]


@pytest.mark.parametrize(("config", "said", "expected"), FROM_CONFIG)
def test_from_generation_config(
    config: dict[str, Any], said: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert SamplingOptions.from_generation_config(config, **said) == SamplingOptions(**expected)


def test_sampling_configs_mean_what_they_mean_to_transformers() -> None:
    """The same config, given to transformers' own defaults, leaves the same distribution."""
    from transformers import GenerationConfig

    logits = some_logits(8, spread=0.5)
    values: dict[str, list[Any]] = {
        "temperature": [None, 0.6],
        "top_k": [None, 20],
        "top_p": [None, 0.9],
        "min_p": [None, 0.2],
    }
    for combination in itertools.product(*values.values()):
        config = {"do_sample": True, **dict(zip(values, combination, strict=True))}
        settings = {
            **GenerationConfig._get_default_generation_params(),
            **{k: v for k, v in config.items() if v},
        }
        used = {
            name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in settings
        }
        options = SamplingOptions.from_generation_config(config)
        ours = Sampler(options, VOCAB).probabilities(logits)
        np.testing.assert_allclose(ours, transformers_probabilities(logits, [0], **used), rtol=RELATIVE)


@pytest.mark.parametrize(
    ("config", "said", "sentence"),
    [
        (
            {"do_sample": True, "top_p": 7},
            {},
            "checkpoint's generation config cannot be followed: top_p is 7",
        ),
        (
            {"do_sample": True, "temperature": "x"},
            {},
            "generation config cannot be followed: temperature is 'x'",
        ),
        ({}, {"do_sample": "yes"}, "do_sample is 'yes'"),
        ({}, {"do_sample": True, "temperature": 0}, "do_sample is true and temperature is 0"),
        ({}, {"do_sample": False, "top_k": 4}, "do_sample is false, but"),
        ({}, {"temprature": 1}, "no option 'temprature'; did you mean temperature?"),
        ({}, {"zzz": 1}, "no option 'zzz'; the options are do_sample, "),
    ],
)
def test_contradictions_and_unknown_names_are_refused(
    config: dict[str, Any], said: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence.replace("?", r"\?")):
        SamplingOptions.from_generation_config(config, **said)
