"""channels.safetensors: which matrices read channels of another size than the checkpoint's, and by how much."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]

CHANNELS = "channels.safetensors"


def write(directory: Path, exponents: Mapping[str, Array]) -> None:
    """Write the file, where there is something to say.

    Args:
        directory: The artifact's.
        exponents: By parameter, int8 [K]: what the matrix reads is divided by 2**exponents, and so are its columns
            larger.
    """
    if exponents:
        save_file(dict(exponents), directory / CHANNELS)


def read(directory: Path) -> Mapping[str, Array]:
    """What `write` was given."""
    return load_file(directory / CHANNELS)
