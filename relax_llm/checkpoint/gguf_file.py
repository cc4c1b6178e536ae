"""A GGUF file as a whole checkpoint: names translated, tensors mapped, and dequantized one at a time."""

from __future__ import annotations

import math
import re
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from relax_llm.checkpoint.checkpoint import Checkpoint, Tensor
from relax_llm.checkpoint.config import check_layer_count
from relax_llm.checkpoint.files import Fingerprint, is_file, map_file
from relax_llm.checkpoint.gguf_config import generation_config, model_config
from relax_llm.checkpoint.gguf_header import GGUFHeader, TensorEntry, read_header
from relax_llm.checkpoint.gguf_names import LAYOUTS, Placement
from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from relax_llm.text.tokenizer import Tokenizer

__all__ = ["is_later_split", "open_gguf"]

PLAIN: Mapping[str, np.dtype[Any]] = {
    "f64": np.dtype("<f8"),
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "i64": np.dtype("<i8"),
    "i32": np.dtype("<i4"),
    "i16": np.dtype("<i2"),
    "i8": np.dtype("i1"),
}
"""ggml types that are arrays of numbers; all others are blocks."""

CHUNK = 1 << 20
"""Elements that are dequantized at a time, so that intermediate results stay small."""

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

_Stored = tuple[TensorEntry, "NDArray[np.uint8]", "Path"]


def is_later_split(path: Path) -> bool:
    """Whether a file's name says that it is a part of a split model other than the first."""
    match = _SPLIT.fullmatch(path.name)
    return match is not None and int(match[2]) != 1


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file, or the first file of a split one.

    Raises:
        CheckpointError: It is malformed, a part is missing, or its architecture or a tensor's type is not
            supported.
    """
    fingerprint = Fingerprint()
    fingerprint.add("gguf")
    header, stored = _read_parts(path, fingerprint)
    if not stored:
        raise CheckpointError(f"{path}: the file holds no tensors; it is a vocabulary and not a model.")
    entries = {name: entry for name, (entry, _, _) in stored.items()}
    config = model_config(path, header.metadata, entries, lambda: _rope_factors(stored))
    check_layer_count(config, len(stored), path)
    layout = LAYOUTS[header.metadata["general.architecture"]]
    tensors: dict[str, Tensor] = {}
    for name, (entry, data, file) in stored.items():
        placement = layout.place(name, config)
        if placement is None:
            continue
        if placement.name in tensors:
            raise CheckpointError(f"{file}: tensor {name!r}: another tensor is already {placement.name!r}.")
        tensors[placement.name] = _tensor(entry, data, file, placement)
    metadata = MappingProxyType(header.metadata)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        generation_config=generation_config(path, header.metadata),
        tensors=MappingProxyType(tensors),
        fingerprint=fingerprint.hexdigest(),
        notes=_notes(header.metadata, config),
        tokenizer_loader=lambda: _load_tokenizer(metadata, path),
    )


def _load_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    from relax_llm.checkpoint.gguf_tokenizer import tokenizer_from_gguf

    return tokenizer_from_gguf(metadata, path)


def _notes(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...]:
    key = f"{metadata['general.architecture']}.vocab_size"
    if metadata.get(key, config["vocab_size"]) != config["vocab_size"]:
        return (
            f"{key} is {metadata[key]!r} and is ignored: the embedding has {config['vocab_size']} rows, "
            "which counts.",
        )
    return ()


def _read_parts(path: Path, fingerprint: Fingerprint) -> tuple[GGUFHeader, dict[str, _Stored]]:
    """Read the header of a file and, when it is split, of every further part."""
    header, stored = _read_part(path, fingerprint)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= 99999:
        raise CheckpointError(
            f"{path}: the metadata key 'split.count' is {str(count)[:40]}, where a count is expected."
        )
    if count <= 1:
        return header, stored
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match[2]) != 1 or int(match[3]) != count or header.metadata.get("split.no") != 0:
        raise CheckpointError(
            f"{path}: this is one of {count} parts of a split model ('split.count'); open the first part, "
            f"whose name ends in -00001-of-{count:05d}.gguf, with the others beside it."
        )
    for number in range(1, count):
        part = path.with_name(f"{match[1]}-{number + 1:05d}-of-{count:05d}.gguf")
        if not is_file(part):
            raise CheckpointError(f"{part}: this part of the split model {path.name} is missing; fetch it.")
        part_header, part_stored = _read_part(part, fingerprint)
        if part_header.metadata.get("split.no") != number:
            raise CheckpointError(
                f"{part}: the metadata key 'split.no' is {str(part_header.metadata.get('split.no'))[:40]}, "
                f"where {number} is expected."
            )
        for name, found in part_stored.items():
            if name in stored:
                raise CheckpointError(
                    f"{part}: the tensor {name!r} is in an earlier part of the split model, too."
                )
            stored[name] = found
    expected = header.metadata.get("split.tensors.count", len(stored))
    if expected != len(stored):
        raise CheckpointError(
            f"{path}: the metadata key 'split.tensors.count' is {str(expected)[:40]}, but the parts hold "
            f"{len(stored)} tensors."
        )
    return header, stored


def _read_part(path: Path, fingerprint: Fingerprint) -> tuple[GGUFHeader, dict[str, _Stored]]:
    data = map_file(path)
    header = read_header(path, data)
    fingerprint.add_file(path)
    fingerprint.add(data[: header.end].data)
    return header, {
        entry.name: (entry, data[entry.offset : entry.offset + entry.nbytes], path)
        for entry in header.tensors
    }


def _rope_factors(stored: Mapping[str, _Stored]) -> NDArray[np.float32] | None:
    if "rope_freqs.weight" not in stored:
        return None
    entry, data, file = stored["rope_freqs.weight"]
    if entry.type_name != "f32" or len(entry.shape) != 1:
        raise CheckpointError(
            f"{file}: the tensor 'rope_freqs.weight' is {entry.type_name} {list(entry.shape)}, where one row "
            "of f32 is expected."
        )
    return data.view("<f4")


def _tensor(entry: TensorEntry, data: NDArray[np.uint8], file: Path, placement: Placement) -> Tensor:
    _check_placement(entry, file, placement)
    shape = entry.shape[::-1] if placement.transpose else entry.shape
    plain = PLAIN.get(entry.type_name)
    if plain is None:
        _check_dequantizable(entry, file)
    row_bytes = entry.nbytes // math.prod(entry.shape[:-1])

    def blocks() -> NDArray[np.uint8]:
        stored = data.reshape(*entry.shape[:-1], row_bytes)
        return _half_rotated(stored, placement.heads) if placement.heads else stored

    def read() -> NDArray[Any]:
        if plain is None:
            values = _dequantize(blocks(), entry)
        else:
            values = data.view(plain).reshape(entry.shape)
            values = _half_rotated(values, placement.heads) if placement.heads else values
        return values.T if placement.transpose else values

    return Tensor(
        name=placement.name,
        shape=shape,
        dtype=entry.type_name if plain is None else plain.name,
        nbytes=entry.nbytes,
        file=file,
        read_stored=read,
        read_blocks=blocks if plain is None else None,
        raw_is_transposed=placement.transpose,
    )


def _check_placement(entry: TensorEntry, file: Path, placement: Placement) -> None:
    """Check that a tensor has a shape that can be permuted or transposed as its placement asks."""
    where = f"{file}: tensor {entry.name!r}"
    if placement.transpose and len(entry.shape) != 2:
        raise CheckpointError(f"{where}: its shape is {list(entry.shape)}, where a matrix is expected.")
    if placement.heads and entry.shape[0] % (2 * placement.heads):
        raise CheckpointError(
            f"{where}: its {entry.shape[0]} rows cannot be divided among {placement.heads} heads of an even "
            "dimension."
        )
    if placement.heads and len(entry.shape) == 1 and entry.type_name not in PLAIN:
        raise CheckpointError(f"{where}: a quantized vector cannot be permuted by heads.")


def _half_rotated(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's interleaving of the two halves of each head's rows, into new memory.

    Stored rows of a head are 0, d/2, 1, d/2 + 1, ...; Hugging Face's are 0, 1, 2, ...
    """
    interleaved = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [heads, head_dim / 2, half, ...]
    restored: NDArray[Any] = interleaved.swapaxes(1, 2).reshape(rows.shape)
    return restored


def _dequantize(blocks: NDArray[np.uint8], entry: TensorEntry) -> NDArray[np.float32]:
    """Dequantize [..., bytes per row] to float32 `entry.shape`."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    ggml_type = GGMLQuantizationType(entry.type_id)
    columns = entry.shape[-1]
    flat = blocks.reshape(-1, blocks.shape[-1])
    values = np.empty((flat.shape[0], columns), np.float32)
    step = max(CHUNK // columns, 1)
    # Blocks may hold any bits: infinities and NaN are for the reader of the weights to report.
    with np.errstate(all="ignore"):
        for begin in range(0, flat.shape[0], step):
            values[begin : begin + step] = dequantize(flat[begin : begin + step], ggml_type)
    return values.reshape(entry.shape)


def _check_dequantizable(entry: TensorEntry, file: Path) -> None:
    if not _can_dequantize(entry.type_id):
        raise CheckpointError(
            f"{file}: tensor {entry.name!r}: its ggml type {entry.type_name} cannot be dequantized by the "
            "installed gguf package; a newer one may do it."
        )


@cache
def _can_dequantize(type_id: int) -> bool:
    """Whether the gguf package can: it says so only by doing it to one block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    ggml_type = GGMLQuantizationType(type_id)
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[ggml_type][1]), np.uint8), ggml_type)
    except NotImplementedError:
        return False
    return True
