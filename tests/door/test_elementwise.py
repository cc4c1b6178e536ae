"""Arithmetic of an architecture of one's own: kernels like any other, described, replaced, checked; and argmax."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import save_file
from tvm import relax
from tvm.relax.frontend import nn

import relax_llm as rl
from relax_llm import layers
from relax_llm.errors import KernelError

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, VOCAB, CAP = 48, 67, 5.0
IDS = np.random.default_rng(3).integers(0, VOCAB, (2, 9))


class Capped(layers.Decoder):
    """Halves that change places, a gate in one matrix, a scale as Gemma has it, capped logits."""

    model_types: ClassVar[tuple[str, ...]] = ("capped",)

    def __init__(self, config: layers.Fields) -> None:
        self.vocab_size, self.context_length = config.integer("vocab_size"), 64
        self.embed = layers.Embedding(self.vocab_size, HIDDEN)
        self.gate_up = layers.Linear(HIDDEN, 2 * HIDDEN)
        self.scale = nn.Parameter((HIDDEN,), "float32")
        self.mix = layers.Linear(HIDDEN, HIDDEN)

    def hidden_states(self, token_ids: nn.Tensor, step: layers.Step) -> nn.Tensor:
        x = self.embed(token_ids)
        ends = [relax.op.strided_slice(x._expr, [2], [at], [at + HIDDEN // 2]) for at in (HIDDEN // 2, 0)]
        turned = nn.op.wrap_nested(relax.op.concat(ends, axis=2), "turned")
        gate, up = nn.op.split(self.gate_up(turned), 2, axis=-1)
        return self.mix(layers.activation("silu", gate) * up * (self.scale + 1.0))

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        return nn.op.tanh(self.embed.as_head(hidden) / CAP) * CAP


def tensors() -> dict[str, Any]:
    random = np.random.default_rng(0)
    shapes = {
        "embed.weight": (VOCAB, HIDDEN),
        "gate_up.weight": (2 * HIDDEN, HIDDEN),
        "scale": (HIDDEN,),
        "mix.weight": (HIDDEN, HIDDEN),
    }
    spread = {"embed.weight": 1.0, "scale": 0.5}
    return {
        name: (random.standard_normal(shape) * spread.get(name, HIDDEN**-0.5)).astype(np.float32)
        for name, shape in shapes.items()
    }


def reference(ids: Any) -> Any:
    weights = {name: value.astype(np.float64) for name, value in tensors().items()}
    x = weights["embed.weight"][ids]
    both = (
        np.concatenate([x[..., HIDDEN // 2 :], x[..., : HIDDEN // 2]], axis=-1) @ weights["gate_up.weight"].T
    )
    gate, up = both[..., :HIDDEN], both[..., HIDDEN:]
    x = (gate / (1 + np.exp(-gate)) * up * (weights["scale"] + 1)) @ weights["mix.weight"].T
    return np.tanh(x @ weights["embed.weight"].T / CAP) * CAP


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("capped")
    (directory / "config.json").write_text(json.dumps({"model_type": "capped", "vocab_size": VOCAB}))
    save_file(tensors(), directory / "model.safetensors")
    return directory


def compiled(checkpoint: Path, *kernels: Any) -> rl.Artifact:
    artifact = rl.compile(checkpoint, architecture=Capped, kernels=kernels)
    runner = rl.Runner(artifact)
    right = reference(IDS)
    state = runner.start(batch=2)
    ours = runner.prefill(state, IDS[:, :8], output="all")
    assert np.abs(ours - right[:, :8]).max() < 1e-4
    assert np.abs(runner.decode(state, IDS[:, 8]) - right[:, 8]).max() < 1e-4
    greedy = runner.greedy(runner.start(batch=2), IDS)
    np.testing.assert_array_equal(greedy.token_id, right[:, -1].argmax(axis=-1))
    return artifact


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> rl.Artifact:
    return compiled(checkpoint)


def test_each_is_a_kernel_with_a_problem(artifact: rl.Artifact) -> None:
    manifest = artifact.manifest
    found = {
        kernel.problem["expression"]: kernel
        for kernel in manifest.kernels.values()
        if kernel.operator == "elementwise"
    }
    gate, cap = "((b * sigmoid(b)) * b[48:]) * (a + 1.0)", "tanh(a / 5.0) * 5.0"
    assert found.keys() == {gate, cap}
    assert found[cap].flops == f"3*batch*seq*{VOCAB}"
    assert found[gate].bytes == "4*48 + 4*batch*seq*96 + 4*batch*seq*48"
    for calls in manifest.functions.values():
        operators = [manifest.kernels[launch.kernel].operator for launch in calls]
        assert operators.count("fused") == (0 if operators == ["argmax"] else 1), (
            "the halves that change places"
        )
    (entry,) = (entry for entry in artifact.plan.entries if entry.problem == "argmax_width67")
    assert [part.kernel for part in entry.ranges] == ["by_lane"]


def test_kernels_of_ones_own(checkpoint: Path, artifact: rl.Artifact) -> None:
    """In Python, in C and as a schedule; for the site that a weight names, and by a pattern of the problem's name."""

    @rl.kernel("elementwise", sites="*tanh*", seq=(1, 4))
    def in_c(problem: Any) -> str:
        assert problem.expression == "tanh(a / 5.0) * 5.0"
        return f"""
        #include <math.h>
        #include <stdint.h>
        void in_c(const float *a, float *out, int64_t batch, int64_t seq) {{
          for (int64_t i = 0; i < batch * seq * {problem.shape[-1]}; i++) out[i] = tanhf(a[i] / 5.0f) * 5.0f;
        }}
        """

    @rl.kernel("elementwise", sites="scale")
    def scheduled(schedule: Any, problem: Any) -> None:
        i, j, k = schedule.get_loops(schedule.get_sblock("elementwise"))
        schedule.parallel(schedule.fuse(i, j))
        schedule.vectorize(schedule.split(k, [None, 16])[1])

    @rl.kernel("argmax", form="python")
    def in_numpy(problem: Any, x: Any, out: Any) -> None:
        out[...] = x.argmax(axis=-1, keepdims=True)

    made = compiled(checkpoint, in_c, scheduled, in_numpy)
    runner = rl.Runner(made)
    with runner.counting() as counts:
        runner.greedy(runner.start(), IDS[0])
        runner.greedy(runner.start(), IDS[0, :3])
    assert counts.launches(kernel="in_c", operator="elementwise") == 2  # logits are of one token
    assert counts.launches(kernel="scheduled", site="scale") == 2
    assert counts.launches(kernel="in_numpy", operator="argmax") == 2
    (site,) = (launch.site for launch in artifact.manifest.functions["logits"][-1:])
    assert "seq >= 5: by_row" in made.plan.explain(site, batch=1, seq=9)


def test_a_wrong_one_is_refused(checkpoint: Path) -> None:
    @rl.kernel("elementwise", form="python", sites="*tanh*")
    def uncapped(problem: Any, a: Any, out: Any) -> None:
        out[...] = a

    with pytest.raises(
        KernelError, match=r"'uncapped' is refused for elementwise_div_tanh_mul_\w+: at .* is right"
    ):
        rl.compile(checkpoint, architecture=Capped, kernels=[uncapped])

    @rl.kernel("argmax", form="python")
    def last(problem: Any, x: Any, out: Any) -> None:
        out[...] = x.shape[-1] - 1 - x[:, ::-1].argmax(axis=-1, keepdims=True)

    with pytest.raises(KernelError, match=r"'last' is refused for argmax_width67: at .* is right"):
        rl.compile(checkpoint, architecture=Capped, kernels=[last])
