"""One small model, compiled once for this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import relax_llm as rl
from relax_llm import cpu

from ..artifact.checkpoints import LLAMA, write

if TYPE_CHECKING:
    from pathlib import Path


PLAIN = "x86-64" if cpu.architecture() == "x86_64" else None
"""The plainest machine that this one is: its kernels are quick to generate."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, so that caches can be mistaken for each other."""
    return write(tmp_path_factory.mktemp("aot") / "tiny", {**LLAMA, "num_hidden_layers": 2})


@pytest.fixture(scope="session")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """It, compiled; not to be changed."""
    return rl.compile(checkpoint, output=tmp_path_factory.mktemp("aot") / "artifact", target=PLAIN)
