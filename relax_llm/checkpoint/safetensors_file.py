"""One safetensors file: its header, checked in every particular, then views of the mapped data.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little endian; a
JSON object with one entry `{"dtype", "shape", "data_offsets"}` for each tensor; the data, without holes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from relax_llm.checkpoint.checkpoint import Tensor
from relax_llm.checkpoint.files import map_file
from relax_llm.checkpoint.jsonfile import parse_object
from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from relax_llm.checkpoint.files import Fingerprint

__all__ = ["read_safetensors"]

MAX_HEADER = 8 << 20
"""Bytes: room for some 50,000 tensors in one file, and a bound on what parsing can take."""

MAX_RANK = 8
MAX_DIMENSION = 2**63 - 1

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
}


def read_safetensors(path: Path, fingerprint: Fingerprint) -> list[Tensor]:
    """Read the header of a safetensors file and map its data.

    Args:
        path: The file.
        fingerprint: Takes in the file's name, size, time and header.

    Returns:
        Its tensors in the order of their data. Nothing of the data has been read.

    Raises:
        CheckpointError: The file is truncated, or its header is not valid or contradicts the file's size.
    """
    data = map_file(path)
    fingerprint.add_file(path)
    if data.size < 8:
        raise CheckpointError(
            f"{path}: the file has {data.size} bytes, too few for a safetensors header; fetch it again."
        )
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > data.size - 8:
        raise CheckpointError(
            f"{path}: the header length is {length} bytes, but only {data.size - 8} follow; "
            "the file is truncated or is not a safetensors file."
        )
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: the header length is {length} bytes; at most {MAX_HEADER} are accepted."
        )
    header_bytes = data[8 : 8 + length].tobytes()
    fingerprint.add(header_bytes)
    header = parse_object(header_bytes, f"{path}: header", unique=True)
    _check_metadata(path, header.pop("__metadata__", None))
    payload = data[8 + length :]
    entries = sorted(
        (_entry(path, name, entry) for name, entry in header.items()), key=lambda found: (found[3], found[4])
    )
    _check_layout(path, entries, payload.size)
    return [
        _tensor(path, name, dtype, shape, payload[begin:end]) for name, dtype, shape, begin, end in entries
    ]


_Entry = tuple[str, "np.dtype[Any]", tuple[int, ...], int, int]


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the header's '__metadata__' must map strings to strings.")


def _entry(path: Path, name: str, entry: Any) -> _Entry:
    """Check one entry by itself: fields, types, and that shape and offsets agree."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: its header entry is not an object.")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        raise CheckpointError(f"{where}: its header entry lacks {', '.join(map(repr, missing))}.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{where}: 'dtype' is {str(code)[:40]!r}, which is not supported (known: {', '.join(DTYPES)})."
        )
    if not isinstance(shape, list) or not all(map(_is_dimension, shape)) or len(shape) > MAX_RANK:
        raise CheckpointError(
            f"{where}: 'shape' is {str(shape)[:60]}, where at most {MAX_RANK} non-negative integers are "
            "expected."
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_dimension, offsets)):
        raise CheckpointError(
            f"{where}: 'data_offsets' is {str(offsets)[:60]}, where two non-negative integers are expected."
        )
    begin, end = offsets
    if end < begin:
        raise CheckpointError(f"{where}: 'data_offsets' end at {end}, before they begin at {begin}.")
    expected = math.prod(shape) * DTYPES[code].itemsize
    if expected != end - begin:
        raise CheckpointError(
            f"{where}: 'shape' {shape} of {code} takes {expected} bytes, but 'data_offsets' span "
            f"{end - begin}."
        )
    return name, DTYPES[code], tuple(shape), begin, end


def _is_dimension(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_DIMENSION


def _check_layout(path: Path, entries: list[_Entry], size: int) -> None:
    """Check that the tensors, in order, cover the data exactly."""
    position, before = 0, "the header"
    for name, _, _, begin, end in entries:
        if end > size:
            raise CheckpointError(
                f"{path}: tensor {name!r}: 'data_offsets' end at byte {end}, but the file holds {size} bytes "
                "of data; the file is truncated."
            )
        if begin < position:
            raise CheckpointError(
                f"{path}: tensor {name!r}: 'data_offsets' begin at byte {begin}, which overlaps {before}."
            )
        if begin > position:
            raise CheckpointError(
                f"{path}: tensor {name!r}: 'data_offsets' leave {begin - position} unused bytes after "
                f"{before}."
            )
        position, before = end, f"tensor {name!r}"
    if position != size:
        raise CheckpointError(
            f"{path}: {size - position} bytes after {before} belong to no tensor's 'data_offsets'."
        )


def _tensor(
    path: Path, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], data: NDArray[np.uint8]
) -> Tensor:
    return Tensor(
        name=name,
        shape=shape,
        dtype=dtype.name,
        nbytes=data.size,
        file=path,
        read_stored=lambda: data.view(dtype).reshape(shape),
    )
