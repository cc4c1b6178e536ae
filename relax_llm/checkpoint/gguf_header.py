"""The header of a GGUF file, walked within bounds: nothing is allocated before the file is known to hold it.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3): magic, version,
counts, typed key-value pairs, one entry for each tensor, then the tensors' data at aligned offsets. Every
count, length and offset in it may lie; each is held against what is left of the file.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["GGUFHeader", "TensorEntry", "read_header"]

MAX_HEADER = 128 << 20
"""Bytes of metadata and tensor table: a vocabulary of 262,144 tokens with its merges takes about 15 MB."""

MAX_STRING = 64 << 20
"""Bytes of one string: a whole tokenizer.json may be in one."""

MAX_ELEMENTS = 1 << 22
"""Array elements in all: the largest vocabularies with scores, types and merges have about 1.3 million."""

MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY = 65535
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
_SCALARS: dict[int, struct.Struct] = {
    code: struct.Struct(f"<{letter}")
    for code, letter in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", _FLOAT32: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header describes it.

    Attributes:
        name: GGUF's name, such as `blk.3.ffn_down.weight`.
        shape: Outermost dimension first (the file has them innermost first).
        type_name: The ggml type in lower case: "f32", "q4_1".
        type_id: Its number.
        offset: Where its data begin in the file.
        nbytes: How long they are.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    type_id: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says before its data.

    Attributes:
        path: The file.
        metadata: Key to value, in the file's order: int, float, bool, str, or a list of one of these. A
            float32 is given as the shortest decimal that rounds to it (1e-05, not 9.999999747378752e-06).
        tensors: In the file's order.
        end: Where the tensor table ends: all bytes before are the header.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    end: int


def read_header(path: Path, data: NDArray[np.uint8]) -> GGUFHeader:
    """Walk the header of a GGUF file of version 2 or 3, little endian.

    Args:
        path: Named in messages.
        data: uint8 [file size], the mapped file.

    Raises:
        CheckpointError: It is not such a file, it is truncated, or something in it contradicts the file's
            size.
    """
    cursor = _Cursor(path, data)
    _check_magic_and_version(path, cursor)
    tensor_count = cursor.count("the tensor count", smallest=8 + 4 + 8 + 4 + 8, largest=MAX_TENSORS)
    pair_count = cursor.count("the metadata count", smallest=8 + 4 + 1, largest=MAX_PAIRS)
    metadata: dict[str, Any] = {}
    for number in range(pair_count):
        key = cursor.string(f"the name of metadata key {number}", limit=MAX_KEY)
        if not key:
            raise CheckpointError(f"{path}: the name of metadata key {number} is empty.")
        if key in metadata:
            raise CheckpointError(f"{path}: the metadata key {key!r} appears twice.")
        metadata[key] = cursor.value(key)
    alignment = _alignment(path, metadata)
    raw_entries = [cursor.tensor(number) for number in range(tensor_count)]
    end = cursor.position
    data_begin = -(-end // alignment) * alignment
    tensors = tuple(_resolve(path, raw, data_begin, alignment, data.size) for raw in raw_entries)
    _check_layout(path, tensors)
    return GGUFHeader(path, metadata, tensors, end)


def _check_magic_and_version(path: Path, cursor: _Cursor) -> None:
    magic = cursor.take(4, "the magic bytes").tobytes()
    if magic != b"GGUF":
        raise CheckpointError(
            f"{path}: the file begins with {magic!r}, not with 'GGUF'; it is not a GGUF file."
        )
    version = cursor.number(4, "the version")
    if version and version & 0xFFFF == 0:
        raise CheckpointError(
            f"{path}: this is a big-endian GGUF file, which is not supported; convert it with "
            "`gguf-convert-endian FILE little` from the gguf package."
        )
    if version not in (2, 3):
        raise CheckpointError(
            f"{path}: the GGUF version is {version}; versions 2 and 3 are read. Convert the model again with "
            "a current llama.cpp."
        )


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or alignment < 1
        or alignment & (alignment - 1)
    ):
        raise CheckpointError(
            f"{path}: 'general.alignment' is {alignment!r}, where a power of two is expected."
        )
    return alignment


_RawTensor = tuple[str, tuple[int, ...], int, int]


def _resolve(path: Path, raw: _RawTensor, data_begin: int, alignment: int, file_size: int) -> TensorEntry:
    """Check one entry against its type's block size and against the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, type_id, offset = raw
    where = f"{path}: tensor {name!r}"
    try:
        ggml_type = GGMLQuantizationType(type_id)
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{where}: its ggml type {type_id} is unknown; a newer gguf package may know it."
        ) from None
    if shape[-1] % block:
        raise CheckpointError(
            f"{where}: its rows of {shape[-1]} elements are not whole blocks of {block}, as {ggml_type.name} "
            "needs."
        )
    nbytes = math.prod(shape) // block * block_bytes
    if offset % alignment:
        raise CheckpointError(f"{where}: its offset {offset} is not a multiple of the alignment {alignment}.")
    begin = data_begin + offset
    if begin + nbytes > file_size:
        raise CheckpointError(
            f"{where}: its shape {list(shape)} as {ggml_type.name} takes {nbytes} bytes at offset {begin}, "
            f"beyond the end of the file at {file_size}; the file is truncated."
        )
    return TensorEntry(name, shape, ggml_type.name.lower(), type_id, begin, nbytes)


def _check_layout(path: Path, tensors: tuple[TensorEntry, ...]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise CheckpointError(f"{path}: the tensor {tensor.name!r} appears twice.")
        names.add(tensor.name)
    in_order = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, tensor in itertools.pairwise(in_order):
        if before.offset + before.nbytes > tensor.offset:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r}: its data at offset {tensor.offset} overlap tensor "
                f"{before.name!r}."
            )


class _Cursor:
    """A position in the header that never leaves the file."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.position = 0
        self._data = data.data
        self._end = min(data.size, MAX_HEADER)
        self._limited = data.size > MAX_HEADER
        self._elements = 0

    def take(self, length: int, what: str) -> memoryview:
        """The next `length` bytes, which are (part of) `what`."""
        left = self._end - self.position
        if length > left:
            if self._limited:
                raise CheckpointError(
                    f"{self.path}: {what} lies beyond the {MAX_HEADER} bytes that a header may have."
                )
            raise CheckpointError(
                f"{self.path}: {what} needs {length} bytes at offset {self.position}, but only {left} are "
                "left; the file is truncated, or a length in its header is wrong."
            )
        begin = self.position
        self.position += length
        return self._data[begin : self.position]

    def number(self, size: int, what: str) -> int:
        """An unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def count(self, what: str, *, smallest: int, largest: int = MAX_ELEMENTS) -> int:
        """A count of at most `largest` things that take at least `smallest` bytes each."""
        count = self.number(8, what)
        left = self._end - self.position
        if count * smallest > left:
            raise CheckpointError(
                f"{self.path}: {what} is {count}, which would take at least {count * smallest} bytes, but "
                f"only {left} are left."
            )
        if count > largest:
            raise CheckpointError(f"{self.path}: {what} is {count}; at most {largest} are accepted.")
        return count

    def string(self, what: str, *, limit: int = MAX_STRING) -> str:
        """A string with its length in front."""
        length = self.number(8, f"the length of {what}")
        if length > limit:
            raise CheckpointError(
                f"{self.path}: the length of {what} is {length} bytes; at most {limit} are accepted."
            )
        return self._text(self.take(length, what), what)

    def value(self, key: str) -> Any:
        """A metadata value: its type, then itself."""
        what = f"the value of metadata key {key!r}"
        code = self.number(4, f"the type of metadata key {key!r}")
        if code == _STRING:
            return self.string(what)
        if code == _ARRAY:
            return self._array(what)
        return self._scalar(code, what)

    def tensor(self, number: int) -> _RawTensor:
        """An entry of the tensor table: name, shape with the outermost dimension first, type, offset."""
        name = self.string(f"the name of tensor {number}", limit=MAX_KEY)
        where = f"{self.path}: tensor {name!r}"
        if not name:
            raise CheckpointError(f"{self.path}: the name of tensor {number} is empty.")
        rank = self.number(4, f"the number of dimensions of tensor {name!r}")
        if not 1 <= rank <= MAX_DIMENSIONS:
            raise CheckpointError(
                f"{where}: it has {rank} dimensions, where 1 to {MAX_DIMENSIONS} are expected."
            )
        shape = tuple(self.number(8, f"the shape of tensor {name!r}") for _ in range(rank))[::-1]
        if 0 in shape or math.prod(shape) >= 2**63:
            raise CheckpointError(
                f"{where}: its shape {list(shape)} has no elements or more than a file can hold."
            )
        type_id = self.number(4, f"the type of tensor {name!r}")
        return name, shape, type_id, self.number(8, f"the offset of tensor {name!r}")

    def _scalar(self, code: int, what: str) -> int | float | bool:
        layout = _SCALARS.get(code)
        if layout is None:
            raise CheckpointError(f"{self.path}: {what} has the unknown type {code}.")
        (value,) = layout.unpack(self.take(layout.size, what))
        if code == _BOOL:
            if value > 1:
                raise CheckpointError(
                    f"{self.path}: {what} is a boolean of value {value}, where 0 or 1 is expected."
                )
            return bool(value)
        return float(str(np.float32(value))) if code == _FLOAT32 else value

    def _array(self, what: str) -> list[Any]:
        code = self.number(4, f"the element type of {what}")
        if code == _ARRAY:
            raise CheckpointError(f"{self.path}: {what} is an array of arrays, which is not supported.")
        if code != _STRING and code not in _SCALARS:
            raise CheckpointError(f"{self.path}: {what} is an array of elements of the unknown type {code}.")
        smallest = 8 if code == _STRING else _SCALARS[code].size
        count = self.count(f"the array length of {what}", smallest=smallest)
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise CheckpointError(
                f"{self.path}: with the {count} elements of {what} the metadata has more than {MAX_ELEMENTS}."
            )
        if code == _STRING:
            return self._strings(count, what)
        dtype = np.dtype(bool) if code == _BOOL else np.dtype(_SCALARS[code].format)
        values: list[Any] = np.frombuffer(self.take(count * smallest, what), dtype=dtype).tolist()
        return values

    def _strings(self, count: int, what: str) -> list[str]:
        # A vocabulary has hundreds of thousands of these, so this loop does by hand what `string` does.
        data, position, end = self._data, self.position, self._end
        unpack = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        try:
            for _ in range(count):
                if end - position < 8:
                    break
                (length,) = unpack(data, position)
                position += 8
                if length > end - position:
                    break
                strings.append(str(data[position : position + length], "utf-8"))
                position += length
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: element {len(strings)} of {what} is not UTF-8.") from None
        if len(strings) < count:
            raise CheckpointError(
                f"{self.path}: element {len(strings)} of {what} reaches beyond the end of the "
                f"{'header' if self._limited else 'file'} at {end}; the file is truncated, or a length is "
                "wrong."
            )
        self.position = position
        return strings

    def _text(self, data: memoryview, what: str) -> str:
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8.") from None
