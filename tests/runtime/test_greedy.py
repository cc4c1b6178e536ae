"""Greedy tokens found in the library: the same as from the logits, however a runner is watched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import InputError, RelaxLLMError
from relax_llm.runtime import vm
from relax_llm.runtime.generation import generate
from relax_llm.runtime.interface import Likeliest
from relax_llm.runtime.sampling import Sampler, SamplingOptions

from .fake_runner import FakeRunner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def test_it_is_the_largest_logit(model: rl.Runner) -> None:
    ours, plain = model.start(), model.start()
    logits = model.prefill(plain, IDS)
    found = model.greedy(ours, IDS)
    for step in range(5):
        token_id = int(logits.argmax())
        assert (found.token_id, found.logit) == (token_id, logits[token_id])
        assert type(found.token_id) is int
        logits = model.decode(plain, token_id)
        found = model.greedy(ours, token_id if step % 2 else [token_id])
    assert ours.tokens == plain.tokens


def test_of_a_batch(model: rl.Runner) -> None:
    ids = np.array([IDS, IDS[::-1], [7] * len(IDS)])
    ours, plain = model.start(batch=3), model.start(batch=3)
    for tokens in (ids, ids[:, :1]):
        found = model.greedy(ours, tokens)
        logits = model.prefill(plain, tokens)
        np.testing.assert_array_equal(found.token_id, logits.argmax(axis=-1))
        np.testing.assert_array_equal(found.logit, logits.max(axis=-1))


@pytest.mark.parametrize("ids", [[], None, "text", [[1, 2], [3, 4]], [1.5], 10**6], ids=repr)
def test_what_is_refused_leaves_the_state(model: rl.Runner, ids: Any) -> None:
    state = model.start()
    with pytest.raises(InputError):
        model.greedy(state, ids)
    assert state.length == 0


def test_it_is_a_function_of_logits(model: rl.Runner) -> None:
    with pytest.raises(
        InputError, match=r"greedy is a function of logits, not of tokens; Runner\.greedy calls it"
    ):
        model.steps("greedy", model.start(), IDS)


def test_watched_in_every_way(model: rl.Runner, tmp_path: Path) -> None:
    """Counted, traced, compared with float64, recorded: the same token, and the launch is among those that are seen."""
    expected = model.greedy(model.start(), IDS)
    site = model.artifact.manifest.functions["greedy"][0].site
    with model.counting() as counts:
        assert model.greedy(model.start(), IDS) == expected
    assert counts.launches(site=site, operator="argmax", kernel="by_lane", M=1) == 1
    with model.tracing() as trace:
        assert model.greedy(model.start(), IDS) == expected
    assert [call.function for call in trace.calls] == ["prefill", "greedy"]
    assert [launch.operator for launch in trace.calls[1].launches] == ["argmax"]
    with model.shadow(site, rl.float64) as shadow:
        assert model.greedy(model.start(), IDS) == expected
    assert shadow.launches == 1
    assert not shadow.first
    with model.recording(tmp_path / "greedy.rec", site=site):
        assert model.greedy(model.start(), IDS) == expected
    (launch,) = rl.replay(tmp_path / "greedy.rec")
    assert launch.operator == "argmax"
    assert model.greedy(model.start(), IDS) == expected


def test_generation_is_the_same_without_the_logits(model: rl.Runner) -> None:
    plain = model.generate(IDS, max_new_tokens=12, temperature=0, stop_tokens=[])
    looked_at = model.generate(IDS, max_new_tokens=12, temperature=0, stop_tokens=[], logprobs=0)
    assert plain.token_ids == looked_at.token_ids


@pytest.mark.parametrize(
    "value", [np.nan, -np.nan, np.inf, -np.inf], ids=["nan", "negative nan", "inf", "-inf"]
)
@pytest.mark.parametrize("options", [{}, {"logprobs": 0}], ids=["greedy", "logprobs"])
def test_logits_that_are_none(
    model: rl.Runner, monkeypatch: pytest.MonkeyPatch, value: float, options: dict[str, Any]
) -> None:
    """The sentence is the same whether the library looks for the largest, or NumPy."""
    decode = model._calls.functions["decode"]

    def broken(*arguments: Any) -> Any:
        result = decode(*arguments)
        vm.view(result)[..., 3 if value != -np.inf else slice(None)] = value
        return result

    monkeypatch.setitem(model._calls.functions, "decode", broken)
    said = "rule out every token" if value == -np.inf else f"contain {abs(value)}"
    with pytest.raises(RelaxLLMError, match=f"logits for new token 2 {said}"):
        model.generate(IDS, max_new_tokens=3, temperature=0, stop_tokens=[], **options)


USES: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy": ({}, True),
    "greedy as said": ({"temperature": 0}, True),
    "drawn": ({"temperature": 0.5, "seed": 1}, False),
    "log-probabilities": ({"logprobs": 0}, False),
    "a bias": ({"logit_bias": {5: 1.0}}, False),
    "a repetition penalty": ({"repetition_penalty": 1.1}, False),
    "a presence penalty": ({"presence_penalty": 0.1}, False),
    "drafts": ({"prompt_lookup": 3}, False),
}


@pytest.mark.parametrize("case", list(USES))
def test_only_where_nothing_else_looks_at_the_logits(case: str) -> None:
    options, taken = USES[case]
    runner = FakeRunner()
    answer = generate(runner, [1, 2, 3], max_new_tokens=6, **options)
    assert len(answer.token_ids) == 6
    assert runner.taken == (6 if taken else 0)


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), float("-inf")])
def test_a_sampler_refuses_alike(logit: float) -> None:
    messages = []
    logits = np.full(9, logit, np.float32)
    steps: list[Callable[[Sampler], object]] = [
        lambda sampler: sampler.take(Likeliest(0, logit)),
        lambda sampler: sampler.choose(logits),
    ]
    for step in steps:
        sampler = Sampler(SamplingOptions(), 9)
        sampler.take(Likeliest(2, 1.0))
        with pytest.raises(RelaxLLMError) as caught:
            step(sampler)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "new token 2" in messages[0]
