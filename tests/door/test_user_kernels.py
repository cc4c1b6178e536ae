"""Kernels of a user's inside whole models: every form, every epilogue, every range."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import KernelError
from relax_llm.kernels.machine import machine
from relax_llm.kernels.matmul.tiled import tiled
from relax_llm.plan.plan import Entry
from tests.models.comparison import assert_logits_agree
from tests.models.configurations import BY_NAME
from tests.models.reference import Reference, token_ids, write_checkpoint

from .kernels import by_schedule, in_c, in_script, script

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HALVED = """
#include <stdint.h>
void half(const float *x, const float *w, float *out, int64_t M) {
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j++) {
      float sum = 0;
      for (int64_t k = 0; k < K / 2; k++) sum += x[i * K + k] * w[j * K + k];
      out[i * N + j] = sum;
    }
}
"""

ROWS = ["head-dim-20-attention-bias", "gpt2-three-heads-inner"]
THREE: list[Any] = [in_script(m=(1, 3)), by_schedule(m=(4, 10)), in_c(m=(11, None))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("door")
    return {name: write_checkpoint(BY_NAME[name], directory / name) for name in ROWS}


def logits_agree(checkpoint: Path, name: str, kernels: Sequence[Any], lengths: Sequence[int]) -> rl.Artifact:
    """Compile with kernels, and compare a few lengths with the reference; returns the artifact."""
    artifact = rl.compile(checkpoint, kernels=kernels)
    runner, reference = rl.Runner(artifact), Reference.load(checkpoint)
    ids = token_ids(BY_NAME[name])
    for length in lengths:
        for batch in (1, 3):
            ours = runner.prefill(runner.start(batch=batch), ids[:batch, :length], output="all")
            assert_logits_agree(
                ours, reference.logits(ids[:batch, :length]), f"{length} tokens, batch {batch}"
            )
    state = runner.start()
    runner.prefill(state, ids[0, :20])
    ours = runner.decode(state, int(ids[0, 20]))
    assert_logits_agree(ours, reference.logits(ids[0, :21])[20], "decode")
    return artifact


def matmuls(artifact: rl.Artifact) -> list[Entry]:
    """What the plan says of products."""
    return [entry for entry in artifact.plan.entries if entry.operator == "matmul"]


@pytest.mark.parametrize("name", ROWS)
def test_three_forms_share_every_matmul(checkpoints: dict[str, Path], name: str) -> None:
    artifact = logits_agree(checkpoints[name], name, THREE, (1, 3, 4, 10, 11, 70))
    for entry in matmuls(artifact):
        assert [(str(part), part.kernel) for part in entry.ranges] == [
            ("M = 1..3", "in_script"),
            ("M = 4..10", "by_schedule"),
            ("M >= 11", "in_c"),
        ]
        assert entry.layout == "plain"


@pytest.mark.parametrize("name", ROWS)
def test_what_a_kernel_leaves_over_is_served_from_the_same_weight(
    checkpoints: dict[str, Path], name: str
) -> None:
    artifact = logits_agree(checkpoints[name], name, [in_script(m=(5, 5))], (1, 4, 5, 6, 7, 40))
    for entry in matmuls(artifact):
        served = [(part.sizes["M"][0], part.kernel) for part in entry.ranges]
        assert served == [(1, "plain_rows"), (5, "in_script"), (6, "plain_rows"), (7, "plain_panels")]


def test_one_site_may_have_a_kernel_of_its_own(checkpoints: dict[str, Path]) -> None:
    name = ROWS[0]
    artifact = logits_agree(
        checkpoints[name], name, [in_script(m=(1, 8), sites="layers.1.mlp.down_proj")], (1, 9)
    )
    assert artifact.plan.at("layers.1.mlp.down_proj").serving({"M": 8}).kernel == "in_script"
    assert artifact.plan.at("layers.0.mlp.down_proj").serving({"M": 8}).kernel == "tiled"
    assert "is for the sites layers.1.mlp.down_proj" in artifact.plan.explain("layers.0.mlp.down_proj")
    launches = {launch.site: launch.kernel for launch in artifact.manifest.functions["decode"]}
    assert launches["layers.1.mlp.down_proj"] != launches["layers.0.mlp.down_proj"]


def test_a_part_of_a_fused_site_names_it(checkpoints: dict[str, Path]) -> None:
    name = ROWS[0]
    artifact = logits_agree(checkpoints[name], name, [in_script(sites="*.q_proj")], (1, 20))
    assert artifact.plan.at("layers.0.self_attn.k_proj").serving({"M": 1}).kernel == "in_script"
    assert artifact.plan.at("layers.0.self_attn.o_proj").serving({"M": 1}).kernel == "tiled"


def test_a_kernel_may_absorb_the_bias(checkpoints: dict[str, Path]) -> None:
    source = """
#include <stdint.h>
#ifdef WITH_BIAS
void c_bias(const float *x, const float *w, const float *bias, float *out, int64_t M) {
#else
void c_bias(const float *x, const float *w, float *out, int64_t M) {
#endif
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j++) {
#ifdef WITH_BIAS
      float sum = bias[j];
#else
      float sum = 0;
#endif
      for (int64_t k = 0; k < K; k++) sum += x[i * K + k] * w[j * K + k];
      out[i * N + j] = sum;
    }
}
"""

    @rl.kernel("matmul", absorbs=("bias",))
    def c_bias(problem: Any) -> str:
        assert not any([problem.activation, problem.gated, problem.residual])
        return f"#define WITH_BIAS\n{source}" if problem.bias else source

    for name in ROWS:
        logits_agree(checkpoints[name], name, [c_bias], (1, 20))


def test_a_kernel_may_decline_with_a_reason(checkpoints: dict[str, Path]) -> None:
    @rl.kernel("matmul")
    def choosy(problem: Any) -> Any:
        if problem.n > problem.k:
            raise rl.Declined(f"N = {problem.n} is more than K = {problem.k}")
        return script(problem)

    name = ROWS[1]
    artifact = logits_agree(checkpoints[name], name, [choosy], (1, 20))
    told = [c.reason for entry in matmuls(artifact) for c in entry.candidates if c.kernel == "choosy"]
    assert any(reason.startswith("declined: N = ") for reason in told)
    assert any(reason.startswith("serves every size") for reason in told)


def test_a_kernel_that_needs_other_instructions_is_not_taken(checkpoints: dict[str, Path]) -> None:
    artifact = rl.compile(checkpoints[ROWS[0]], kernels=[in_script(features=("sve9",))])
    assert "needs sve9" in artifact.plan.explain("layers.0.mlp.down_proj")
    assert artifact.plan.at("layers.0.mlp.down_proj").serving({"M": 1}).kernel == "tiled"


def _wrong_shape(problem: Any) -> Any:
    from dataclasses import replace

    return script(replace(problem, k=problem.k + 1))


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        (
            [rl.kernel("matmul", name="off")(_wrong_shape)],
            r"'off' has the wrong signature.*x \[M, \d+\] float32",
        ),
        ([rl.kernel("matmul", name="seven")(lambda problem: 7)], "'seven' gave int"),
        ([rl.kernel("matmul", name="c")(lambda problem: "int x = ;")], "'c' does not compile as C"),
        ([in_script(m=1), in_script(m=2)], "Two kernels have the name 'in_script'"),
        ([rl.kernel("matmul", name="tiled")(script)], "Two kernels have the name 'tiled'"),
        (
            [
                in_script(m=(1, 3)),
                rl.kernel(
                    "matmul",
                    name="packed",
                    layout="tiled",
                    absorbs=("bias", "activation", "gate", "residual"),
                )(lambda problem: tiled(problem, machine(), flat=True)),
            ],
            "a weight is stored once",
        ),
        (
            [rl.kernel("matmul", name="half")(lambda problem: HALVED)],
            "'half' is refused.*M=1",
        ),
    ],
    ids=["signature", "not-a-kernel", "c-error", "twice", "built-in-name", "layouts", "wrong-result"],
)
def test_a_kernel_that_cannot_be_used_is_refused(
    checkpoints: dict[str, Path], kernels: list[Any], said: str
) -> None:
    with pytest.raises(KernelError, match=said):
        rl.compile(checkpoints[ROWS[0]], kernels=kernels)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"m": (0, 4)}, "no ranges"),
        ({"m": (5, 4)}, "no ranges"),
        ({"layout": "columns"}, "layout must be"),
        ({"absorbs": ("norm",)}, "absorbs names norm"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(KernelError, match=said):
        rl.kernel("matmul", **arguments)
    with pytest.raises(KernelError, match="known: matmul"):
        rl.kernel("convolution")


def test_the_saved_artifact_runs_without_compiler_or_kernels(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    name = ROWS[0]
    saved = rl.compile(checkpoints[name], kernels=THREE).save(tmp_path / "artifact")
    ids = token_ids(BY_NAME[name])[0, :12]
    expected = rl.Runner(saved).prefill(rl.Runner(saved).start(), ids)
    code = f"""
import builtins
real = builtins.__import__
def guarded(name, *args, **kwargs):
    if (name + ".").startswith(("tvm.", "torch.", "transformers.", "relax_llm.compiler.", "relax_llm.kernels.")):
        raise ImportError(f"{{name}} must not be imported")
    return real(name, *args, **kwargs)
builtins.__import__ = guarded
import numpy as np, relax_llm as rl
artifact = rl.load({str(saved.path)!r})
runner = rl.Runner(artifact)
np.save({str(tmp_path / "logits.npy")!r}, runner.prefill(runner.start(), {ids.tolist()}))
print(artifact.plan.explain("layers.0.mlp.down_proj", M=12))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "M >= 11: in_c" in done.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)
