"""Weights in every format: the same bits as f32 weights that were encoded and decoded beforehand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import relax_llm as rl
from relax_llm.formats import FORMATS

from ..machines import PLAINER
from .configurations import BY_NAME
from .reference import token_ids, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

TIED = next(
    name for name, row in BY_NAME.items() if row.settings.get("tie_word_embeddings") and "gpt2" not in name
)
UNTIED = "head-dim-20-attention-bias"
GPT2 = "gpt2-three-heads-inner"
CASES = [
    ("bf16", UNTIED, None),  # for this processor: AVX-512 once, as it takes long to compile
    ("bf16", GPT2, PLAINER),
    ("f16", TIED, PLAINER),
    ("q8", TIED, PLAINER),
    ("q4", UNTIED, PLAINER),
    ("q4s", GPT2, PLAINER),
]


def _decoded(directory: Path, weights: str) -> None:
    """Leave of every matrix of a checkpoint what its format keeps; position embeddings are kept whole."""
    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.ndim != 2 or "wpe" in name:
                continue
            matrix = tensor.astype(np.float32)
            along = (
                matrix.T if "gpt2" in str(directory) and "wte" not in name else matrix
            )  # [outputs, inputs]
            of_tokens = len(along) == vocab and weights.startswith("q")
            form = FORMATS["q8" if of_tokens else weights]
            decoded = form.decode(form.encode(along), along.shape[1])
            tensors[name] = np.ascontiguousarray(
                decoded.reshape(along.shape) if along is matrix else decoded.T
            )
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("weights", "name", "target"), CASES, ids=lambda case: str(case))
def test_a_format_has_the_bits_of_its_decoded_weights(
    weights: str, name: str, target: str | None, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(BY_NAME[name], tmp_path / name)
    encoded = rl.Runner(rl.compile(checkpoint, weights=weights, target=target))
    _decoded(checkpoint, weights)
    exact = rl.Runner(rl.compile(checkpoint, weights="f32", target=target))
    small, whole = (
        sum(weight.nbytes for weight in runner.artifact.manifest.weights) for runner in (encoded, exact)
    )
    assert small < {"bf16": 0.7, "f16": 0.7}.get(weights, 0.5) * whole
    assert encoded.artifact.manifest.weight_format == weights
    ids = token_ids(BY_NAME[name])
    for length, batch in ((1, 1), (2, 3), (17, 1), (70, 3)):
        given = ids[:batch, :length]
        states = [runner.start(batch=batch) for runner in (encoded, exact)]
        np.testing.assert_array_equal(
            encoded.prefill(states[0], given, output="all"), exact.prefill(states[1], given, output="all")
        )
        np.testing.assert_array_equal(
            encoded.decode(states[0], ids[:batch, length]), exact.decode(states[1], ids[:batch, length])
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

    checkpoint = write_checkpoint(BY_NAME[UNTIED], tmp_path / "checkpoint")
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
    ids = token_ids(BY_NAME[UNTIED])[0, :20]
    np.testing.assert_allclose(
        runner.prefill(runner.start(), ids), other.prefill(other.start(), ids), rtol=1e-3, atol=1e-4
    )
