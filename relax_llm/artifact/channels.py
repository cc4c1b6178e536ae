"""channels.safetensors: which matrices read channels of another size than the checkpoint's, and by how much."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]


def write(path: Path, factors: Mapping[str, Array]) -> None:
    """Write the file, where there is something to say.

    Args:
        path: The file.
        factors: By parameter, f32 [K]: its columns are so many times the checkpoint's, and what it reads is so much
            smaller.
    """
    if factors:
        save_file(dict(factors), path)


def read(path: Path) -> Mapping[str, Array]:
    """What `write` was given."""
    return load_file(path)
