"""Malformed checkpoints: refused with a sentence that names file and field, quickly."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import gguf  # noqa: F401  (importing it is not a part of what is timed)
import pytest

from relax_llm.checkpoint import open_checkpoint
from relax_llm.errors import CheckpointError

from .files import (
    ARRAY,
    BOOL,
    F32,
    GGML_F32,
    GGML_Q8_0,
    GGML_Q8_1,
    GGUF,
    HIDDEN,
    LLAMA_CONFIG,
    LLAMA_METADATA,
    STRING,
    U8,
    U32,
    VOCAB,
    GGUFTensor,
    array,
    f32,
    header_of,
    llama_tensors,
    safetensors,
    small_tensors,
    string,
    text,
    u32,
    write_directory,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECONDS = 2.0
BYTES = 200 << 20

DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@dataclass(frozen=True)
class Case:
    """A malformed checkpoint: `build` makes it in an empty folder and returns what is opened."""

    name: str
    build: Callable[[Path], Path]
    words: tuple[str, ...]


def _config(name: str, config: dict[str, Any] | bytes, *words: str) -> Case:
    return Case(
        f"config-{name}", lambda folder: write_directory(folder, config=config), ("config.json", *words)
    )


def _field(name: str, value: Any) -> Case:
    return _config(f"field-{name}-{str(value)[:28]}", {**LLAMA_CONFIG, name: value}, f"'{name}'")


def _weights(name: str, content: bytes, *words: str) -> Case:
    return Case(
        f"safetensors-{name}",
        lambda folder: write_directory(folder, weights=content),
        ("model.safetensors", *words),
    )


def _header(name: str, change: Callable[[dict[str, Any]], None], *words: str) -> Case:
    header = header_of(small_tensors())
    change(header)
    return _weights(name, safetensors(small_tensors(), header), *words)


def _entry(name: str, field: str, value: Any, *words: str) -> Case:
    return _header(
        name, lambda header: header[DOWN].update({field: value}), f"'{DOWN}'", f"'{field}'", *words
    )


def _index(name: str, index: Any, *words: str) -> Case:
    def build(folder: Path) -> Path:
        write_directory(folder)
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        content = index if isinstance(index, bytes) else json.dumps(index).encode()
        (folder / "model.safetensors.index.json").write_bytes(content)
        return folder

    return Case(f"index-{name}", build, ("model.safetensors.index.json", *words))


def _directory(name: str, files: dict[str, bytes], *words: str) -> Case:
    def build(folder: Path) -> Path:
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder

    return Case(f"directory-{name}", build, words)


def _file(name: str, file: str, content: bytes, *words: str) -> Case:
    def build(folder: Path) -> Path:
        (folder / file).write_bytes(content)
        return folder / file

    return Case(name, build, (file, *words))


def _gguf(name: str, content: GGUF | bytes, *words: str) -> Case:
    return _file(
        f"gguf-{name}", "model.gguf", content if isinstance(content, bytes) else content.to_bytes(), *words
    )


def _metadata(name: str, change: dict[str, tuple[int, bytes] | None], *words: str) -> Case:
    changed = {**LLAMA_METADATA, **change}
    return _gguf(
        f"metadata-{name}",
        GGUF(metadata={key: value for key, value in changed.items() if value is not None}),
        *(f"'{key}'" for key in change),
        *words,
    )


def _tensor(case: str, index: int, *words: str, **changes: Any) -> Case:
    tensors = llama_tensors()
    changed = replace(tensors[index], **changes)
    shown = f"'{changed.name}'" if isinstance(changed.name, str) and changed.name else f"tensor {index}"
    return _gguf(
        f"tensor-{case}", GGUF(tensors=[*tensors[:index], changed, *tensors[index + 1 :]]), shown, *words
    )


def _sparse(file: str, head: bytes, size: int) -> Callable[[Path], Path]:
    """A file that claims to be large and takes no room."""

    def build(folder: Path) -> Path:
        path = folder / file
        path.write_bytes(head)
        os.truncate(path, size)
        return path

    return build


def _sparse_weights(folder: Path) -> Path:
    write_directory(folder)
    _sparse("model.safetensors", struct.pack("<Q", 90 << 30) + b"{", 100 << 30)(folder)
    return folder


def _pipe(folder: Path) -> Path:
    write_directory(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return folder


def _pipe_file(folder: Path) -> Path:
    os.mkfifo(folder / "model.gguf")
    return folder / "model.gguf"


def _dangling(folder: Path) -> Path:
    write_directory(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    return folder


def _two_ggufs(folder: Path) -> Path:
    GGUF().write(folder / "a.gguf")
    GGUF().write(folder / "b.gguf")
    return folder


def _split(**changes: Any) -> Callable[[Path], Path]:
    """A model of two parts, in which one thing is wrong."""

    def build(folder: Path) -> Path:
        tensors = llama_tensors()
        count = u32(2)
        first = {**LLAMA_METADATA, "split.no": u32(0), "split.count": count, "split.tensors.count": u32(4)}
        second = {"split.no": u32(changes.get("number", 1)), "split.count": count}
        kept = tensors[:2] if not changes.get("lost") else tensors[:1]
        further = tensors[2:] if not changes.get("repeated") else tensors[1:]
        name = changes.get("first_name", "m-00001-of-00002.gguf")
        GGUF(first, kept).write(folder / name)
        if not changes.get("missing"):
            GGUF(second, further).write(folder / "m-00002-of-00002.gguf")
        return folder / str(changes.get("open") or name)

    return build


MAP = dict.fromkeys(small_tensors(), "model-00001-of-00001.safetensors")
VALID = safetensors(small_tensors())
HEADER_END = 8 + struct.unpack("<Q", VALID[:8])[0]
START, PAIRS, TABLE = GGUF().header()

HUGGING_FACE = [
    Case("directory-empty", lambda folder: folder, ("config.json",)),
    _directory("readme-only", {"README.md": b"hello"}, "config.json"),
    _directory("adapter", {"adapter_config.json": b"{}"}, "adapter_config.json", "adapter"),
    _directory("no-weights", {"config.json": json.dumps(LLAMA_CONFIG).encode()}, "model.safetensors"),
    *(
        _directory(
            f"pickle-{file}",
            {"config.json": json.dumps(LLAMA_CONFIG).encode(), file: b"\x80\x04."},
            file,
            "pickle",
            "policy",
        )
        for file in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt")
    ),
    _directory(
        "other-framework",
        {"config.json": json.dumps(LLAMA_CONFIG).encode(), "tf_model.h5": b"x"},
        "tf_model.h5",
        "another framework",
    ),
    _directory(
        "shards-without-index",
        {"config.json": json.dumps(LLAMA_CONFIG).encode(), "model-00001-of-00002.safetensors": VALID},
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ),
    Case("config-is-a-pipe", _pipe, ("config.json", "not a regular file")),
    Case("weights-are-a-dangling-link", _dangling, ("model.safetensors", "no such file")),
    _config("empty", b"", "empty"),
    _config("garbled", b'{"model_type": "lla', "not valid JSON", "line 1"),
    _config("binary", b"\xff\xfe\x00\x01", "UTF-8"),
    _config("array", b"[1, 2]", "JSON object is expected"),
    _config("string", b'"llama"', "JSON object is expected"),
    _config("null", b"null", "JSON object is expected"),
    _config("deep", b"[" * 2_000_000, "nested too deeply"),
    _config("long-integer", b'{"vocab_size": ' + b"9" * 1_000_000 + b"}", "an integer of 1000000 digits"),
    _config("huge", b'{"model_type": "llama"}' + b" " * (5 << 20), "bytes"),
    _config("no-model-type", {"hidden_size": 4}, "'model_type'"),
    _field("model_type", ["llama"]),
    _field("hidden_size", "32"),
    _field("hidden_size", -32),
    _field("hidden_size", 0),
    _field("hidden_size", 32.5),
    _field("hidden_size", True),
    _field("vocab_size", 2**40),
    _field("num_hidden_layers", [1]),
    _field("num_hidden_layers", 10**9),
    _field("rms_norm_eps", "1e-5"),
    _field("rms_norm_eps", -1.0),
    _field("rope_theta", float("inf")),
    _field("tie_word_embeddings", "yes"),
    _field("hidden_act", 3),
    _field("rope_scaling", "linear"),
    _field("eos_token_id", {"id": 2}),
    _field("eos_token_id", [1, "2"]),
    _field("auto_map", "code.py"),
    _field("quantization_config", {"quant_method": "gptq", "bits": 4}),
    _field("quantization_config", {"quant_method": "awq"}),
    _field("quantization", {"group_size": 64, "bits": 4}),
    Case(
        "generation-config-garbled",
        lambda folder: write_directory(folder, generation_config__json=b"{"),
        ("generation_config.json", "not valid JSON"),
    ),
    Case(
        "generation-config-field",
        lambda folder: write_directory(folder, generation_config__json=b'{"temperature": "hot"}'),
        ("generation_config.json", "'temperature'"),
    ),
    _weights("empty", b"", "empty"),
    _weights("seven-bytes", VALID[:7], "7 bytes"),
    _weights("header-only-half", VALID[: HEADER_END // 2], "header length"),
    _weights("no-data", VALID[:HEADER_END], "truncated", f"'{next(iter(small_tensors()))}'"),
    _weights("data-one-byte-short", VALID[:-1], "truncated", f"'{DOWN}'", "'data_offsets'"),
    _weights("data-one-byte-long", VALID + b"\0", "belong to no tensor"),
    _weights("header-length-2^63", safetensors(small_tensors(), length=2**63), "header length", "truncated"),
    _weights("header-length-short", safetensors(small_tensors(), length=30), "header", "not valid JSON"),
    _weights("header-length-zero", safetensors(small_tensors(), length=0), "header", "empty"),
    Case("safetensors-header-90-GB", _sparse_weights, ("model.safetensors", "header length")),
    _weights("header-array", safetensors({}, b"[]"), "header", "JSON object is expected"),
    _weights("header-deep", safetensors({}, b'{"a":' * 1_000_000), "header", "nested too deeply"),
    _weights("header-twice", safetensors({}, b'{"a":{}, "a":{}}'), "'a'", "twice"),
    _weights("header-field-twice", safetensors({}, b'{"a":{"shape":[],"shape":[]}}'), "'shape'", "twice"),
    Case(
        "safetensors-no-tensors",
        lambda folder: write_directory(folder, weights=safetensors({})),
        ("no tensors",),
    ),
    _weights("metadata", safetensors({}, b'{"__metadata__": {"format": 1}}'), "'__metadata__'"),
    _header("entry-not-object", lambda header: header.update({DOWN: [1]}), f"'{DOWN}'", "not an object"),
    _header("entry-without-shape", lambda header: header[DOWN].pop("shape"), f"'{DOWN}'", "'shape'"),
    _header("entry-without-offsets", lambda header: header[DOWN].pop("data_offsets"), "'data_offsets'"),
    _entry("dtype-unknown", "dtype", "F128", "F128"),
    _entry("dtype-float8", "dtype", "F8_E4M3", "F8_E4M3"),
    _entry("dtype-type", "dtype", 16),
    _entry("shape-negative", "shape", [-32, -6]),
    _entry("shape-float", "shape", [32.0, 6]),
    _entry("shape-boolean", "shape", [True, 192]),
    _entry("shape-string", "shape", "32x6"),
    _entry("shape-too-deep", "shape", [1] * 9),
    _entry("shape-overflow", "shape", [2**40, 2**40]),
    _entry("shape-wraps-to-size", "shape", [2**63 - 1, 2**63 - 1, 2, 2, 2, 2, 2, 2]),
    _entry("shape-beyond-64-bits", "shape", [2**64]),
    _entry("shape-wrong", "shape", [32, 7]),
    _entry("offsets-negative", "data_offsets", [-4, 380]),
    _entry("offsets-one", "data_offsets", [0]),
    _entry("offsets-reversed", "data_offsets", [2944, 2560]),
    _entry("offsets-overlap", "data_offsets", [0, 384], "overlaps"),
    _entry("offsets-beyond", "data_offsets", [10**6, 10**6 + 384], "truncated"),
    _header("offsets-gap", lambda header: header.pop(NORM), "unused bytes", "'data_offsets'"),
    _index("empty", b"", "empty"),
    _index("array", [], "JSON object is expected"),
    _index("no-map", {"metadata": {}}, "'weight_map'"),
    _index("map-empty", {"weight_map": {}}, "'weight_map'"),
    _index("map-array", {"weight_map": ["a"]}, "'weight_map'"),
    _index("map-number", {"weight_map": {DOWN: 3}}, "'weight_map'", f"'{DOWN}'"),
    _index("map-twice", b'{"weight_map": {"a": "b", "a": "c"}}', "'a'", "twice"),
    *(
        _index(f"outside-{number}", {"weight_map": {DOWN: file}}, "'weight_map'", "inside this directory")
        for number, file in enumerate(
            [
                "../model.safetensors",
                "/etc/model.safetensors",
                "a/../../model.safetensors",
                "..\\model.safetensors",
                "C:\\model.safetensors",
                "/etc/passwd",
                "a\0.safetensors",
                "pytorch_model.bin",
            ]
        )
    ),
    _index(
        "missing-shard", {"weight_map": {**MAP, "x": "model-00002-of-00002.safetensors"}}, "'x'", "missing"
    ),
    _index("missing-tensor", {"weight_map": {**MAP, "x": MAP[DOWN]}}, "'x'", "does not hold it"),
]

GGUF_FILES = [
    _gguf("empty", b"", "empty"),
    _gguf("magic", GGUF(magic=b"GGML"), "GGML"),
    _gguf("three-bytes", b"GGU", "truncated"),
    _gguf("version-1", GGUF(version=1), "version is 1"),
    _gguf("version-4", GGUF(version=4), "version is 4"),
    _gguf("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    _gguf("tensor-count-2^64", GGUF(tensor_count=2**64 - 1), "tensor count"),
    _gguf("pair-count-2^63", GGUF(pair_count=2**63), "metadata count"),
    _gguf("pair-count-one-more", GGUF(pair_count=len(LLAMA_METADATA) + 1), "length of the name of"),
    _gguf("pair-count-one-less", GGUF(pair_count=len(LLAMA_METADATA) - 1), "tensor"),
    _gguf("tensor-count-one-more", GGUF(tensor_count=5), "tensor 4"),
    Case(
        "gguf-tensor-count-of-a-huge-file",
        _sparse("model.gguf", b"GGUF" + struct.pack("<IQQ", 3, 3_000_000, 0), 100 << 30),
        ("model.gguf", "tensor count"),
    ),
    Case(
        "gguf-string-of-a-huge-file",
        _sparse(
            "model.gguf",
            b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("k") + struct.pack("<IQ", 8, 1 << 35),
            1 << 40,
        ),
        ("model.gguf", "'k'", "length"),
    ),
    Case(
        "gguf-array-of-a-huge-file",
        _sparse(
            "model.gguf",
            b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("k") + struct.pack("<IIQ", 9, 0, 100 << 20),
            1 << 40,
        ),
        ("model.gguf", "'k'", "length"),
    ),
    Case(
        "gguf-strings-of-a-huge-file",
        _sparse(
            "model.gguf",
            b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("k") + struct.pack("<IIQ", 9, 8, 10_000_000),
            1 << 40,
        ),
        ("model.gguf", "'k'", "length"),
    ),
    _gguf(
        "49-bytes-array-length-2^63",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, U8, 2**63),
        "'k'",
        "array length",
    ),
    _gguf(
        "strings-array-length-2^63",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, 2**63),
        "'k'",
        "array length",
    ),
    _metadata("array-too-long", {"a": (ARRAY, array(F32, 10_000, b""))}, "array length"),
    _metadata("array-nested", {"a": (ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))}, "array of arrays"),
    _metadata("array-element-type", {"a": (ARRAY, array(77, 1, b"\0"))}, "unknown type 77"),
    _metadata("array-string-long", {"a": (ARRAY, array(STRING, 1, struct.pack("<Q", 2**62)))}, "element 0"),
    _metadata("array-string-utf8", {"a": (ARRAY, array(STRING, 1, text(b"\xff")))}, "element 0", "UTF-8"),
    _metadata("string-long", {"a": (STRING, struct.pack("<Q", 2**63))}, "length"),
    _metadata("string-past-end", {"a": (STRING, struct.pack("<Q", 2**20))}, "truncated"),
    _metadata("string-utf8", {"a": (STRING, text(b"\xc3"))}, "UTF-8"),
    _metadata("type-unknown", {"a": (13, b"")}, "unknown type 13"),
    _metadata("boolean", {"a": (BOOL, b"\x02")}, "boolean"),
    _gguf(
        "key-twice",
        GGUF(
            pair_count=len(LLAMA_METADATA) + 1,
            raw_pairs=text("llama.block_count") + struct.pack("<II", U32, 1),
        ),
        "'llama.block_count'",
        "twice",
    ),
    _gguf("key-empty", GGUF(metadata={"": u32(1), **LLAMA_METADATA}), "metadata key 0", "empty"),
    _gguf(
        "key-long",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**40) + b"x" * 64,
        "metadata key 0",
    ),
    _metadata("alignment-0", {"general.alignment": u32(0)}, "power of two"),
    _metadata("alignment-24", {"general.alignment": u32(24)}, "power of two"),
    _metadata("alignment-string", {"general.alignment": string("32")}, "power of two"),
    *(
        _metadata(f"missing-{key}", {key: None}, "missing")
        for key in (
            "general.architecture",
            "llama.block_count",
            "llama.context_length",
            "llama.embedding_length",
            "llama.feed_forward_length",
            "llama.attention.head_count",
            "llama.attention.layer_norm_rms_epsilon",
        )
    ),
    _metadata("type-of-size", {"llama.block_count": string("1")}, "integer"),
    _metadata("size-zero", {"llama.attention.head_count": u32(0)}, "integer"),
    _metadata("size-boolean", {"llama.block_count": (BOOL, b"\1")}, "integer"),
    _metadata("layers-2^31", {"llama.block_count": u32(2**32 - 1)}, "integer"),
    _metadata(
        "layers-unequal",
        {"llama.feed_forward_length": (ARRAY, array(U32, 2, struct.pack("<2I", 64, 32)))},
        "differs between layers",
    ),
    _metadata("type-of-number", {"llama.attention.layer_norm_rms_epsilon": string("x")}, "number"),
    _metadata("number-nan", {"llama.rope.freq_base": f32(float("nan"))}, "number"),
    _metadata("number-negative", {"llama.rope.freq_base": f32(-1)}, "positive"),
    _metadata("token-id", {"tokenizer.ggml.eos_token_id": f32(2)}, "token id"),
    _metadata("architecture", {"general.architecture": string("bert")}, "bert", "llama, gpt2"),
    _metadata("architecture-type", {"general.architecture": u32(3)}, "string"),
    _metadata("adapter", {"general.type": string("adapter")}, "adapter"),
    _metadata("experts", {"llama.expert_count": u32(8)}, "not supported"),
    _metadata("value-length", {"llama.attention.value_length": u32(16)}, "head dimension"),
    _metadata("partial-rotary", {"llama.rope.dimension_count": u32(4)}, "head dimension"),
    _metadata("scaling-type", {"llama.rope.scaling.type": string("longrope")}, "longrope"),
    _metadata("scaling-factor", {"llama.rope.scaling.factor": f32(-2)}, "positive"),
    _metadata("split-count", {"split.count": string("2")}, "count"),
    _gguf(
        "layers-without-tensors",
        GGUF({**LLAMA_METADATA, "llama.block_count": u32(10**9)}),
        "num_hidden_layers",
    ),
    _gguf("no-tensors", GGUF(tensors=[]), "no tensors"),
    _gguf("no-embedding", GGUF(tensors=llama_tensors()[1:]), "'token_embd.weight'"),
    _tensor("name-empty", 1, "empty", name=""),
    _tensor("name-utf8", 1, "UTF-8", name=b"\xff"),
    _tensor("name-twice", 1, "twice", name="token_embd.weight"),
    _tensor("rank-0", 1, "0 dimensions", dims=(), rank=0),
    _tensor("rank-5", 1, "5 dimensions", dims=(2, 2, 2, 2, 2)),
    _tensor("rank-2^32", 1, "dimensions", rank=2**32 - 1),
    _tensor("dimension-zero", 1, "shape", dims=(0,)),
    _tensor("dimension-2^64", 1, "shape", dims=(2**64 - 1,)),
    _tensor("dimensions-overflow", 1, "shape", dims=(2**32, 2**32)),
    _tensor("dimensions-overflow-to-small", 1, "shape", dims=(2**33, 2**31 + 1)),
    _tensor("type-unknown", 1, "type 1000", type=1000),
    _tensor("type-removed", 1, "type 4", type=4),
    _tensor("type-not-dequantizable", 3, "q8_1", type=GGML_Q8_1, data=bytes(HIDDEN * 2 * 40)),
    _tensor("partial-block", 3, "blocks of 32", dims=(33, 32)),
    _tensor("offset-misaligned", 1, "alignment", offset=4),
    _tensor("offset-beyond", 1, "beyond", offset=2**40),
    _tensor("offset-2^64", 1, "beyond", offset=2**64 - 32),
    _tensor("offset-overlap", 1, "overlap", offset=0),
    _tensor("too-large", 3, "beyond", dims=(64, 2**20)),
    _tensor("heads", 2, "heads", dims=(16, 60), data=bytes(2 * 16 * 60)),
    _tensor("embedding-rank", 0, "matrix", dims=(HIDDEN * VOCAB,)),
    _gguf(
        "rope-factors-type",
        GGUF(tensors=[*llama_tensors(), GGUFTensor("rope_freqs.weight", (32,), GGML_Q8_0, bytes(34))]),
        "'rope_freqs.weight'",
    ),
    _gguf(
        "rope-factors-size",
        GGUF(
            tensors=[
                *llama_tensors(),
                GGUFTensor("rope_freqs.weight", (5,), GGML_F32, struct.pack("<5f", *[2] * 5)),
            ]
        ),
        "'rope_freqs.weight'",
    ),
    _gguf(
        "rope-factors-of-no-rule",
        GGUF(
            tensors=[
                *llama_tensors(),
                GGUFTensor("rope_freqs.weight", (4,), GGML_F32, struct.pack("<4f", 3, 1, 2, 1)),
            ]
        ),
        "'rope_freqs.weight'",
        "llama3",
    ),
    _gguf(
        "rope-factors-nan",
        GGUF(
            tensors=[
                *llama_tensors(),
                GGUFTensor("rope_freqs.weight", (4,), GGML_F32, struct.pack("<4f", 1, float("nan"), 2, 1)),
            ]
        ),
        "'rope_freqs.weight'",
    ),
    _gguf("truncated-in-counts", START[:-3], "tensor count"),
    _gguf("truncated-in-metadata", START + PAIRS[: len(PAIRS) // 2], "truncated"),
    _gguf("truncated-in-table", START + PAIRS + TABLE[:-5], "truncated"),
    _gguf("truncated-before-data", START + PAIRS + TABLE, "truncated"),
    _gguf("truncated-in-data", GGUF().to_bytes()[:-1], "truncated", "'blk.0.ffn_down.weight'"),
    Case("gguf-is-a-pipe", _pipe_file, ("model.gguf", "not a regular file")),
    Case("gguf-two-in-a-directory", _two_ggufs, ("a.gguf", "b.gguf")),
    Case("split-missing-part", _split(missing=True), ("m-00002-of-00002.gguf", "missing")),
    Case("split-wrong-number", _split(number=5), ("m-00002-of-00002.gguf", "'split.no'")),
    Case("split-lost-tensor", _split(lost=True), ("m-00001-of-00002.gguf", "'split.tensors.count'")),
    Case(
        "split-repeated-tensor", _split(repeated=True), ("m-00002-of-00002.gguf", "'blk.0.attn_norm.weight'")
    ),
    Case("split-renamed", _split(first_name="m.gguf"), ("m.gguf", "'split.count'")),
    Case(
        "split-later-part", _split(open="m-00002-of-00002.gguf"), ("m-00002-of-00002.gguf", "'split.count'")
    ),
]

OTHER = [
    _file("file-text", "notes.txt", b"once upon a time", "neither"),
    _file("file-empty", "notes.txt", b"", "neither"),
    _file("file-pickle", "model.bin", b"\x80\x04.", "pickle", "policy"),
    _file("file-zip", "model.pt", b"PK\x03\x04", "pickle", "policy"),
    _file("file-of-a-directory", "model.safetensors", VALID, "directory"),
    Case("path-missing", lambda folder: folder / "nowhere", ("nowhere", "no such file")),
    Case("path-below-a-file", lambda folder: GGUF().write(folder / "f") / "x", ("x", "no such file")),
]

CASES = [*HUGGING_FACE, *GGUF_FILES, *OTHER]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_input_is_refused_with_a_sentence(case: Case, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        seconds = time.perf_counter() - begin
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    for word in case.words:
        assert word in message, f"{word!r} is not in: {message}"
    assert message.endswith("."), message
    assert "\n" not in message, message
    assert len(message) < 600 + len(str(tmp_path)), message
    assert seconds < SECONDS
    assert peak < BYTES


def test_case_names_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 45


def test_what_the_cases_are_made_from_is_well_formed(tmp_path: Path) -> None:
    """Otherwise a case could be refused for another reason than its own."""
    assert len(open_checkpoint(write_directory(tmp_path / "directory")).tensors) == 3
    assert len(open_checkpoint(GGUF().write(tmp_path / "model.gguf")).tensors) == 4
    assert len(open_checkpoint(_split()(tmp_path)).tensors) == 4
