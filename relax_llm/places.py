"""Where this package keeps what it makes."""

import os
from contextlib import suppress
from pathlib import Path


def cache_directory() -> Path:
    """The user's cache: `relax_llm` under XDG_CACHE_HOME, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "relax_llm"


def bytes_in(place: Path) -> int:
    """The size of a file, or of all under a directory; of those that another process removes meanwhile, none."""
    total = 0
    with suppress(OSError):
        if not place.is_dir():
            return place.lstat().st_size
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(OSError):
                total += Path(folder, name).lstat().st_size
    return total
