"""A hub id: fetch the checkpoint's files into Hugging Face's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from relax_llm.errors import CheckpointError

__all__ = ["fetch_from_hub", "is_hub_id"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")

# Everything a checkpoint directory may consist of; never pickles, never code.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"]


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id: `name` or `owner/name`, and not that of a file."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(
        (".gguf", ".safetensors", ".json", ".bin")
    )


def fetch_from_hub(hub_id: str) -> Path:
    """Download the files of a hub repository, or find them in the local cache.

    Args:
        hub_id: `owner/name`.

    Returns:
        The directory that holds them.

    Raises:
        CheckpointError: There is no local path of this name, and huggingface_hub is not installed, the hub
            cannot be reached, or it has no such repository for this user.
    """
    absent = f"{hub_id}: there is no such file or directory"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{absent}, and to fetch it from the Hugging Face hub the extra is needed: pip install "
            "'relax-llm[hf]'."
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_PATTERNS))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise CheckpointError(
            f"{absent}, the Hugging Face hub cannot be reached, and the model is not in its local cache; "
            "connect to the network or give a local path."
        ) from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{hub_id}: the Hugging Face hub grants access to this model on request only; "
            "ask for it on the model's page and log in with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{absent}, and the Hugging Face hub has no model of this name for you."
        ) from None
    except Exception as error:
        # The package has used three HTTP libraries, each with its own exceptions for a broken connection.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{absent}, and fetching it from the Hugging Face hub failed: {reason}."
        ) from error
