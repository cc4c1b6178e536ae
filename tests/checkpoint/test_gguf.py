"""GGUF files: config, names and tensors are those of the model that was converted."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from relax_llm.checkpoint import Checkpoint, open_checkpoint
from relax_llm.errors import CheckpointError

from .files import (
    GGUF,
    LLAMA_METADATA,
    GGUFTensor,
    f32,
    gguf_tensor,
    llama_tensors,
    string,
    u32,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    State = dict[str, NDArray[Any]]


def state_of(model: torch.nn.Module) -> State:
    """Every parameter under its Hugging Face name; a tied head is left out, as checkpoints do."""
    names = dict(model.named_parameters())
    return {name: value.detach().float().numpy() for name, value in names.items()}


def reference_state(path: Path) -> State:
    """What transformers reads from a GGUF file (by the function under `from_pretrained(gguf_file=...)`).

    `from_pretrained` itself asks for the accelerate package, which has no part in reading.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    return {name: value.float().numpy() for name, value in state.items()}


def assert_same(checkpoint: Checkpoint, reference: State) -> None:
    assert set(checkpoint.tensors) == set(reference)
    for name, tensor in checkpoint.tensors.items():
        read = tensor.read()
        assert read.shape == tensor.shape == reference[name].shape, name
        assert np.array_equal(read.astype(np.float32), reference[name]), name


@pytest.mark.model
def test_every_tensor_of_smollm2_is_the_references(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"float32", "q4_1", "q8_0"}
    assert_same(checkpoint, reference_state(smollm2_path))


@pytest.mark.model
def test_the_config_of_smollm2(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path)
    assert checkpoint.config == {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert checkpoint.notes == ()
    assert open_checkpoint(smollm2_path.parent).fingerprint == checkpoint.fingerprint


@pytest.mark.model
def test_the_tokenizer_of_smollm2_is_loaded_from_the_same_file(smollm2_path: Path) -> None:
    tokenizer = open_checkpoint(smollm2_path).load_tokenizer()
    text = "My favorite music is"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (49152, 2)


def interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The permutation that llama.cpp's converter applies to the rows of q and k."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(name: str, names: dict[str, str], prefix: str) -> str:
    """The converter's name of a Hugging Face tensor."""
    module, kind = name.rsplit(".", 1)
    if module in names:
        return f"{names[module]}.{kind}"
    number, part = module.removeprefix(prefix).split(".", 1)
    return f"blk.{number}.{names[part]}.{kind}"


def write_llama(path: Path, model: LlamaForCausalLM, version: int = 3) -> State:
    """Convert a model as llama.cpp does, with every third tensor in f16; returns what is then stored."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    state = state_of(model)
    for number, (name, values) in enumerate(state.items()):
        stored = values.astype(np.float16) if number % 3 == 0 else values
        state[name] = stored.astype(np.float32)
        if ".q_proj." in name:
            stored = interleaved(stored, config.num_attention_heads)
        if ".k_proj." in name:
            stored = interleaved(stored, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name, LLAMA_NAMES, "model.layers."), stored)
    write(writer)
    return state


def write_gpt2(path: Path, model: GPT2LMHeadModel) -> State:
    """Convert a model as llama.cpp does; returns what is then stored."""
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    state = state_of(model)
    for name, values in state.items():
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            values = np.ascontiguousarray(values.T)
        writer.add_tensor(gguf_name(name, GPT2_NAMES, "transformer.h."), values)
    write(writer)
    return state


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def randomized(model: torch.nn.Module) -> Any:
    """Fill every parameter with different numbers: fresh norms and biases are all equal."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    options = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": 31,
        "max_position_embeddings": 77,
        "rms_norm_eps": 1e-6,
    }
    return randomized(LlamaForCausalLM(LlamaConfig(**{**options, **changes})))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_converted_llama_is_the_model_it_came_from(tied: bool, bias: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    state = write_llama(tmp_path / "model.gguf", model)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, state)
    for name, value in checkpoint.config.items():
        if name not in ("rope_theta", "rope_scaling"):
            assert getattr(model.config, name) == value, name
    assert checkpoint.config["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_a_converted_llama_is_what_transformers_reads(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", tiny_llama(tie_word_embeddings=False))
    assert_same(open_checkpoint(tmp_path), reference_state(tmp_path / "model.gguf"))


def test_a_converted_gpt2_is_the_model_it_came_from_and_what_transformers_reads(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=36, n_head=3, n_layer=2, n_positions=50, n_ctx=50, vocab_size=29, n_inner=144)
    state = write_gpt2(tmp_path / "model.gguf", randomized(GPT2LMHeadModel(config)))
    checkpoint = open_checkpoint(tmp_path)
    assert "transformer.h.0.attn.c_attn.weight" in checkpoint.tensors
    assert "transformer.wte.weight" in checkpoint.tensors
    assert_same(checkpoint, state)
    assert_same(checkpoint, reference_state(tmp_path / "model.gguf"))
    for name, value in checkpoint.config.items():
        assert getattr(config, name) == value, name


PLAIN_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"}
BLOCK_TYPES = [kind for kind in GGMLType if kind.name not in PLAIN_TYPES]


def blocks_of(kind: GGMLType, rows: int, columns: int) -> NDArray[np.uint8]:
    """Quantized rows: of numbers where the gguf package can quantize, else random bytes."""
    random = np.random.default_rng(int(kind))
    try:
        quantized: NDArray[np.uint8] = gguf.quants.quantize(
            random.standard_normal((rows, columns), np.float32), kind
        )
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        quantized = random.integers(0, 256, (rows, columns // block * size), np.uint8)
    return quantized


def dequantized(blocks: NDArray[np.uint8], kind: GGMLType) -> NDArray[np.float32] | None:
    try:
        with np.errstate(all="ignore"):
            values: NDArray[np.float32] = gguf.quants.dequantize(blocks, kind)
    except NotImplementedError:
        return None
    return values


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_ggml_type_is_dequantized_or_refused(kind: GGMLType, tmp_path: Path) -> None:
    rows, columns = 40, 512
    blocks = blocks_of(kind, rows, columns)
    name = "blk.0.ffn_up.weight"
    tensor = GGUFTensor(name, (columns, rows), int(kind), blocks.tobytes())
    path = GGUF(tensors=[*llama_tensors(), tensor]).write(tmp_path / "model.gguf")
    expected = dequantized(blocks, kind)
    if expected is None:
        with pytest.raises(
            CheckpointError, match=rf"model.gguf: tensor '{name}': its ggml type {kind.name.lower()} "
        ):
            open_checkpoint(path)
        return
    read = open_checkpoint(path).tensors["model.layers.0.mlp.up_proj.weight"]
    assert (read.dtype, read.shape, read.nbytes) == (kind.name.lower(), (rows, columns), blocks.nbytes)
    assert read.is_quantized
    assert read.read().dtype == np.float32
    assert np.array_equal(read.read(), expected, equal_nan=True)
    assert np.array_equal(read.raw(), blocks)
    assert np.shares_memory(read.raw(), read.raw())


def test_nearly_all_types_can_be_dequantized() -> None:
    """The test above must not pass by refusing everything."""
    refused = {kind.name for kind in BLOCK_TYPES if dequantized(blocks_of(kind, 1, 512), kind) is None}
    assert refused <= {"Q8_1", "Q8_K", "Q1_0"}


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8],
    ids=lambda dtype: np.dtype(dtype).name,
)
def test_plain_types_are_mapped_and_not_copied(dtype: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(-9, 9, (6, 10)).astype(dtype)
    codes = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    kind = GGMLType[codes.get(values.dtype.name, values.dtype.name.replace("int", "I"))]
    tensor = GGUFTensor("blk.0.ffn_up.weight", (10, 6), int(kind), values.tobytes())
    checkpoint = open_checkpoint(GGUF(tensors=[*llama_tensors(), tensor]).write(tmp_path / "model.gguf"))
    read = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    assert read.dtype == values.dtype.name
    assert np.array_equal(read.read(), values)
    assert np.shares_memory(read.read(), read.read())
    assert not read.read().flags.writeable
    with pytest.raises(CheckpointError, match="no quantized blocks"):
        read.raw()


def test_raw_blocks_of_permuted_and_transposed_matrices_are_in_reading_order(tmp_path: Path) -> None:
    kind = GGMLType.Q4_1
    blocks = blocks_of(kind, 32, 32)
    q = GGUFTensor("blk.0.attn_q.weight", (32, 32), int(kind), blocks.tobytes())
    tensors = [tensor for tensor in llama_tensors() if tensor.name != q.name]
    read = open_checkpoint(GGUF(tensors=[*tensors, q]).write(tmp_path / "a.gguf")).tensors[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert np.array_equal(interleaved(read.raw(), 4), blocks)
    assert np.array_equal(gguf.quants.dequantize(read.raw(), kind), read.read())
    assert not read.raw_is_transposed

    metadata = {
        "general.architecture": string("gpt2"),
        "gpt2.block_count": u32(1),
        "gpt2.context_length": u32(8),
        "gpt2.embedding_length": u32(32),
        "gpt2.attention.head_count": u32(2),
        "gpt2.attention.layer_norm_epsilon": f32(1e-5),
    }
    blocks = blocks_of(kind, 96, 32)
    qkv = GGUFTensor("blk.0.attn_qkv.weight", (32, 96), int(kind), blocks.tobytes())
    embedding = gguf_tensor("token_embd.weight", np.ones((5, 32), np.float32))
    read = open_checkpoint(GGUF(metadata, [embedding, qkv]).write(tmp_path / "b.gguf")).tensors[
        "transformer.h.0.attn.c_attn.weight"
    ]
    assert read.shape == (32, 96)
    assert read.raw_is_transposed
    assert np.array_equal(read.raw(), blocks)
    assert np.array_equal(gguf.quants.dequantize(read.raw(), kind).T, read.read())


def test_our_hand_made_files_are_what_the_gguf_package_reads(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(GGUF().write(tmp_path / "model.gguf"))
    assert {tensor.name for tensor in reader.tensors} == {tensor.name for tensor in llama_tensors()}
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["<s>", "é", ""]


@pytest.mark.parametrize(("version", "alignment"), [(2, 32), (3, 8), (3, 64), (3, 4096)])
def test_versions_and_alignments(version: int, alignment: int, tmp_path: Path) -> None:
    plain = open_checkpoint(GGUF().write(tmp_path / "plain.gguf"))
    metadata = {**LLAMA_METADATA, "general.alignment": u32(alignment)}
    model = GGUF(metadata, version=version, alignment=alignment)
    other = open_checkpoint(model.write(tmp_path / "other.gguf"))
    for name, tensor in plain.tensors.items():
        assert tensor.read().tobytes() == other.tensors[name].read().tobytes()


def test_a_split_model_is_one_checkpoint(tmp_path: Path) -> None:
    whole = open_checkpoint(GGUF().write(tmp_path / "whole"))
    directory = tmp_path / "split"
    directory.mkdir()
    tensors = llama_tensors()
    for number in range(3):
        split = {"split.no": u32(number), "split.count": u32(3), "split.tensors.count": u32(4)}
        metadata = {**(LLAMA_METADATA if number == 0 else {}), **split}
        held = tensors[number : number + 1] if number < 2 else tensors[2:]
        GGUF(metadata, held).write(directory / f"m-{number + 1:05d}-of-00003.gguf")
    checkpoint = open_checkpoint(directory)
    assert list(checkpoint.tensors) == list(whole.tensors)
    for name, tensor in checkpoint.tensors.items():
        assert np.array_equal(tensor.read(), whole.tensors[name].read())
    before = checkpoint.fingerprint
    os.utime(directory / "m-00003-of-00003.gguf", ns=(0, 0))
    assert open_checkpoint(directory).fingerprint != before


def test_the_fingerprint_follows_header_size_and_time(tmp_path: Path) -> None:
    path = GGUF().write(tmp_path / "model.gguf")
    os.utime(path, ns=(0, 0))
    seen = [open_checkpoint(path).fingerprint]
    assert open_checkpoint(path).fingerprint == seen[0]
    GGUF({**LLAMA_METADATA, "general.name": string("x" * 40)}).write(path)
    os.utime(path, ns=(0, 0))
    seen.append(open_checkpoint(path).fingerprint)
    os.utime(path, ns=(0, 1))
    seen.append(open_checkpoint(path).fingerprint)
    assert len(set(seen)) == 3


def test_unknown_tensors_keep_their_names(tmp_path: Path) -> None:
    extra = gguf_tensor("blk.0.attn_q_norm.weight", np.ones(8, np.float32))
    ignored = gguf_tensor("blk.0.attn_rot_embd.weight", np.ones(4, np.float32))
    path = GGUF(tensors=[*llama_tensors(), extra, ignored]).write(tmp_path / "model.gguf")
    assert set(open_checkpoint(path).tensors) == {
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "blk.0.attn_q_norm.weight",
    }
