"""weights.safetensors: written one tensor at a time, read into large pages of memory or mapped."""

import json
import math
import mmap
import os
import platform
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from relax_llm import cpu
from relax_llm.artifact.manifest import Weight
from relax_llm.errors import ArtifactError

Array = npt.NDArray[Any]

ALIGNMENT = 64
"""Bytes; what the compiled kernels may assume of every tensor's address."""

_LARGE_PAGE = 2**21  # bytes
_PIECE = 2**23  # bytes that one thread reads at a time
_LOOKED_AT = 32  # pages of a mapped file
_ENOUGH = 0.75  # of these: mapped so, a file is read as fast as memory in large pages
_READERS = 4  # threads at most; a few of them copy as fast as memory allows

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
    page, filled = np.empty(_LARGE_PAGE, np.uint8), 0
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
        shutil.copyfileobj(file, new, _LARGE_PAGE)


def read(path: Path, weights: Sequence[Weight], *, mapped: bool | None = None) -> list[Array]:
    """Bring tensors into memory: by mapping the file, or by copying it into pages of 2 MB.

    A map's pages are read when first used, and shared between processes. But where they are of 4 KB, looking up their
    addresses costs a core that streams through the weights up to half of the speed of memory. Linux keeps files in
    larger pieces from 6.16 on, if it had some when the file was written or read; so some pages are looked at.

    The map is copy-on-write, because DLPack hands over only writable memory. The few tensors that cannot lie at an
    aligned address are copied in any case.

    Args:
        path: The file.
        weights: What to read.
        mapped: Whether to map the file; by default where that is no slower.

    Returns:
        The tensors in the order asked for.

    Raises:
        ArtifactError: The file does not hold them.
    """
    try:
        with path.open("rb") as file:
            memory = _memory(file, mapped)
        (length,) = struct.unpack("<Q", memory[:8].tobytes())
        header: Mapping[str, Any] = json.loads(memory[8 : 8 + length].tobytes())
        return [_view(memory, 8 + length, header[weight.name], weight) for weight in weights]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ArtifactError(
            f"{path}: the weights cannot be read ({error}); compile the artifact again."
        ) from error


def aligned(shape: Sequence[int], dtype: str = "float32") -> Array:
    """New zeroed memory at an aligned address; the operating system provides pages when they are first written."""
    kind = dtype_of(dtype)
    count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if count >= _LARGE_PAGE:
        return large_pages(count).view(kind).reshape(shape)
    memory = np.zeros(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count].view(kind).reshape(shape)


def large_pages(count: int) -> Array:
    """New zeroed memory: uint8 [count], in pages of 2 MB where the system has some."""
    memory = mmap.mmap(-1, count + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _want_large_pages(memory)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % _LARGE_PAGE
    return array[start : start + count]


def _want_large_pages(memory: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)


def _maps_large_pages() -> bool:
    if sys.platform != "linux":
        return True  # pages of 16 KB, or nothing is known
    major, minor = (int(part) for part in re.findall(r"\d+", platform.release())[:2])
    return (major, minor) >= (6, 16)


def _memory(file: BinaryIO, mapped: bool | None) -> Array:
    if not (mapped or (mapped is None and _maps_large_pages())):
        return _copy(file)
    memory = _map(file)
    size = len(memory)
    if mapped is None and size < _physical_memory() / 2 and _share_of_large_pages(memory) < _ENOUGH:
        return _copy(file)
    return memory


def _physical_memory() -> float:
    """Bytes; without end where that is not known."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _share_of_large_pages(mapped: Array) -> float:
    """How much of a mapped file lies in pages of 2 MB, by some that are used for this; 1 where nobody says so."""
    begin = mapped.ctypes.data
    pages = range(-begin % _LARGE_PAGE, len(mapped) - _LARGE_PAGE + 1, _LARGE_PAGE)
    used = pages[:: -(-len(pages) // _LOOKED_AT)] if pages else pages
    for start in used:
        mapped[start]  # the system finds the page now
    try:
        large = _large_pages_at(begin)
    except (OSError, ValueError):
        return 1.0
    return large / len(used) if used and large is not None else 1.0


def _large_pages_at(address: int) -> float | None:
    """The pages of 2 MB by which a file is mapped at an address; None where the system does not say so.

    Raises:
        OSError, ValueError: The system says it otherwise, or not at all.
    """
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            first, _, last = name.partition("-")
            inside = int(first, 16) <= address < int(last, 16)
        elif inside and name == "FilePmdMapped:":
            return int(rest.split()[0]) * 1024 / _LARGE_PAGE
    return None


def _map(file: BinaryIO) -> Array:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _want_large_pages(mapped)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(mapped, np.uint8)


def _copy(file: BinaryIO) -> Array:
    size = os.fstat(file.fileno()).st_size
    memory = large_pages(size)

    def piece(start: int) -> None:
        end = min(start + _PIECE, size)
        while start < end:
            count = os.preadv(file.fileno(), [memory[start:end].data], start)
            if not count:
                raise OSError("it became shorter while it was read")
            start += count

    with ThreadPoolExecutor(min(cpu.cores(), _READERS)) as pool:
        list(pool.map(piece, range(0, size, _PIECE)))
    return memory


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
