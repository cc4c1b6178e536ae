"""What looks at every launch while a model runs: shadows, and a recording."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from relax_llm.artifact.artifact import Artifact
from relax_llm.errors import InputError, RecordingError
from relax_llm.runtime.control import Control
from relax_llm.runtime.recording.recorder import Recording, recorded
from relax_llm.runtime.shadow import Beside, Shadow, through
from relax_llm.runtime.stepper import Steps


class Observers:
    """What looks at the launches of a runner's calls. While there is any, every call is made launch by launch."""

    def __init__(self, artifact: Artifact, control: Control) -> None:
        """There are none.

        Args:
            artifact: What is run.
            control: Knows what is launched.
        """
        self._artifact, self._control = artifact, control
        self._shadows: tuple[Shadow, ...] = ()
        self._recording: Recording | None = None

    @property
    def active(self) -> bool:
        """Whether a call must go by here."""
        return self._recording is not None or bool(self._shadows)

    @contextmanager
    def shadow(self, site: str, beside: Beside, operator: str, bound: float | None) -> Iterator[Shadow]:
        """See `Runner.shadow`."""
        lines = self._control.lines.values()
        shadow = Shadow(site, beside, operator, bound, lines, self._artifact.manifest)
        self._shadows = (*self._shadows, shadow)
        try:
            yield shadow
        finally:
            self._shadows = tuple(other for other in self._shadows if other is not shadow)

    @contextmanager
    def recording(
        self, path: str | os.PathLike[str], *, site: str, kernel: str, operator: str, weights: str, limit: int
    ) -> Iterator[Recording]:
        """See `Runner.recording`."""
        if self._recording is not None:
            raise InputError(f"{self._recording.path} is being recorded; one recording is made at a time.")
        lines = self._control.lines.values()
        wanted = {"site": site, "kernel": kernel, "operator": operator}
        made = Recording(self._artifact, path, **wanted, weights=weights, limit=limit, lines=lines)
        self._recording = made
        try:
            yield made
        except BaseException:
            with suppress(RecordingError):
                made.finish(required=False)
            raise
        else:
            made.finish()
        finally:
            self._recording = None

    def call(self, steps: Steps) -> Any:
        """Make all launches of a call; the call's result.

        Raises:
            InputError: There are shadows and a recording at once.
        """
        if self._recording is None:
            return through(steps, self._shadows)
        if self._shadows:
            raise InputError("A shadow makes launches twice; record outside of runner.shadow.")
        return recorded(steps, self._recording)
