"""Measurements that outlast a process: what was measured once, on this machine, of this code, is not measured again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relax_llm.places import cache_directory

_VERSION = 1
"""Raised when what is measured changes; older measurements are then not found."""


class Store:
    """The samples of one contest, in a file of lines, one for each point: whole or not at all.

    Samples of rivals are kept together, because they were taken together; a point is found when all rivals asked for
    were in it.
    """

    def __init__(self, path: Path | None) -> None:
        """Open.

        Args:
            path: The file, which need not exist; None to keep nothing.
        """
        self._path = path
        self._points: dict[str, dict[str, list[float]]] = {}
        if path is not None:
            self._points = _read(path)

    def find(self, point: str, rivals: Mapping[str, str]) -> dict[str, list[float]] | None:
        """The samples at a point, if every rival was measured there.

        Args:
            point: Which sizes, and how.
            rivals: Names of kernels, and digests of their code.
        """
        found = self._points.get(point, {})
        if not all(digest in found for digest in rivals.values()):
            return None
        return {name: found[digest] for name, digest in rivals.items()}

    def keep(self, point: str, rivals: Mapping[str, str], samples: Mapping[str, Sequence[float]]) -> None:
        """Add the samples of a point, in place of earlier ones. A cache that cannot be written costs time only."""
        found = {rivals[name]: list(taken) for name, taken in samples.items()}
        self._points[point] = found
        if self._path is None:
            return
        # It begins with a line's end as well: an interrupt may have left a line without one.
        line = "\n" + json.dumps({"point": point, "samples": found}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            self._path = None


def store_path(machine: Mapping[str, Any], contest: str) -> Path:
    """Where the measurements of a contest on a machine are kept."""
    key = json.dumps([_VERSION, dict(machine), contest], sort_keys=True, default=str)
    return cache_directory() / "tuning" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.jsonl"


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    points: dict[str, dict[str, list[float]]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return points
    for line in lines:
        try:
            data = json.loads(line)
            points[data["point"]] = {
                digest: [float(sample) for sample in samples] for digest, samples in data["samples"].items()
            }
        except (ValueError, TypeError, KeyError, AttributeError):  # a line that an interrupt cut short
            continue
    return points
