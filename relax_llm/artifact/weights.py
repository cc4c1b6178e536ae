"""weights.safetensors: written one tensor at a time, read as a memory map."""

import json
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from relax_llm.artifact.manifest import Weight
from relax_llm.errors import ArtifactError

Array = npt.NDArray[Any]

ALIGNMENT = 64
"""Bytes; what the compiled kernels may assume of every tensor's address."""

_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "uint16": "U16",
}


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's type of this name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def write(file: BinaryIO, weights: Sequence[Weight], make: Callable[[Weight], Array]) -> None:
    """Write tensors in the safetensors format.

    Tensors of whole cache lines come first, so that all of those are aligned to `ALIGNMENT` in the file.

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
    file.write(struct.pack("<Q", len(text)) + text)
    for weight in order:
        value = np.ascontiguousarray(make(weight), dtype_of(weight.dtype))
        if value.shape != weight.shape:
            raise ArtifactError(f"Weight {weight.name!r} came out as {value.shape}, not as {weight.shape}.")
        file.write(value.reshape(-1).view(np.uint8).data)


def read(path: Path, weights: Sequence[Weight]) -> list[Array]:
    """Map tensors into memory; pages are read when first used, and shared between processes.

    The map is copy-on-write, because DLPack hands over only writable memory. The few tensors that cannot lie at an
    aligned address are copied.

    Args:
        path: The file.
        weights: What to read.

    Returns:
        The tensors in the order asked for.

    Raises:
        ArtifactError: The file does not hold them.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack("<Q", mapped[:8])
        header: Mapping[str, Any] = json.loads(mapped[8 : 8 + length])
        found = [_view(mapped, 8 + length, header[weight.name], weight) for weight in weights]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ArtifactError(
            f"{path}: the weights cannot be read ({error}); compile the artifact again."
        ) from error
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_WILLNEED)
    return found


def aligned(shape: Sequence[int], dtype: str = "float32") -> Array:
    """New zeroed memory at an aligned address; the operating system provides pages when they are first written."""
    kind = dtype_of(dtype)
    count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    memory = np.zeros(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count].view(kind).reshape(shape)


def _view(mapped: mmap.mmap, base: int, entry: Mapping[str, Any], weight: Weight) -> Array:
    begin, end = entry["data_offsets"]
    if (
        tuple(entry["shape"]) != weight.shape
        or entry["dtype"] != _DTYPES[weight.dtype]
        or begin < 0
        or end - begin != weight.nbytes
    ):
        raise ValueError(f"tensor {weight.name!r} differs from the manifest")
    array = np.frombuffer(mapped, np.uint8, end - begin, base + begin)
    if array.ctypes.data % ALIGNMENT:
        copy = aligned(weight.shape, weight.dtype)
        copy.reshape(-1).view(np.uint8)[:] = array
        return copy
    return array.view(dtype_of(weight.dtype)).reshape(weight.shape)
