"""What runs is compiled for a plainer machine, and so in less time; the models that are stepped through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from tests.artifact.checkpoints import GPT2, LLAMA, write
from tests.runtime.dispatching import make

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module", autouse=True)
def on_a_plainer_machine(plainer_machine: None) -> None:
    """For every test of this folder."""


def roomy(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with a context for long prompts."""
    return {**config, "n_positions" if config["model_type"] == "gpt2" else "max_position_embeddings": 400}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of a tiny model of each family."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / name, roomy(config)) for name, config in (("llama", LLAMA), ("gpt2", GPT2))}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(models: dict[str, Path], request: pytest.FixtureRequest, plainer_machine: None) -> rl.Runner:
    """A tiny model of each family; the cache has it after the first time."""
    return rl.Runner(rl.compile(models[request.param]))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """The model made by hand: prefill is lookup, gate, down, attention, copy."""
    return make(tmp_path_factory.mktemp("model") / "artifact")


@pytest.fixture
def runner(artifact: rl.Artifact) -> rl.Runner:
    """Of it, new."""
    return rl.Runner(artifact)
