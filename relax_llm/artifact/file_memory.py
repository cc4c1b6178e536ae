"""A file as memory: mapped where that is read as fast as memory in large pages, and else copied into such."""

import math
import mmap
import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from relax_llm import cpu
from relax_llm.artifact.memory import LARGE_PAGE, Array, large_pages, want_large_pages

_PIECE = 2**23  # bytes that one thread reads at a time
_READERS = 4  # threads at most; a few of them copy as fast as memory allows
_LOOKED_AT = 256  # pages of a mapped file, at most
_ENOUGH = 0.95  # of these: mapped so, a file is read as fast as memory in large pages


def file_memory(file: BinaryIO, *, mapped: bool | None = None) -> Array:
    """All bytes of a file: uint8 [size], writable, by changes that the file does not see.

    A map's pages are read when first used, and shared between processes. But where they are of 4 KB, looking up their
    addresses costs a core that streams through them up to half of the speed of memory. Linux keeps files in larger
    pieces from 6.16 on, if it had some when the file was written or read; so some pages are looked at.

    Args:
        file: A file.
        mapped: Whether to map it; by default where that is no slower.

    Raises:
        OSError, ValueError: It cannot be read, or is empty.
    """
    if not (_maps_large_pages() if mapped is None else mapped):
        return _copy(file)
    memory = _map(file)
    # A copy of what fills half of the machine might not fit beside what the system keeps of the file.
    if mapped is None and len(memory) < _physical_memory() / 2 and _share_of_large_pages(memory) < _ENOUGH:
        return _copy(file)
    return memory


def _maps_large_pages() -> bool:
    """Whether the system maps a file in large pages at all."""
    if sys.platform != "linux":
        return True  # pages of 16 KB, or nothing is known
    major, minor = (int(part) for part in re.findall(r"\d+", platform.release())[:2])
    return (major, minor) >= (6, 16)


def _physical_memory() -> float:
    """Bytes; without end where that is not known."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _share_of_large_pages(mapped: Array) -> float:
    """How much of a mapped file lies in pages of 2 MB, by some that are used for this; 1 where nobody says so."""
    if sys.platform != "linux":
        return 1.0
    begin = mapped.ctypes.data
    pages = range(-begin % LARGE_PAGE, len(mapped) - LARGE_PAGE + 1, LARGE_PAGE)
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
            return int(rest.split()[0]) * 1024 / LARGE_PAGE
    return None


def _map(file: BinaryIO) -> Array:
    """The file, mapped copy-on-write: DLPack hands over only writable memory."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    want_large_pages(mapped)
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
