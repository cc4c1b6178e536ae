"""Something beside every launch: it finds what differs, where, and leaves nothing behind."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import InputError
from tests.finding.planting import ALSO_GUILTY, BAD, DOWN, GUILTY, LAYERS, UNTRIED, WORSE, tampered
from tests.machines import PLAINER

if TYPE_CHECKING:
    from pathlib import Path

    from relax_llm.runtime.launch import Launch

IDS = list(range(UNTRIED))


@pytest.fixture
def runner(planted: rl.Artifact) -> rl.Runner:
    return rl.Runner(planted)


def run(runner: rl.Runner, decodes: int = 2) -> list[Any]:
    state = runner.start()
    return [runner.prefill(state, IDS), *(runner.decode(state, token) for token in range(decodes))]


def test_a_kernel_beside_the_wrong_one(runner: rl.Runner) -> None:
    with runner.plan(WORSE), runner.shadow("layers.*", "right") as shadow:
        run(runner)
    first = shadow.first
    assert first is not None
    assert (first.site, first.operator, first.kernel, first.shadow) == (
        ALSO_GUILTY,
        "matmul",
        "wrong",
        "right",
    )
    assert (first.call, first.function, first.sizes["M"]) == (0, "prefill", UNTRIED)
    assert first.element == (0, UNTRIED - 1, 22)
    assert first.value - first.expected == pytest.approx(0.5, abs=1e-5)
    assert (shadow.launches, shadow.disagreements) == (3 * LAYERS, 2)
    assert shadow.sites == (ALSO_GUILTY, GUILTY)
    assert "right disagrees at 2 of 18 launches, at 2 sites; first at layers.1.mlp.down_proj" in str(shadow)
    data = json.loads(shadow.to_json())
    assert data["first"]["site"] == ALSO_GUILTY
    assert data["sites"] == [ALSO_GUILTY, GUILTY]


def test_the_model_goes_on_with_its_own(runner: rl.Runner) -> None:
    with runner.plan(BAD):
        expected = run(runner)
        with runner.shadow("*", rl.float64), runner.shadow("layers.*", "right"):
            shadowed = run(runner)
    np.testing.assert_array_equal(shadowed, expected)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    plain, other = runner.start(2), runner.start(2)
    expected = [runner.prefill(plain, ids, output="all"), runner.decode(plain, [7, 8])]
    with runner.shadow("*", rl.float64) as shadow:
        shadowed = [runner.prefill(other, ids, output="all"), runner.decode(other, [7, 8])]
    assert shadow.first is None
    for ours, right in zip(shadowed, expected, strict=True):
        np.testing.assert_array_equal(ours, right)
    assert not runner._observers.active


def test_the_standard_agrees_with_every_operator(family: tuple[Path, rl.Artifact]) -> None:
    runner = rl.Runner(family[1])
    with runner.shadow("*", rl.float64) as shadow:
        run(runner)
    assert shadow.first is None
    assert 0 < shadow.worst < 1
    functions = runner.artifact.manifest.functions
    assert shadow.launches + shadow.passed == len(functions["prefill"]) + 2 * len(functions["decode"])
    unnamed = [launch.site for launch in functions["decode"] if launch.site == "add"]
    assert shadow.passed == 3 * len(unnamed)
    assert "float64 agrees at" in str(shadow)


@pytest.mark.parametrize(("weights", "kv_cache"), [("bf16", "auto"), ("q4", "auto"), ("f32", "q8")])
def test_the_standard_reads_packed_weights_and_caches(
    families: dict[str, Path], weights: str, kv_cache: str
) -> None:
    """Of a narrow format no more is asked than of f32: the standard has the same weights."""
    artifact = rl.compile(families["llama"], weights=weights, kv_cache=kv_cache, target=PLAINER)
    runner = rl.Runner(artifact)
    with runner.shadow("*", rl.float64) as shadow:
        run(runner)
    assert shadow.first is None
    assert shadow.passed == 0
    assert 0 < shadow.worst < 1


def test_the_standard_finds_the_wrong_kernel_and_no_other(runner: rl.Runner) -> None:
    with runner.plan(BAD), runner.shadow("*", rl.float64) as shadow:
        run(runner)
    assert shadow.sites == (GUILTY,)
    assert shadow.first is not None
    assert shadow.first.element == (0, UNTRIED - 1, 22)
    assert shadow.disagreements == 1
    assert shadow.first.off > 1000


def _one(launch: Launch) -> None:
    launch.outputs[0].reshape(-1)[0] += 0.01


def _elsewhere(launch: Launch) -> None:
    """Overwrite what an earlier step has put into the cache."""
    if launch.sizes["kv_len"] > UNTRIED + 1:
        next(o.value for o in launch.arguments if o.name.endswith("v_cache"))[0, 0, 0, 3, 0] += 0.01


@pytest.mark.parametrize(
    ("site", "operator", "spoil", "result", "element"),
    [
        ("layers.2.self_attn", "append", _one, "", (0, 0, 0, 0)),
        ("layers.2.self_attn", "append", _elsewhere, "v_cache", (0, 0, 3, 0)),
        ("layers.2.self_attn", "attention", _one, "", (0, 0, 0)),
        ("layers.2.input_layernorm", "norm", _one, "", (0, 0, 0)),
        ("embed_tokens", "embedding", _one, "", (0, 0, 0)),
    ],
)
def test_kernels_that_work_in_place_too(
    runner: rl.Runner,
    monkeypatch: pytest.MonkeyPatch,
    site: str,
    operator: str,
    spoil: Any,
    result: str,
    element: tuple[int, ...],
) -> None:
    with (
        tampered(monkeypatch, runner, spoil, site, operator, "decode"),
        runner.shadow("*", rl.float64) as shadow,
    ):
        run(runner)
    assert shadow.sites == (site,)
    assert shadow.first is not None
    assert (shadow.first.operator, shadow.first.result, shadow.first.element) == (operator, result, element)


def test_a_function_beside_a_kernel(runner: rl.Runner) -> None:
    def by_hand(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
        return (x @ weight.T + bias + residual).astype(np.float32)

    with runner.plan(BAD), runner.shadow(DOWN.format("*"), by_hand) as shadow:
        run(runner)
    assert shadow.sites == (GUILTY,)
    assert shadow.launches == 3 * LAYERS
    assert shadow.first is not None
    assert shadow.first.shadow == "by_hand"


def test_a_function_that_works_in_place_is_undone(runner: rl.Runner) -> None:
    """It fills the caches with nonsense, says so in its outputs, and nothing of it stays."""

    def nonsense(qkv: Any, rope: Any, k_cache: Any, v_cache: Any) -> Any:
        qkv[...] = k_cache[...] = v_cache[...] = 7
        return np.full((1, qkv.shape[1], 4, 6), 7, np.float32)

    expected = run(runner)
    with runner.shadow("*.self_attn", nonsense, operator="append") as shadow:
        np.testing.assert_array_equal(run(runner), expected)
    assert shadow.disagreements == shadow.launches == 3 * LAYERS


def test_a_function_that_fails_leaves_the_model_usable(runner: rl.Runner) -> None:
    def fails(*inputs: Any) -> Any:
        inputs[0][...] = np.nan
        raise ValueError("mine")

    expected = run(runner)
    state = runner.start()
    with runner.shadow("layers.2.mlp.down_proj", fails), pytest.raises(ValueError, match="mine"):
        runner.prefill(state, IDS)
    assert state.length == 0
    np.testing.assert_array_equal(runner.prefill(state, IDS), expected[0])
    with (
        runner.shadow("norm", lambda *_: np.zeros(3)),
        pytest.raises(InputError, match="must return float32"),
    ):
        run(runner)
    np.testing.assert_array_equal(run(runner), expected)


def test_where_there_is_nothing_beside(runner: rl.Runner) -> None:
    with runner.plan({"layers.*": "right"}), runner.shadow("layers.*", "right") as shadow:
        run(runner)
    assert str(shadow) == f"right stood beside no launch; {shadow.passed} matched."
    assert shadow.launches == 0
    assert shadow.passed > 3 * LAYERS


def test_a_bound_of_ones_own(runner: rl.Runner) -> None:
    with (
        runner.plan(BAD),
        runner.shadow("layers.*", "right", bound=0.9) as wide,
        runner.shadow("norm", rl.float64, bound=1e-9) as narrow,
    ):
        run(runner)
    assert wide.first is None
    assert narrow.sites == ("norm",)


def test_what_is_not_finite(runner: rl.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(launch: Launch) -> None:
        launch.outputs[0][0, 2, 5] = np.nan

    def by_hand(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
        return (x @ weight.T + bias + residual).astype(np.float32)

    with (
        tampered(monkeypatch, runner, spoil, GUILTY, "matmul"),
        runner.shadow(GUILTY, by_hand) as one,
        runner.shadow(GUILTY, rl.float64) as other,
    ):
        run(runner)
    for shadow in (one, other):
        assert shadow.first is not None
        assert shadow.first.off == math.inf
        assert shadow.first.element == (0, 2, 5)
        assert json.loads(shadow.to_json())["first"]["value"] == "nan"


@pytest.mark.parametrize(
    ("site", "beside", "said"),
    [
        ("nowhere", "right", "No launch matches 'nowhere'; sites are named like"),
        (
            "layers.*",
            "nothing",
            "No kernel 'nothing' can stand beside those at 'layers.*'; there are: .*right",
        ),
        ("norm", "right", "No kernel 'right' can stand beside"),
    ],
)
def test_what_is_refused(runner: rl.Runner, site: str, beside: str, said: str) -> None:
    with pytest.raises(InputError, match=said), runner.shadow(site, beside):
        pytest.fail("entered")
    assert not runner._observers.active
