"""Weights in every format: the same bits as f32 weights that were encoded and decoded beforehand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import relax_llm as rl
from relax_llm.compiler.wanted import as_stored
from relax_llm.formats import FORMATS
from relax_llm.kernels.layout import Packed, parse

from ..door.kernels import over_bf16
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
    ("q6", TIED, PLAINER),
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
    """Pinned, so that activations are not rounded."""
    checkpoint = write_checkpoint(BY_NAME[name], tmp_path / name)
    artifact = rl.compile(checkpoint, weights=weights, target=target, kv_cache="f32", equalize=False)
    encoded = rl.Runner(artifact, selection="pinned")
    _decoded(checkpoint, weights)
    exact = rl.Runner(rl.compile(checkpoint, weights="f32", target=target), selection="pinned")
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


def test_other_formats_at_some_sites(tmp_path: Path) -> None:
    """Patterns name a site or a part of what was fused there, the last that fits counts; a head may have 4 bits."""
    checkpoint = write_checkpoint(BY_NAME[UNTIED], tmp_path / "checkpoint")
    wanted = "q8,layers.*=bf16,layers.*.mlp.gate_proj=q4s,layers.1.self_attn.o_proj=f32,lm_head=q4"
    artifact = rl.compile(checkpoint, weights=wanted, target=PLAINER)
    manifest = artifact.manifest
    assert manifest.weight_format == "q8"
    assert manifest.stored_as.startswith("q8, layers.* bf16, layers.*.mlp.gate_proj q4s")
    found = {
        launch.site: manifest.kernels[launch.kernel].problem["weight_format"]
        for launch in manifest.functions["prefill"]
        if manifest.kernels[launch.kernel].operator == "matmul"
    }
    layer = {
        "self_attn.q_proj+k_proj+v_proj": "bf16",
        "mlp.gate_proj+up_proj": "q4s",
        "mlp.down_proj": "bf16",
    }
    expected = {f"layers.{index}.{site}": format for index in range(2) for site, format in layer.items()}
    expected |= {"layers.0.self_attn.o_proj": "bf16", "layers.1.self_attn.o_proj": "f32", "lm_head": "q4"}
    assert found == expected
    table = next(weight for weight in manifest.weights if "embed_tokens" in weight.name)
    assert "q8" in table.recipe, "what no pattern fits"
    runner, exact = rl.Runner(artifact), rl.Runner(rl.compile(checkpoint, target=PLAINER))
    ids = token_ids(BY_NAME[UNTIED])[0, :20]
    whole = exact.prefill(exact.start(), ids)
    assert 0 < np.abs(runner.prefill(runner.start(), ids) - whole).max() < 0.5 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("q4,lm_head", "'lm_head' should name sites and a format"),
        ("q4,=q8", "'=q8' should name sites and a format"),
        ("q4,lm_head=q9", "'q9' is not known; known: f32"),
        ("q4,lm_head=auto", "'auto' is not known; known: f32"),
        ("lm_head=q4", "'lm_head=q4' is not known"),
        ("q4,lm_heads=q8", r"at 'lm_heads'.*; they are at .*layers\.\*\.mlp\.down_proj.*lm_head"),
    ],
)
def test_formats_of_sites_that_cannot_be(weights: str, said: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(BY_NAME[UNTIED], tmp_path / "checkpoint")
    with pytest.raises(rl.RelaxLLMError, match=said):
        rl.compile(checkpoint, weights=weights, target=PLAINER, cache=False, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kernels_say_which_formats_they_read(tmp_path: Path) -> None:
    """A kernel for f32 is left out with its reason; one for bf16 reads the bits, plain."""

    def in_c(problem: object) -> str:
        return over_bf16("in_c")

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


HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCAB = 4, 2, 16, 64, 96, 67
KINDS = {
    "token_embd": "Q8_0",
    "blk.0.attn_q": "Q4_0",  # rows of q and k are permuted in a file
    "blk.0.attn_k": "Q4_0",
    "blk.0.attn_v": "Q4_1",
    "blk.0.attn_output": "Q4_0",
    "blk.0.ffn_gate": "Q4_1",
    "blk.0.ffn_up": "Q4_1",
    "blk.0.ffn_down": "Q8_0",
}
ROWS = {
    "token_embd": (VOCAB, HIDDEN),
    "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_gate": (INTERMEDIATE, HIDDEN),
    "blk.0.ffn_up": (INTERMEDIATE, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, INTERMEDIATE),
}


def write_quantized(path: Path) -> Path:
    """A llama whose matrices are quantized in several ways."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    random = np.random.default_rng(4)
    for name, shape in ROWS.items():
        kind = gguf.GGMLQuantizationType[KINDS[name]]
        matrix = random.standard_normal(shape).astype(np.float32) / np.float32(8)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", random.uniform(0.5, 1.5, HIDDEN).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_blocks_of_a_file_are_carried_over(tmp_path: Path) -> None:
    """What is in the artifact stands for the very numbers that the file stands for, where a format holds them."""
    checkpoint = rl.open_checkpoint(write_quantized(tmp_path / "model.gguf"))
    kept = {
        # q, k, v: a matrix with parts of both kinds is q4, which holds Q4_0 exactly
        "q4": ("qkv q4", "o_proj q4s", "gate q4", "embed q8"),
        "q8": ("o_proj q8", "down q8", "embed q8"),
    }
    parts = {
        "qkv": [f"self_attn.{part}_proj" for part in "qkv"],
        "o_proj": ["self_attn.o_proj"],
        "gate": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    for weights, exact in kept.items():
        artifact = rl.compile(checkpoint, weights=weights, target=PLAINER)
        stored = dict(zip(artifact.manifest.weights, artifact.weights(), strict=True))
        for what in exact:
            name, format = what.split()
            names = [f"model.layers.0.{part}.weight" for part in parts.get(name, ())] or [
                "model.embed_tokens.weight"
            ]
            wanted = np.concatenate([checkpoint.tensors[name].read() for name in names])
            recipe = next(w for w in stored if all(name in w.recipe for name in names))
            layout = parse(recipe.recipe.partition("(")[0])
            assert isinstance(layout, Packed)
            assert layout.format == format, what
            n, k = wanted.shape
            found = FORMATS[format].decode(layout.unpack(stored[recipe], n, k), k)
            np.testing.assert_array_equal(found, wanted, err_msg=what)


def test_auto_is_what_the_checkpoint_has(tmp_path: Path) -> None:
    file = write_quantized(tmp_path / "model.gguf")
    artifact = rl.compile(file, weights="auto", target=PLAINER)
    assert artifact.manifest.weight_format == "q4"
    assert rl.compile(file, weights="q4", target=PLAINER).path == artifact.path
    assert (
        as_stored(rl.open_checkpoint(write_checkpoint(BY_NAME["bfloat16-sharded"], tmp_path / "a"))) == "bf16"
    )
    assert as_stored(rl.open_checkpoint(write_checkpoint(BY_NAME[UNTIED], tmp_path / "b"))) == "f32"


def test_a_kernel_of_yours_reads_blocks_as_a_file_has_them(tmp_path: Path) -> None:
    """Plain q8 is GGUF's: a scale and 32 codes; what rounds its activations is allowed to."""

    def by_blocks(problem: object) -> str:
        return """
        #include <stdint.h>
        #include <string.h>
        struct block { _Float16 scale; int8_t codes[32]; };
        void by_blocks(const float *x, const uint8_t *weight, float *out, int64_t M) {
          const int64_t groups = (K + 31) / 32;
          for (int64_t i = 0; i < M; i++)
            for (int64_t j = 0; j < N; j++) {
              float sum = 0;
              for (int64_t g = 0; g < groups; g++) {
                struct block b;
                memcpy(&b, weight + (j * groups + g) * sizeof b, sizeof b);
                float part = 0;
                for (int64_t k = 0; k < 32 && g * 32 + k < K; k++) part += x[i * K + g * 32 + k] * b.codes[k];
                sum += (float)b.scale * part;
              }
              out[i * N + j] = sum;
            }
        }
        """

    checkpoint = write_checkpoint(BY_NAME[UNTIED], tmp_path / "checkpoint")
    site = "layers.0.mlp.down_proj"
    mine = rl.kernel("matmul", weights=("q8",), sites=site)(by_blocks)
    artifact = rl.compile(checkpoint, kernels=[mine], weights="q8", target=PLAINER)
    assert artifact.plan.at(site).serving({"M": 1}).kernel == "by_blocks"
    assert artifact.plan.at(site).layout == "plain_q8"
    runner, other = rl.Runner(artifact), rl.Runner(rl.compile(checkpoint, weights="q8", target=PLAINER))
    ids = token_ids(BY_NAME[UNTIED])[0, :20]
    np.testing.assert_allclose(
        runner.prefill(runner.start(), ids), other.prefill(other.start(), ids), rtol=1e-3, atol=1e-4
    )
