"""Checkpoint files written by hand, byte by byte, so that a test can put any lie into them."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 32, 4, 2, 8, 64, 19

LLAMA_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
}

U8, I8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12
GGML_F32, GGML_F16, GGML_Q8_0, GGML_Q8_1 = 0, 1, 8, 9


def small_tensors() -> dict[str, NDArray[Any]]:
    """Three tensors of a directory, of two dtypes."""
    random = np.random.default_rng(7)
    return {
        "model.embed_tokens.weight": random.standard_normal((VOCAB, HIDDEN), np.float32),
        "model.layers.0.input_layernorm.weight": random.standard_normal(HIDDEN, np.float32),
        "model.layers.0.mlp.down_proj.weight": random.standard_normal((HIDDEN, 6)).astype(np.float16),
    }


CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "float64": "F64",
    "bool": "BOOL",
}


def header_of(tensors: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """The header of a safetensors file that holds these tensors in this order."""
    header: dict[str, Any] = {}
    position = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": CODES.get(
                tensor.dtype.name, tensor.dtype.name[0].upper() + tensor.dtype.name.lstrip("uint")
            ),
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    return header


def safetensors(
    tensors: dict[str, NDArray[Any]],
    header: dict[str, Any] | bytes | None = None,
    length: int | None = None,
) -> bytes:
    """A safetensors file; header and header length may be other than the tensors ask for."""
    header = header_of(tensors) if header is None else header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_directory(
    directory: Path,
    config: dict[str, Any] | bytes | None = None,
    weights: bytes | None = None,
    **files: bytes,
) -> Path:
    """A Hugging Face directory; `files` are further files, with `__` for the dot in their names."""
    directory.mkdir(parents=True, exist_ok=True)
    config = LLAMA_CONFIG if config is None else config
    (directory / "config.json").write_bytes(
        config if isinstance(config, bytes) else json.dumps(config).encode()
    )
    (directory / "model.safetensors").write_bytes(
        safetensors(small_tensors()) if weights is None else weights
    )
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_bytes(content)
    return directory


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def array(code: int, count: int, data: bytes) -> bytes:
    """A GGUF array value: element type, length, elements."""
    return struct.pack("<IQ", code, count) + data


def u32(value: int) -> tuple[int, bytes]:
    return U32, struct.pack("<I", value)


def f32(value: float) -> tuple[int, bytes]:
    return F32, struct.pack("<f", value)


def string(value: str) -> tuple[int, bytes]:
    return STRING, text(value)


LLAMA_METADATA: dict[str, tuple[int, bytes]] = {
    "general.architecture": string("llama"),
    "llama.block_count": u32(1),
    "llama.context_length": u32(128),
    "llama.embedding_length": u32(HIDDEN),
    "llama.feed_forward_length": u32(INTERMEDIATE),
    "llama.attention.head_count": u32(HEADS),
    "llama.attention.head_count_kv": u32(KV_HEADS),
    "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
    "tokenizer.ggml.eos_token_id": u32(2),
    "tokenizer.ggml.tokens": (ARRAY, array(STRING, 3, text("<s>") + text("é") + text(""))),
    "tokenizer.ggml.scores": (ARRAY, array(F32, 2, struct.pack("<2f", 0.5, -1))),
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to be written: dims innermost first, the offset follows unless it is given."""

    name: str | bytes
    dims: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None
    rank: int | None = None


def gguf_tensor(name: str, values: NDArray[Any]) -> GGUFTensor:
    codes = {"float32": GGML_F32, "float16": GGML_F16}
    return GGUFTensor(name, values.shape[::-1], codes[values.dtype.name], values.tobytes())


def llama_tensors() -> list[GGUFTensor]:
    random = np.random.default_rng(8)
    blocks = np.concatenate(
        [
            random.standard_normal((HIDDEN * 2, 1)).astype(np.float16).view(np.uint8),
            random.integers(0, 256, (HIDDEN * 2, 32), np.uint8),
        ],
        axis=1,
    )
    return [
        gguf_tensor("token_embd.weight", random.standard_normal((VOCAB, HIDDEN), np.float32)),
        gguf_tensor("blk.0.attn_norm.weight", random.standard_normal(HIDDEN, np.float32)),
        gguf_tensor("blk.0.attn_q.weight", random.standard_normal((HIDDEN, HIDDEN)).astype(np.float16)),
        GGUFTensor("blk.0.ffn_down.weight", (INTERMEDIATE, HIDDEN), GGML_Q8_0, blocks.tobytes()),
    ]


@dataclass(frozen=True)
class GGUF:
    """A GGUF file to be written; every count may be other than it ought to be."""

    metadata: dict[str, tuple[int, bytes]] = field(default_factory=lambda: dict(LLAMA_METADATA))
    tensors: list[GGUFTensor] = field(default_factory=llama_tensors)
    magic: bytes = b"GGUF"
    version: int = 3
    pair_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    raw_pairs: bytes = b""

    def header(self) -> tuple[bytes, bytes, bytes]:
        """Magic, version and counts; metadata; tensor table."""
        pairs = len(self.metadata) if self.pair_count is None else self.pair_count
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        start = self.magic + struct.pack("<IQQ", self.version, tensors, pairs)
        metadata = b"".join(
            text(key) + struct.pack("<I", code) + data for key, (code, data) in self.metadata.items()
        )
        table, position = b"", 0
        for tensor in self.tensors:
            rank = len(tensor.dims) if tensor.rank is None else tensor.rank
            table += text(tensor.name) + struct.pack("<I", rank)
            table += struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims)
            table += struct.pack("<IQ", tensor.type, position if tensor.offset is None else tensor.offset)
            position += -(-len(tensor.data) // self.alignment) * self.alignment
        return start, metadata + self.raw_pairs, table

    def to_bytes(self) -> bytes:
        result = b"".join(self.header())
        for tensor in self.tensors:
            result += b"\0" * (-len(result) % self.alignment) + tensor.data
        return result

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path
