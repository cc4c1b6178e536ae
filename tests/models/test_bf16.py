"""bf16 weights: the same bits as f32 weights that were rounded beforehand, for every function and size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import relax_llm as rl

from ..machines import PLAINER
from .configurations import BY_NAME
from .reference import token_ids, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

TIED = next(
    name for name, row in BY_NAME.items() if row.settings.get("tie_word_embeddings") and "gpt2" not in name
)
NAMES = ("head-dim-20-attention-bias", "gpt2-three-heads-inner", TIED)


def _round_products(directory: Path) -> None:
    """Round every matrix of a checkpoint that a product reads."""
    tied = json.loads((directory / "config.json").read_text()).get("tie_word_embeddings", True)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            embedding = any(part in name for part in ("embed_tokens", "wte", "wpe"))
            if tensor.ndim == 2 and (not embedding or (tied and "wpe" not in name)):
                tensors[name] = tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", NAMES)
def test_bf16_has_the_bits_of_rounded_f32(name: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(BY_NAME[name], tmp_path / "checkpoint")
    target = None if name == NAMES[0] else PLAINER  # AVX-512 once: it takes long to compile
    rough = rl.Runner(rl.compile(checkpoint, weights="bf16", target=target))
    _round_products(checkpoint)
    exact = rl.Runner(rl.compile(checkpoint, weights="f32", target=target))
    half, whole = (
        sum(weight.nbytes for weight in runner.artifact.manifest.weights) for runner in (rough, exact)
    )
    assert half < 0.8 * whole
    assert rough.artifact.manifest.weight_format == "bf16"
    ids = token_ids(BY_NAME[name])
    for length in (1, 2, 17, 70):
        for batch in (1, 3):
            given = ids[:batch, :length]
            states = [runner.start(batch=batch) for runner in (rough, exact)]
            np.testing.assert_array_equal(
                rough.prefill(states[0], given, output="all"), exact.prefill(states[1], given, output="all")
            )
            np.testing.assert_array_equal(
                rough.decode(states[0], ids[:batch, length]), exact.decode(states[1], ids[:batch, length])
            )


def test_kernels_say_which_formats_they_read(tmp_path: Path) -> None:
    """A kernel for f32 is left out with its reason; one for bf16 reads the bits, plain."""

    def in_c(problem: object) -> str:
        return """
        #include <stdint.h>
        #include <string.h>
        void in_c(const float *x, const uint16_t *weight, float *out, int64_t M) {
          for (int64_t i = 0; i < M; i++)
            for (int64_t j = 0; j < N; j++) {
              float sum = 0;
              for (int64_t k = 0; k < K; k++) {
                uint32_t bits = (uint32_t)weight[j * K + k] << 16;
                float wide;
                memcpy(&wide, &bits, 4);
                sum += x[i * K + k] * wide;
              }
              out[i * N + j] = sum;
            }
        }
        """

    checkpoint = write_checkpoint(BY_NAME[NAMES[0]], tmp_path / "checkpoint")
    site = "layers.0.mlp.down_proj"
    plain = rl.kernel("matmul", name="plain")(in_c)
    artifact = rl.compile(checkpoint, kernels=[plain], weights="bf16", target=PLAINER)
    assert "plain (valid for every size): reads weights as f32, not bf16" in artifact.plan.explain(site)
    mine = rl.kernel("matmul", weights=("bf16",), sites=site)(in_c)
    artifact = rl.compile(checkpoint, kernels=[mine], weights="bf16", target=PLAINER)
    assert artifact.plan.at(site).serving({"M": 1}).kernel == "in_c"
    assert artifact.plan.at(site).layout == "plain_bf16"
    other = rl.Runner(rl.compile(checkpoint, weights="bf16", target=PLAINER))
    runner = rl.Runner(artifact)
    ids = token_ids(BY_NAME[NAMES[0]])[0, :20]
    np.testing.assert_allclose(
        runner.prefill(runner.start(), ids), other.prefill(other.start(), ids), rtol=1e-3, atol=1e-4
    )
