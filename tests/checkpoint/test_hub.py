"""Hub ids: fetched where that is possible, one sentence where it is not."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from relax_llm.checkpoint import open_checkpoint
from relax_llm.errors import CheckpointError

from .files import write_directory

if TYPE_CHECKING:
    from pathlib import Path

RESPONSE: Any = SimpleNamespace(headers={}, request=None)


def answer(monkeypatch: pytest.MonkeyPatch, result: Path | Exception) -> list[dict[str, Any]]:
    """Let the hub answer with a directory or an error; returns the calls that are made."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_is_fetched_and_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = answer(monkeypatch, write_directory(tmp_path))
    checkpoint = open_checkpoint("owner/name-1.1B_chat")
    assert checkpoint.path == tmp_path
    (call,) = calls
    assert call["repo_id"] == "owner/name-1.1B_chat"
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in call["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("no route"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "no model of this name"),
        (errors.GatedRepoError("403", response=RESPONSE), "on request only"),
        (errors.HfHubHTTPError("500 Server Error\nmore", response=RESPONSE), "500 Server Error"),
        (OSError("disk full"), "disk full"),
        (RuntimeError("of some HTTP library"), "of some HTTP library"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses_is_one_sentence(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, error)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("owner/name")
    assert words in str(caught.value)
    assert str(caught.value).startswith("owner/name: ")
    assert "\n" not in str(caught.value)


def test_without_the_extra_the_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'relax-llm\[hf\]'"):
        open_checkpoint("owner/name")


@pytest.mark.parametrize(
    "name",
    ["/owner/name", "./name", "../name", "a/b/c", "name.gguf", "owner/model.safetensors", "~/name", "a b"],
)
def test_what_is_no_hub_id_is_a_missing_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answer(monkeypatch, RuntimeError("the hub was asked"))
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(name)
    assert calls == []


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_what_is_no_path_is_said_so(name: str) -> None:
    with pytest.raises(CheckpointError, match="not a path"):
        open_checkpoint(name)
