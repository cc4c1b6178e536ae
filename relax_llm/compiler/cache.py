"""The cache of artifacts: one that is there is taken, two processes that want the same one make it once, and it ends.

Those used last are kept, up to a size; each version of this package, of TVM or of a kernel makes its own, and nobody
would remember to delete the others.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from relax_llm.artifact.artifact import Artifact, load
from relax_llm.errors import ArtifactError, CompileError
from relax_llm.places import bytes_in, cache_directory
from relax_llm.plan.kernel import Kernel

SIZE = "RELAX_LLM_CACHE_SIZE"
"""The environment variable for the size of the cache in GB; 0 keeps what is in use only."""

_DEFAULT_SIZE = 20.0
_LOCK = ".lock"
_IN_USE = 3600.0
"""Seconds for which what was used is left alone: a process may be about to load it."""


def place_of(key: str) -> Path:
    """Where an artifact is kept."""
    return cache_directory() / "artifacts" / key


def cached(place: Path, kernels: Sequence[Kernel]) -> Artifact | None:
    """The artifact at a place, which is then the one used last; what is broken there is removed."""
    if not place.is_dir():
        return None
    try:
        artifact = load(place, kernels=kernels)
    except ArtifactError:
        shutil.rmtree(place, ignore_errors=True)
        return None
    with suppress(OSError):  # somebody else's cache, or one that is mounted to be read
        os.utime(place)
    return artifact


def size() -> float:
    """Bytes that the cache may have.

    Raises:
        CompileError: What is asked for is no size.
    """
    told = os.environ.get(SIZE, "")
    try:
        gigabytes = float(told or _DEFAULT_SIZE)
    except ValueError:
        gigabytes = -1.0
    if not gigabytes >= 0:
        raise CompileError(f"{SIZE} is {told!r}; it is the size of the cache in GB, such as 20.")
    return gigabytes * 1e9


def trim(folder: Path, most: float, *, kept: Path | None = None, in_use: float = _IN_USE) -> None:
    """Remove what was used longest ago from a folder, until the rest has no more than `most` bytes.

    Args:
        folder: Of artifacts, which are directories, or of files; locks stay.
        most: Bytes, from `size`.
        kept: What stays, however large it is.
        in_use: Seconds for which what was used stays, too.
    """
    left = most - (bytes_in(kept) if kept else 0)
    used = []
    with suppress(OSError):
        for place in folder.iterdir():
            with suppress(OSError):  # another process is removing it
                if place != kept and place.suffix != _LOCK:
                    used.append((place.stat().st_mtime, place))
    now = time.time()
    for when, place in sorted(used, reverse=True):
        left -= bytes_in(place)
        if left < 0 and now - when > in_use:
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                with suppress(OSError):
                    place.unlink()


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold a lock, so that of two processes that want the same artifact one makes it and the other waits."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with place.with_name(place.name + _LOCK).open("w") as file:
            _flock()(file.fileno())
            yield
    except OSError as error:
        raise ArtifactError(
            f"The cache {place.parent} cannot be used ({error.strerror or error}); set XDG_CACHE_HOME or pass an "
            "output."
        ) from error


def _flock() -> Callable[[int], None]:
    try:
        import fcntl
    except ImportError:  # Windows: the rename at the end is atomic, so two processes only waste work
        return lambda _: None
    return lambda descriptor: fcntl.flock(descriptor, fcntl.LOCK_EX)
