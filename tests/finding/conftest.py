"""Tiny models, compiled once for a plainer machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from tests.artifact.checkpoints import gpt2_shapes, llama_shapes, tensors_for, write
from tests.finding.planting import FAMILIES, KERNELS, LLAMA_DEEP
from tests.machines import PLAINER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """A model whose library has kernels that are right, and one that is wrong at a size the door does not try."""
    checkpoint = write(tmp_path_factory.mktemp("planted") / "checkpoint", LLAMA_DEEP)
    return rl.compile(checkpoint, kernels=KERNELS, target=PLAINER)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    directory = tmp_path_factory.mktemp("families")
    return {
        name: write(directory / name, config, tensors_for(shapes_of(config), 0))
        for name, config in FAMILIES.items()
    }


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of one of the families."""
    return gpt2_shapes(config) if config["model_type"] == "gpt2" else llama_shapes(config)


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, families: dict[str, Path]) -> tuple[Path, rl.Artifact]:
    """A checkpoint and its artifact."""
    checkpoint = families[request.param]
    return checkpoint, rl.compile(checkpoint, target=PLAINER)
