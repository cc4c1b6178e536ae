"""Touching the file system with care: regular files only, bounded reads, mappings, fingerprints."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING, Any

import numpy as np

from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["Fingerprint", "file_size", "is_file", "map_file", "read_bytes"]

HASHED_WHOLE = 1 << 20
"""Files up to this many bytes enter a fingerprint whole, larger ones by size and time alone."""


def is_file(path: Path) -> bool:
    """Whether something that is not a directory has this name (it may still not be a regular file)."""
    return os.path.lexists(path) and not path.is_dir()


def _stat(path: Path) -> os.stat_result:
    """Stat a regular file; anything else (a pipe, a device) could block a reader for ever."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; check the path.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the file cannot be examined: {_reason(error)}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: this is not a regular file, so it is not read.")
    return status


def file_size(path: Path) -> int:
    """Size in bytes of a regular file.

    Raises:
        CheckpointError: It is missing, not a regular file, or cannot be examined.
    """
    return _stat(path).st_size


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: It is missing, not a regular file, longer than `limit`, or cannot be read.
    """
    size = file_size(path)
    if size > limit:
        raise CheckpointError(
            f"{path}: the file has {size} bytes; at most {limit} are expected of such a file."
        )
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: the file cannot be read: {_reason(error)}.") from None


def map_file(path: Path) -> NDArray[np.uint8]:
    """Map a whole regular file, read-only.

    Returns:
        uint8 [file size]; views of it keep the mapping alive.

    Raises:
        CheckpointError: It is missing, empty, not a regular file, or cannot be mapped.
    """
    if file_size(path) == 0:
        raise CheckpointError(f"{path}: the file is empty; fetch it again.")
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the file cannot be mapped into memory: {_reason(error)}.") from None
    return mapped.view(np.ndarray)


def _reason(error: BaseException) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


class Fingerprint:
    """Collects what identifies a set of files without reading gigabytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, *parts: Any) -> None:
        """Add values whose `repr` identifies them."""
        for part in parts:
            data = part if isinstance(part, (bytes, memoryview)) else repr(part).encode()
            self._hash.update(len(data).to_bytes(8, "little"))
            self._hash.update(data)

    def add_file(self, path: Path) -> None:
        """Add a file's name, size and modification time, and its content when it is small."""
        status = _stat(path)
        self.add(path.name, status.st_size, status.st_mtime_ns)
        if status.st_size <= HASHED_WHOLE:
            self.add(read_bytes(path, HASHED_WHOLE))

    def add_files(self, paths: Iterable[Path]) -> None:
        """Add each file that exists."""
        for path in paths:
            if is_file(path):
                self.add_file(path)

    def hexdigest(self) -> str:
        """The fingerprint of everything added so far."""
        return self._hash.hexdigest()
