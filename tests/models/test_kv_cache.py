"""Caches in bf16 and q8: less memory, nearly the same logits, and the same bits however tokens are divided."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.artifact.costs import products_of
from relax_llm.compiler.wanted import kv_cache_for

from ..machines import PLAINER
from .configurations import BY_NAME
from .reference import token_ids, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

LLAMA, GPT2, WINDOWED = "head-dim-6-all-biases-tied", "gpt2-three-heads-inner", "window-5"
CASES = [
    (LLAMA, None, "bf16"),
    (LLAMA, PLAINER, "bf16"),
    (GPT2, PLAINER, "bf16"),
    (WINDOWED, PLAINER, "bf16"),
    (LLAMA, None, "q8"),
    (WINDOWED, PLAINER, "q8"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kv_cache")
    return {name: write_checkpoint(BY_NAME[name], root / name) for name in (LLAMA, GPT2, WINDOWED)}


@pytest.mark.parametrize(("name", "target", "format"), CASES, ids=lambda case: str(case))
def test_a_smaller_cache(checkpoints: dict[str, Path], name: str, target: str | None, format: str) -> None:
    whole = rl.Runner(rl.compile(checkpoints[name], target=target))
    small = rl.Runner(rl.compile(checkpoints[name], target=target, kv_cache=format))
    assert {cache.format for cache in whole.artifact.manifest.caches} == {"f32"}
    assert {cache.format for cache in small.artifact.manifest.caches} == {format}
    ids = token_ids(BY_NAME[name])[0, :90]
    states = [runner.start() for runner in (whole, small)]
    expected, found = (
        runner.prefill(state, ids, output="all") for runner, state in zip((whole, small), states, strict=True)
    )
    most = {"bf16": 0.02, "q8": 0.04}[format]
    assert 0 < np.abs(found - expected).max() < most * np.abs(expected).max()
    head_dim = whole.artifact.manifest.caches[0].head_dim
    keys, values = -(-head_dim // 2) / head_dim, 0.5  # the second half of the last word of an odd key
    if format == "q8":
        keys, values = (share / 2 + 1 / head_dim for share in (keys, values))
    assert states[1].nbytes == pytest.approx(states[0].nbytes * (keys + values) / 2)
    for token in ids[:5]:
        near = [runner.decode(state, token) for runner, state in zip((whole, small), states, strict=True)]
        assert np.abs(near[1] - near[0]).max() < most * np.abs(near[0]).max()


@pytest.mark.parametrize(("name", "target", "format"), CASES, ids=lambda case: str(case))
def test_results_do_not_depend_on_how_tokens_are_divided(
    checkpoints: dict[str, Path], name: str, target: str | None, format: str
) -> None:
    artifact = rl.compile(checkpoints[name], target=target, kv_cache=format)
    runner = rl.Runner(artifact, selection="pinned")
    ids = token_ids(BY_NAME[name])[0, :70]
    whole = runner.prefill(runner.start(), ids, output="all")
    for chunks in ((1,) * 70, (1, 16, 17, 36), (64, 6), (15, 54, 1)):
        state, start, parts = runner.start(), 0, []
        for chunk in chunks:
            parts.append(runner.prefill(state, ids[start : start + chunk], output="all"))
            start += chunk
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("format", ["bf16", "q8"])
def test_states_are_cut_back_and_copied(checkpoints: dict[str, Path], format: str) -> None:
    """Also in the middle of a word, whose other half then belongs to a token that is no more."""
    runner = rl.Runner(rl.compile(checkpoints[LLAMA], target=PLAINER, kv_cache=format), selection="pinned")
    ids = token_ids(BY_NAME[LLAMA])[0, :40]
    state = runner.start()
    runner.prefill(state, ids)
    for length in (39, 33, 20, 1):
        state.truncate(length)
        copy = state.fork()
        fresh = runner.start()
        runner.prefill(fresh, ids[:length])
        expected = runner.decode(fresh, 7)
        np.testing.assert_array_equal(runner.decode(state, 7), expected)
        np.testing.assert_array_equal(runner.decode(copy, 7), expected)
        state.truncate(length)


def test_the_format_that_nobody_asked_for() -> None:
    assert kv_cache_for("f32") == "f32"
    assert [kv_cache_for(weights) for weights in ("bf16", "f16", "q8", "q6")] == ["bf16"] * 4
    assert [kv_cache_for(weights) for weights in ("q4", "q4s")] == ["q8"] * 2
    assert kv_cache_for("q4", "cuda") == "f32"


@pytest.mark.parametrize(("format", "products"), [("f32", "f32"), ("bf16", "bf16"), ("q8", "bf16")])
def test_what_attention_is_held_to(checkpoints: dict[str, Path], format: str, products: str) -> None:
    """Words of two are multiplied as fast whichever they are."""
    manifest = rl.compile(checkpoints[LLAMA], target=PLAINER, kv_cache=format).manifest
    found = {products_of(kernel) for kernel in manifest.kernels.values() if kernel.operator == "attention"}
    assert found == {products}


def test_what_is_not_known_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(rl.RelaxLLMError, match=r"cache format 'q2' is not known; known: f32, bf16, q8, auto"):
        rl.compile(checkpoints[LLAMA], kv_cache="q2")
    with pytest.raises(rl.RelaxLLMError, match="cuda keep caches as f32, not bf16"):
        rl.compile(checkpoints[LLAMA], kv_cache="bf16", target="cuda")


def test_kernels_say_which_caches_they_read(checkpoints: dict[str, Path]) -> None:
    """One for f32 is left out with its reason, one that names bf16 is asked."""

    def in_c(problem: object) -> str:
        raise AssertionError("it must not be asked")

    def declines(problem: object) -> str:
        raise rl.Declined("is only for show")

    plain = rl.kernel("attention", name="plain")(in_c)
    halves = rl.kernel("attention", name="halves", weights=("bf16",))(declines)
    artifact = rl.compile(checkpoints[LLAMA], kernels=[plain, halves], target=PLAINER, kv_cache="bf16")
    said = artifact.plan.explain("layers.0.self_attn")
    assert "plain (valid for every size): reads caches as f32, not bf16" in said
    assert "halves (valid for every size): declined: is only for show" in said
