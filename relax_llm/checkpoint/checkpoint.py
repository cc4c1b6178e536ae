"""The data: a checkpoint and its tensors, whatever they were stored in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from relax_llm.text.tokenizer import Tokenizer

__all__ = ["Checkpoint", "Tensor"]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, not read yet.

    Attributes:
        name: The Hugging Face name, such as `model.layers.3.mlp.down_proj.weight`.
        shape: Its sizes, outermost first, as Hugging Face has them.
        dtype: How it is stored: a NumPy name ("float32", "bfloat16", "int64"), or a ggml type ("q4_1").
        nbytes: Its size in the file.
        file: The file that holds it.
        raw_is_transposed: Rows of `raw()` run along the last axis of `shape`, not the first: GPT-2 linears,
            which Hugging Face keeps as [inputs, outputs] and GGUF as [outputs, inputs].
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    read_stored: Callable[[], NDArray[Any]] = field(repr=False, compare=False)
    read_blocks: Callable[[], NDArray[np.uint8]] | None = field(default=None, repr=False, compare=False)
    raw_is_transposed: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored in ggml blocks, so that `read` dequantizes and `raw` gives the blocks."""
        return self.read_blocks is not None

    def read(self) -> NDArray[Any]:
        """Read this tensor alone.

        Returns:
            An array of `shape`. Floats and integers come in the stored dtype, as a read-only view of the
            mapped file wherever the order in the file is the order of `shape` (it may be strided, and at an
            address that is no multiple of the item size). Quantized tensors are dequantized to float32, into
            new memory.
        """
        return self.read_stored()

    def holding(self, read: Callable[[], NDArray[Any]]) -> Tensor:
        """The same tensor with other numbers, which `read` gives as float32."""
        return replace(self, dtype="float32", read_stored=read, read_blocks=None, raw_is_transposed=False)

    def raw(self) -> NDArray[np.uint8]:
        """Read the quantized blocks as they are stored.

        Returns:
            uint8 [rows, bytes per row] for a matrix; rows are those of `shape` (see `raw_is_transposed`).

        Raises:
            CheckpointError: The tensor is not quantized.
        """
        if self.read_blocks is None:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} is stored as {self.dtype}, so it has no quantized "
                "blocks; use read()."
            )
        return self.read_blocks()


@dataclass(frozen=True)
class Checkpoint:
    """A language model on disk, described in Hugging Face's vocabulary.

    Attributes:
        path: The directory or the GGUF file.
        format: Which of the two.
        config: `config.json`, or a GGUF file's metadata in the same words.
        generation_config: `generation_config.json` likewise; empty when there is none.
        tensors: Every tensor by its Hugging Face name, in the order of the files.
        fingerprint: Hexadecimal; differs whenever a file that matters has changed.
        notes: What was found and deliberately not used, one sentence each.
    """

    path: Path
    format: Literal["huggingface", "gguf"]
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    fingerprint: str
    notes: tuple[str, ...]
    tokenizer_loader: Callable[[], Tokenizer] = field(repr=False, compare=False)

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that belongs to the model.

        Raises:
            TokenizerError: There is none, or it cannot be built.
        """
        return self.tokenizer_loader()
