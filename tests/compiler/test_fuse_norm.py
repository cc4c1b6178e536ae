"""Products that compute the norm before them: fewer launches, the same bits, and nobody is misled by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.artifact.kernel_list import problem_text
from relax_llm.errors import KernelError
from tests.artifact.checkpoints import GPT2, LLAMA, write
from tests.door.kernels import over_bf16
from tests.machines import PLAINER

if TYPE_CHECKING:
    from pathlib import Path

IDS = np.random.default_rng(3).integers(0, 37, 20).astype(np.int32)
IN_LAYERS = ("layers.0.self_attn.q_proj+k_proj+v_proj", "layers.0.mlp.gate_proj+up_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama") / "checkpoint", LLAMA)


def _compiled(checkpoint: Path, weights: str, **options: Any) -> rl.Artifact:
    return rl.compile(checkpoint, weights=weights, target=PLAINER, **options)


def _without() -> Any:
    pipeline = rl.pipeline()
    pipeline.remove("FuseNorm")
    return pipeline


def _operators(artifact: rl.Artifact, function: str = "decode") -> list[str]:
    manifest = artifact.manifest
    return [manifest.kernels[launch.kernel].operator for launch in manifest.functions[function]]


def _fused(artifact: rl.Artifact) -> list[str]:
    """The sites whose products normalize."""
    manifest = artifact.manifest
    return [
        launch.site
        for launch in manifest.functions["decode"]
        if manifest.kernels[launch.kernel].problem.get("norm")
    ]


def _same_logits(one: rl.Artifact, other: rl.Artifact, **options: Any) -> None:
    runners = [rl.Runner(artifact, **options) for artifact in (one, other)]
    for length in (1, 5, 20):
        states = [runner.start() for runner in runners]
        first, second = (
            [runner.prefill(state, IDS[:length]), runner.decode(state, 7)]
            for runner, state in zip(runners, states, strict=True)
        )
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("config", "weights"), [(LLAMA, "bf16"), (GPT2, "q4")], ids=["llama-bf16", "gpt2-q4"]
)
def test_fewer_launches_and_the_same_bits(tmp_path: Path, config: dict[str, Any], weights: str) -> None:
    checkpoint = write(tmp_path / "checkpoint", config)
    fused, apart = _compiled(checkpoint, weights), _compiled(checkpoint, weights, pipeline=_without())
    for function in ("prefill", "decode", "logits", "hidden"):
        assert len(_operators(fused, function)) == len(_operators(apart, function)) - 2
        assert _operators(fused, function).count("norm") == 1, "the last one, which the head does not take in"
    assert len(_fused(fused)) == 2
    assert not _fused(apart)
    _same_logits(fused, apart)
    _same_logits(fused, apart, selection="pinned")


def test_for_this_processor(checkpoint: Path) -> None:
    """Where it has instructions of its own for them, activations are packed for these."""
    fused, apart = (rl.compile(checkpoint, weights="q8", **more) for more in ({}, {"pipeline": _without()}))
    assert _fused(fused) == list(IN_LAYERS)
    _same_logits(fused, apart)
    problems = [problem_text(kernel.problem) for kernel in fused.manifest.kernels.values()]
    assert any(text.endswith("activations=int8 norm(hidden=24 eps=1e-05)") for text in problems)


@pytest.mark.parametrize("weights", ["f32", "f16"])
def test_activations_that_are_not_packed_are_not_normalized_there(checkpoint: Path, weights: str) -> None:
    artifact = _compiled(checkpoint, weights)
    assert not _fused(artifact)
    assert _operators(artifact).count("norm") == 3


def test_a_norm_with_a_kernel_of_yours_stays_a_launch(checkpoint: Path) -> None:
    @rl.kernel("norm", form="python", sites="layers.0.input_layernorm")
    def mine(problem: Any, x: Any, weight: Any, out: Any) -> None:
        out[...] = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + problem.eps) * weight

    artifact = _compiled(checkpoint, "q8", kernels=[mine])
    assert _fused(artifact) == [IN_LAYERS[1]]
    assert artifact.plan.at("layers.0.input_layernorm").serving({"M": 1}).kernel == "mine"


def test_a_product_with_a_kernel_of_yours_is_given_what_the_norm_made(checkpoint: Path) -> None:
    """Another kernel's norm is its own, and the bits are those of a norm that is a launch."""

    def rows(problem: Any) -> str:
        return over_bf16("rows")

    def with_mine(**options: Any) -> rl.Artifact:
        mine = rl.kernel("matmul", weights=("bf16",), sites="*.q_proj")(rows)
        return _compiled(checkpoint, "bf16", kernels=[mine], **options)

    fused, apart = with_mine(), with_mine(pipeline=_without())
    site = IN_LAYERS[0]
    assert site in _fused(fused)
    for artifact in (fused, apart):
        assert artifact.plan.at(site).serving({"M": 5}).kernel == "rows"
    _same_logits(fused, apart)


def test_a_norm_cannot_be_absorbed_by_name() -> None:
    with pytest.raises(KernelError, match="absorbs names norm"):
        rl.kernel("matmul", absorbs=("norm",))


def test_a_plan_that_was_made_for_the_product_alone_keeps_it_so(checkpoint: Path) -> None:
    apart = _compiled(checkpoint, "q8", pipeline=_without())
    assert not _fused(_compiled(checkpoint, "q8", plan=apart.plan))
    fused = _compiled(checkpoint, "q8")
    assert _fused(_compiled(checkpoint, "q8", plan=fused.plan)) == list(IN_LAYERS)


def test_a_plan_is_tuned_for_both(checkpoint: Path) -> None:
    plan = rl.tune(checkpoint, weights="q8", budget=0)
    problems = {site: entry.problem for entry in plan.entries for site in entry.sites}
    assert "norm_hidden24" in problems[IN_LAYERS[0]]


def test_each_launch_is_compared_with_what_it_computes(checkpoint: Path) -> None:
    """What is added to the stream is what a norm's module is given, although that is no launch of its own."""
    fused = _compiled(checkpoint, "q8")
    found = rl.compare(fused, reference=checkpoint, prompt=IDS[:6].tolist(), decodes=1)
    assert found.agrees
    labels = {site.site: site.counterpart for site in found.sites}
    assert labels["layers.0.self_attn.o_proj"] == "the input of model.layers.0.post_attention_layernorm"
    assert labels[IN_LAYERS[0]].startswith("the output of model.layers.0.self_attn.q_proj")
    exact = _compiled(checkpoint, "f32", kv_cache="f32")
    beside = rl.compare(fused, exact, prompt=IDS[:6].tolist(), decodes=1)
    assert beside.agrees
    assert set(IN_LAYERS) <= {site.site for site in beside.sites}
