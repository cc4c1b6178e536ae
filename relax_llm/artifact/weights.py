"""weights.safetensors: written one tensor at a time, and read as arrays over the memory that the file is."""

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from relax_llm.artifact.file_memory import file_memory
from relax_llm.artifact.manifest import Weight
from relax_llm.artifact.memory import ALIGNMENT, LARGE_PAGE, Array, aligned, dtype_of
from relax_llm.errors import ArtifactError

_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "uint16": "U16",
}


def write(file: BinaryIO, weights: Sequence[Weight], make: Callable[[Weight], Array]) -> None:
    """Write tensors in the safetensors format.

    Tensors of whole cache lines come first, so that all of those are aligned to `ALIGNMENT` in the file. Bytes are
    handed over by large pages of the file: Linux keeps a file in pieces as large as it was written in, and maps it so.

    Args:
        file: An empty file.
        weights: Names, shapes and types.
        make: Gives one tensor's values; called once for each, and one tensor is in memory at a time.
    """
    order = sorted(weights, key=lambda weight: weight.nbytes % ALIGNMENT != 0)
    header: dict[str, Any] = {}
    offset = 0
    for weight in order:
        end = offset + weight.nbytes
        header[weight.name] = {
            "dtype": _DTYPES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)

    def parts() -> Iterator[Array]:
        yield np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8)
        for weight in order:
            value = np.ascontiguousarray(make(weight), dtype_of(weight.dtype))
            if value.shape != weight.shape:
                raise ArtifactError(
                    f"Weight {weight.name!r} came out as {value.shape}, not as {weight.shape}."
                )
            yield value.reshape(-1).view(np.uint8)

    _write_by_pages(file, parts())


def _write_by_pages(file: BinaryIO, parts: Iterable[Array]) -> None:
    """Write arrays of bytes one after the other, a large page of the file at a time."""
    page, filled = np.empty(LARGE_PAGE, np.uint8), 0
    for part in parts:
        while len(part):
            count = min(len(part), len(page) - filled)
            page[filled : filled + count] = part[:count]
            part, filled = part[count:], filled + count
            if filled == len(page):
                file.write(page.data)
                filled = 0
    file.write(page[:filled].data)


def copy(source: Path, target: Path) -> None:
    """Copy a file, large page by large page."""
    with source.open("rb", buffering=0) as file, target.open("wb") as new:
        shutil.copyfileobj(file, new, LARGE_PAGE)


def read(path: Path, weights: Sequence[Weight], *, mapped: bool | None = None) -> list[Array]:
    """Bring tensors into memory: by mapping the file, or by copying it into pages of 2 MB.

    The few tensors that cannot lie at an aligned address are copied in any case.

    Args:
        path: The file.
        weights: What to read.
        mapped: Whether to map the file; see `file_memory`.

    Returns:
        The tensors in the order asked for.

    Raises:
        ArtifactError: The file does not hold them.
    """
    try:
        with path.open("rb") as file:
            memory = file_memory(file, mapped=mapped)
        (length,) = struct.unpack("<Q", memory[:8].tobytes())
        header: Mapping[str, Any] = json.loads(memory[8 : 8 + length].tobytes())
        return [_view(memory, 8 + length, header[weight.name], weight) for weight in weights]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ArtifactError(
            f"{path}: the weights cannot be read ({error}); compile the artifact again."
        ) from error


def _view(memory: Array, base: int, entry: Mapping[str, Any], weight: Weight) -> Array:
    begin, end = entry["data_offsets"]
    if (
        tuple(entry["shape"]) != weight.shape
        or entry["dtype"] != _DTYPES[weight.dtype]
        or begin < 0
        or end - begin != weight.nbytes
    ):
        raise ValueError(f"tensor {weight.name!r} differs from the manifest")
    array = memory[base + begin : base + end]
    if len(array) != end - begin:
        raise ValueError("the file is too short")
    if array.ctypes.data % ALIGNMENT:
        copy = aligned(weight.shape, weight.dtype)
        copy.reshape(-1).view(np.uint8)[:] = array
        return copy
    return array.view(dtype_of(weight.dtype)).reshape(weight.shape)
