"""One compiled model for the whole folder, and copies of it to damage."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from relax_llm.artifact.artifact import describe

from ..machines import PLAINER
from .checkpoints import LLAMA, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Damaged:
    """A copy of an artifact that a test may spoil."""

    path: Path

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the manifest's data in place."""
        manifest = self.path / "manifest.json"
        data = json.loads(manifest.read_text())
        change(data)
        manifest.write_text(json.dumps(data))

    def vouch(self, name: str) -> None:
        """Let the manifest say that a changed file is what it should be."""
        file = describe(self.path / name)
        self.edit(lambda data: data["files"].update({name: {"size": file.size, "digest": file.digest}}))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, without a tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write(directory, LLAMA, generation_config={"eos_token_id": 2})


@pytest.fixture(scope="session")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """It, compiled; not to be changed."""
    return rl.compile(checkpoint, output=tmp_path_factory.mktemp("artifact") / "tiny", target=PLAINER)


@pytest.fixture
def damaged(artifact: rl.Artifact, tmp_path: Path) -> Damaged:
    """A copy of the artifact."""
    return Damaged(shutil.copytree(artifact.path, tmp_path / "damaged"))
