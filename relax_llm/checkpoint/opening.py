"""One door for every kind of checkpoint: a directory, a GGUF file, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from relax_llm.checkpoint.files import file_size, is_file
from relax_llm.checkpoint.gguf_file import is_later_split, open_gguf
from relax_llm.checkpoint.hub import fetch_from_hub, is_hub_id
from relax_llm.checkpoint.huggingface import open_huggingface
from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from relax_llm.checkpoint.checkpoint import Checkpoint

__all__ = ["open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint; of its tensors only names, shapes and positions are read.

    Args:
        path: A Hugging Face directory, a GGUF file, a directory that holds one GGUF file, or a hub id.

    Raises:
        CheckpointError: It is none of these, or it is missing, malformed, contradictory or not supported. The
            message names the file and the field.
    """
    name = os.fspath(path)
    if not name or "\0" in name:
        raise CheckpointError(
            f"{name!r}: this is not a path; give a checkpoint directory, a GGUF file or a hub id."
        )
    local = Path(name).expanduser()
    try:
        if local.is_dir():
            return _open_directory(local)
        if os.path.lexists(local):
            return _open_file(local)
    except OSError as error:
        raise CheckpointError(f"{local}: the checkpoint cannot be read: {error.strerror or error}.") from None
    if isinstance(path, str) and is_hub_id(path):
        return _open_directory(fetch_from_hub(path))
    raise CheckpointError(f"{local}: there is no such file or directory; check the path.")


def _open_directory(directory: Path) -> Checkpoint:
    if is_file(directory / "config.json"):
        return open_huggingface(directory)
    ggufs = [found for found in sorted(directory.glob("*.gguf")) if not is_later_split(found)]
    if len(ggufs) == 1:
        return open_gguf(ggufs[0])
    if ggufs:
        names = ", ".join(found.name for found in ggufs[:5])
        raise CheckpointError(
            f"{directory}: config.json is missing and there are {len(ggufs)} GGUF files ({names}); name one "
            "of them."
        )
    return open_huggingface(directory)


def _open_file(path: Path) -> Checkpoint:
    size = file_size(path)
    with path.open("rb") as file:
        head = file.read(8)
    if path.suffix == ".gguf" or head[:4] == b"GGUF":
        return open_gguf(path)
    if path.suffix in (".safetensors", ".json"):
        raise CheckpointError(f"{path}: this is one file of a checkpoint; give its directory, {path.parent}.")
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise CheckpointError(
            f"{path}: this is a pickle or zip file; pickle can run any code when it is read and is refused "
            "by policy. Use a safetensors or GGUF version of the model."
        )
    raise CheckpointError(
        f"{path}: this file of {size} bytes is neither a GGUF file nor a checkpoint directory; "
        "give a directory with config.json and safetensors files, or a GGUF file."
    )
