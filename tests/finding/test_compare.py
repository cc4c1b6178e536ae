"""A model beside another: each planted error is found where it is, and what inherits it is not blamed."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import CheckpointError, InputError
from relax_llm.finding.comparison import HEADER, KINDS_HEADER
from relax_llm.runtime.calls import Calls
from tests.artifact.checkpoints import GPT2, LLAMA, write
from tests.compiler.uneven import WIDE, uneven
from tests.finding.planting import BAD, GOOD, GUILTY, UNTRIED, tampered
from tests.machines import PLAINER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from relax_llm.runtime.launch import Launch


def test_the_kernel_that_is_wrong_is_named_and_no_other(planted: rl.Artifact) -> None:
    found = rl.compare(planted, plan=BAD, length=UNTRIED)
    assert found.over == (GUILTY,)
    assert not found.agrees
    first = found.first
    assert first is not None
    assert (first.site, first.kernel, first.function, first.call) == (GUILTY, "wrong", "prefill", 0)
    assert first.sizes == {"batch": 1, "seq": UNTRIED, "kv_len": UNTRIED, "M": UNTRIED}
    assert first.local.index == (0, UNTRIED - 1, 22)
    assert first.local.value - first.local.reference == pytest.approx(0.5, abs=1e-5)
    assert f"{GUILTY}: the matmul by wrong in call 0" in found.sentence()
    # What comes behind inherits the error, and adds none of its own.
    behind = [site for site in found.sites if site.call == 0 and site.index > first.index]
    assert all(site.accumulated.relative > 1e-3 for site in behind if site.operator == "matmul")
    assert max(site.local.relative / site.bound for site in behind if site.bound) < 1


def test_at_another_size_nothing_is_wrong(planted: rl.Artifact) -> None:
    found = rl.compare(planted, plan=BAD, length=UNTRIED + 1)
    assert found.agrees
    assert found.first is None
    assert found.over == ()


def test_channels_of_other_sizes_are_no_difference(tmp_path: Path) -> None:
    """Where weights have few bits channels are scaled; beside f32 and transformers each launch is what it should be."""
    checkpoint = uneven(write(tmp_path / "checkpoint", WIDE))
    passes = rl.pipeline()
    passes.remove("FuseNorm")  # so that a norm, whose channels are scaled, is seen
    small, exact, fused = (
        rl.compile(checkpoint, weights=weights, kv_cache="f32", target=PLAINER, pipeline=pipeline)
        for weights, pipeline in (("q8", passes), ("f32", None), ("q8", None))
    )
    assert small.channels
    norm = "layers.0.post_attention_layernorm"
    for found in (
        rl.compare(small, exact, prompt=[1, 2, 3, 4, 5]),
        rl.compare(small, reference=checkpoint, prompt=[1, 2, 3, 4, 5]),
        rl.compare(exact, small, prompt=[1, 2, 3, 4, 5]),
    ):
        assert found.over == ()
        assert max(site.local.relative for site in found.sites if site.site == norm) < 1e-5
    for found in (rl.compare(fused, exact, prompt=[1, 2, 3]), rl.compare(fused, small, prompt=[1, 2, 3])):
        assert found.over == ()
        assert norm not in {site.site for site in found.sites}


def test_a_model_beside_itself(planted: rl.Artifact) -> None:
    found = rl.compare(planted, planted, prompt=[1, 2, 3, 4, 5])
    assert found.agrees
    assert found.alone == ()
    assert all(site.local.max_abs == site.accumulated.max_abs == 0 for site in found.sites)
    assert [call.divergence for call in found.calls] == [0] * 4
    functions = planted.manifest.functions
    assert len(found.sites) == len(functions["prefill"]) + 3 * len(functions["decode"])
    assert [(site.site, site.index) for site in found.sites[: len(functions["prefill"])]] == [
        (launch.site, index) for index, launch in enumerate(functions["prefill"])
    ]
    assert [(call.function, call.seq, call.kv_len) for call in found.calls] == [
        ("prefill", 5, 5),
        *(("decode", 1, length) for length in (6, 7, 8)),
    ]


def test_runners_as_they_are_told_to_run(planted: rl.Artifact) -> None:
    good, bad = rl.Runner(planted), rl.Runner(planted)
    with good.plan(GOOD), bad.plan(GOOD), bad.force(GUILTY, "wrong"):
        found = rl.compare(bad, good, length=UNTRIED, decodes=0)
    assert found.over == (GUILTY,)
    assert rl.compare(bad, good, length=UNTRIED, decodes=0).over == (), "taken back"


def test_bf16_differs_a_little_everywhere_and_is_within_its_bounds(families: dict[str, Path]) -> None:
    exact, rounded = (
        rl.compile(families["llama"], weights=weights, target=PLAINER) for weights in ("f32", "bf16")
    )
    found = rl.compare(rounded, exact, length=20)
    assert found.agrees
    for site in found.sites:
        reads = site.operator in ("matmul", "embedding")
        assert (1e-5 < site.local.relative < 2e-2) if reads else site.local.relative <= site.bound
    assert all(1e-12 < call.divergence < 1e-2 for call in found.calls)
    assert max(call.logits.relative for call in found.calls) < 0.05


@pytest.mark.parametrize("kv_cache", ["bf16", "q8"])
def test_a_smaller_cache_differs_where_it_is_written_and_read(
    families: dict[str, Path], kv_cache: str
) -> None:
    whole, small = (
        rl.compile(families["llama"], kv_cache=format, target=PLAINER) for format in ("f32", kv_cache)
    )
    found = rl.compare(small, whole, length=20)
    assert found.agrees
    for site in found.sites:
        if site.operator in ("append", "attention"):
            assert 1e-4 < site.local.relative < site.bound
    assert all(1e-12 < call.divergence < 1e-2 for call in found.calls)


def _twice(launch: Launch) -> None:
    launch.outputs[0][0, -1, ...] *= 1.01


def _cache(kind: str) -> Callable[[Launch], None]:
    def spoil(launch: Launch) -> None:
        for operand in launch.arguments:
            if operand.name.endswith(kind):
                operand.value[0, 0, 0, 1, 1] += 0.01

    return spoil


LLAMA_SITES: list[tuple[str, str, str, Any]] = [
    ("embed_tokens", "embedding", "", _twice),
    ("layers.1.input_layernorm", "norm", "", _twice),
    ("layers.1.self_attn.q_proj+k_proj+v_proj", "matmul", "", _twice),
    ("layers.1.self_attn", "append", "k_cache", _cache("k_cache")),
    ("layers.1.self_attn", "append", "v_cache", _cache("v_cache")),
    ("layers.1.self_attn", "attention", "", _twice),
    ("layers.1.self_attn.o_proj", "matmul", "", _twice),
    ("layers.1.mlp.gate_proj+up_proj", "matmul", "", _twice),
    ("layers.0.mlp.down_proj", "matmul", "", _twice),
    ("norm", "norm", "", _twice),
    ("lm_head", "matmul", "", _twice),
]
GPT2_SITES: list[tuple[str, str, str, Any]] = [
    ("wpe", "embedding", "", _twice),
    ("h.1.attn.c_attn", "matmul", "", _twice),
    ("h.1.attn", "append", "v_cache", _cache("v_cache")),
    ("h.1.attn", "attention", "", _twice),
    ("h.0.mlp.c_fc", "matmul", "", _twice),
    ("h.1.mlp.c_proj", "matmul", "", _twice),
    ("wte", "matmul", "", _twice),
]


@pytest.mark.parametrize("function", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("family_name", "site", "operator", "result", "spoil"),
    [
        *(("llama", *row) for row in LLAMA_SITES),
        *(("gpt2", *row) for row in GPT2_SITES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_of_every_operator_is_found_beside_transformers(
    families: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    family_name: str,
    site: str,
    operator: str,
    result: str,
    spoil: Any,
    function: str,
) -> None:
    checkpoint = families[family_name]
    runner = rl.Runner(rl.compile(checkpoint, target=PLAINER))
    with tampered(monkeypatch, runner, spoil, site, operator, function):
        found = rl.compare(runner, reference=checkpoint, length=UNTRIED, decodes=1)
    first = found.first
    assert first is not None
    assert (first.site, first.operator, first.function, first.result) == (site, operator, function, result)
    assert found.over == (site,)


def test_a_rope_table_that_is_off_is_found(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = rl.Runner(rl.compile(families["llama"], target=PLAINER))
    (table,) = {
        launch.site
        for launch in runner.artifact.manifest.functions["decode"]
        if launch.site.startswith("rope_table")
    }

    def spoil(launch: Launch) -> None:
        launch.outputs[0][-1, 0, 0] += 1e-3

    with tampered(monkeypatch, runner, spoil, table, "rope_table"):
        found = rl.compare(runner, reference=families["llama"], length=UNTRIED, decodes=1)
    assert found.over == (table,)


def test_every_site_agrees_with_transformers(family: tuple[Path, rl.Artifact]) -> None:
    checkpoint, artifact = family
    found = rl.compare(artifact, reference=checkpoint, length=20, decodes=3)
    assert found.agrees, found.sentence()
    queries = "h.1.last_token" if "gpt2" in checkpoint.name else "layers.1.last_token"
    assert found.alone == (*(("positions",) if "gpt2" in checkpoint.name else ()), queries)
    assert max(site.local.relative / site.bound for site in found.sites if site.bound) < 0.5
    assert max(call.divergence for call in found.calls) < 1e-10
    assert max(site.accumulated.relative for site in found.sites) < 1e-5


def test_what_a_comparison_says(planted: rl.Artifact) -> None:
    found = rl.compare(planted, plan=BAD, length=UNTRIED, decodes=1)
    rows, kinds = list(found.rows()), list(found.kinds())
    assert {len(row) for row in rows} == {len(HEADER)}
    assert {len(row) for row in kinds} == {len(KINDS_HEADER)}
    assert [row[1] for row in rows if row[-1]] == [GUILTY]
    assert [row[0] for row in kinds if row[-1]] == ["layers.*.mlp.down_proj (6)"]
    assert "<- first" in str(found)
    assert found.sentence() in str(found)
    assert "<table>" in found._repr_html_()
    assert GUILTY in repr(found)
    data = json.loads(found.to_json())
    assert data["agrees"] is False
    assert data["sites"][data["first"]]["site"] == GUILTY
    assert [site["site"] for site in data["sites"] if site["over"]] == data["over"] == [GUILTY]
    assert len(data["calls"]) == 2


def test_numbers_that_are_not_finite(planted: rl.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = rl.Runner(planted)

    def spoil(launch: Launch) -> None:
        launch.outputs[0][0, 3, 5] = np.nan

    with tampered(monkeypatch, runner, spoil, GUILTY, "matmul"):
        found = rl.compare(runner, planted, length=UNTRIED, decodes=0)
    assert found.over == (GUILTY,)
    assert found.first is not None
    assert found.first.local.relative == math.inf
    assert found.first.local.index == (0, 3, 5)
    assert json.loads(found.to_json())["sites"][found.first.index]["local"]["relative"] == "inf"


def test_what_no_launch_does_shows_in_the_logits(
    planted: rl.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches of a run of its own are spoilt between two calls: no launch is to blame, and yet it is said."""
    runner = rl.Runner(planted)
    arguments = Calls._arguments

    def spoilt(self: Calls, state: Any, ids: Any) -> Any:
        if state.length and self is runner._calls and not hasattr(state, "held"):
            states.append(state)
            for array in state._arrays if state is states[0] else ():
                array[:, :, 0] *= 1.5
        return arguments(self, state, ids)

    states: list[Any] = []
    monkeypatch.setattr(Calls, "_arguments", spoilt)
    found = rl.compare(runner, planted, length=UNTRIED, decodes=2)
    assert found.first is None
    assert found.has_drifted
    assert not found.agrees
    assert "Every site is within its bound, but the logits are off" in found.sentence()


def test_a_bound_of_ones_own(planted: rl.Artifact) -> None:
    assert rl.compare(planted, plan=BAD, length=UNTRIED, bound=0.9).agrees
    tight = rl.compare(planted, plan=GOOD, length=UNTRIED, bound=0.0)
    assert all(site.site.endswith("down_proj") for site in tight.sites if site.is_over)


def test_little_of_the_reference_is_kept(
    family: tuple[Path, rl.Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many layers: tensors of the reference wait for a few launches only."""
    from relax_llm.finding.walk import Walk

    waiting: list[int] = []
    receive = Walk.receive

    def counted(self: Walk, name: Any, value: Any) -> None:
        receive(self, name, value)
        waiting.append(len(self._waiting))

    monkeypatch.setattr(Walk, "receive", counted)
    checkpoint, artifact = family
    rl.compare(artifact, reference=checkpoint, length=UNTRIED, decodes=0)
    assert 0 < max(waiting) <= 8
    waiting.clear()
    rl.compare(artifact, artifact, length=UNTRIED, decodes=0)
    assert max(waiting) <= 2
    assert waiting[-1] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "Name one thing to compare with"),
        ({"other": "self", "reference": "x"}, "Name one thing to compare with"),
        ({"plan": BAD, "prompt": "text"}, "no tokenizer"),
        ({"plan": BAD, "prompt": []}, "no tokens"),
        ({"plan": BAD, "prompt": [1], "length": 3}, "one or the other"),
        ({"plan": BAD, "length": 0}, "at least 1"),
        ({"plan": BAD, "length": 198}, "exceed the model's context of 200"),
        ({"plan": BAD, "decodes": -1}, "decodes must be a whole number"),
        ({"plan": BAD, "bound": -1.0}, "bound must be a share"),
        ({"plan": {"nowhere": "right"}}, "No site matches 'nowhere'"),
    ],
    ids=str,
)
def test_what_is_refused(planted: rl.Artifact, options: dict[str, Any], said: str) -> None:
    options = {name: planted if value == "self" else value for name, value in options.items()}
    with pytest.raises(InputError, match=said):
        rl.compare(planted, **options)


def test_other_models_are_refused(planted: rl.Artifact, family: tuple[Path, rl.Artifact]) -> None:
    checkpoint, artifact = family
    with pytest.raises(InputError, match=r"are different models: .* of 6 layers"):
        rl.compare(planted, artifact)
    with pytest.raises(InputError, match=r"is another model than .*: 2 layers and .* not 6 layers"):
        rl.compare(planted, reference=checkpoint)


def test_a_reference_that_cannot_be_loaded(planted: rl.Artifact, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        rl.compare(planted, reference=tmp_path / "nothing")
    broken = write(tmp_path / "broken", LLAMA)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "no_such_family"}))
    with pytest.raises(CheckpointError, match=r"transformers .* cannot load"):
        rl.compare(planted, reference=broken)


def test_without_transformers(planted: rl.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(
        CheckpointError, match="transformers is not installed: pip install transformers torch"
    ):
        rl.compare(planted, reference=write(tmp_path / "checkpoint", GPT2))
