"""Engines for tests of taking turns: each is a module's name and what it does."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.models import Forms
    from benchmarks.peers.engine import Answer, Stamps

NAME = "Fake"
PACKAGE = "numpy"
VARIANTS: dict[str, tuple[str, ...]] = {"f32": ("counts",), "q4": ()}

TOKEN = 0.02
"""Seconds of a token."""


def prepare(forms: Forms, variant: str) -> Path:
    if variant == "unprepared":
        raise ValueError("no such model\nand more about it")
    return forms.made("fake", lambda path: path.write_text(variant))


def load(path: Path, variant: str, threads: int) -> Answer:
    print("loaded", path.read_text(), threads, os.environ["OMP_NUM_THREADS"])

    def answer(token_ids: Sequence[int], count: int) -> Stamps:
        if variant == "dies":
            os._exit(7)
        if variant == "sleeps":
            time.sleep(60)
        time.sleep(TOKEN * len(token_ids))
        stamps = []
        for index in range(count - (variant == "short")):
            time.sleep(TOKEN)
            stamps.append((token_ids[-1] + index, time.perf_counter()))
        return stamps

    return answer
