"""A model of two layers, compiled for a plainer machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import relax_llm as rl
from tests.artifact.checkpoints import LLAMA, write

if TYPE_CHECKING:
    from pathlib import Path

    from relax_llm.tracing.trace import Trace


@pytest.fixture(scope="module", autouse=True)
def on_a_plainer_machine(plainer_machine: None) -> None:
    """For every test of this folder."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, so that there is something to fold."""
    return write(tmp_path_factory.mktemp("graph") / "two", {**LLAMA, "num_hidden_layers": 2})


@pytest.fixture(scope="module")
def runner(checkpoint: Path, plainer_machine: None) -> rl.Runner:
    """It, running; the cache has it after the first time."""
    return rl.Runner(rl.compile(checkpoint))


@pytest.fixture(scope="module")
def trace(runner: rl.Runner) -> Trace:
    """A prefill and three decodes of it."""
    from relax_llm.tracing.limits import Limits

    with runner.tracing(Limits(1e11, 1e10)) as traced:
        state = runner.start()
        runner.prefill(state, [1, 2, 3])
        for token in (4, 5, 6):
            runner.decode(state, token)
    return traced
