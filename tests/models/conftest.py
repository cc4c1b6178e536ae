"""The bench: one checkpoint, one reference and one compiled model for each row of the table, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import transformers

from ..machines import PLAINER
from .reference import Reference, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    import relax_llm as rl

    from .configurations import Configuration


ON_THIS_MACHINE = {
    "gpt2-three-heads-inner",
    "head-dim-6-all-biases-tied",
    "smollm2-like",
    "window-5",
}
"""Rows compiled for this processor with all it can do; each takes as long as four others.

Both families, every epilogue and a window are in them; each activation has its own tests on every machine.
What the other rows add is in the graph or in reading the checkpoint, so they are compiled for `PLAINER`.
"""


class Bench:
    """Makes what a test asks for on first use and keeps it for the session, failures included."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made: dict[tuple[str, str], Any] = {}

    def checkpoint(self, configuration: Configuration) -> Path:
        """Return the directory of the row's checkpoint."""
        path: Path = self._once(
            "checkpoint",
            configuration,
            lambda: write_checkpoint(configuration, self.directory / configuration.name),
        )
        return path

    def reference(self, configuration: Configuration) -> Reference:
        """Return the row's reference, which remembers what it has computed."""
        reference: Reference = self._once(
            "reference", configuration, lambda: Reference.load(self.checkpoint(configuration))
        )
        return reference

    def runner(self, configuration: Configuration) -> rl.Runner:
        """Return a runner of the row's checkpoint, compiled with float32 weights; see `ON_THIS_MACHINE`."""
        import relax_llm as rl

        runner: rl.Runner = self._once(
            "runner",
            configuration,
            lambda: rl.Runner(
                rl.compile(
                    self.checkpoint(configuration),
                    weights="f32",
                    target=None if configuration.name in ON_THIS_MACHINE else PLAINER,
                )
            ),
        )
        return runner

    def _once(self, kind: str, configuration: Configuration, make: Any) -> Any:
        key = (kind, configuration.name)
        if key not in self._made:
            try:
                self._made[key] = make()
            except Exception as error:
                self._made[key] = error
        if isinstance(self._made[key], Exception):
            raise self._made[key]
        return self._made[key]


@pytest.fixture(scope="session", autouse=True)
def _quiet_reference(torch_threads: None) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Give the session's bench."""
    return Bench(tmp_path_factory.mktemp("checkpoints"))
