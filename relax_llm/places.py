"""Where this package keeps what it makes."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """The user's cache: `relax_llm` under XDG_CACHE_HOME, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "relax_llm"
