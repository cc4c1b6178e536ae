"""The benchmark of whole models: its bound is the model's arithmetic, and it prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from benchmarks.limits import Limits, LimitsProgram
from benchmarks.llm import least_seconds
from benchmarks.turns import Case

if TYPE_CHECKING:
    from relax_llm.artifact.manifest import Manifest

pytestmark = pytest.mark.model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def manifest(smollm2_path: Path) -> Manifest:
    return rl.compile(smollm2_path).manifest


def test_the_least_time_of_a_prompt_is_that_of_its_multiplications(manifest: Manifest) -> None:
    """Layers see every token and the head one; norms and attention add little to 1024 tokens."""
    layers = 30 * (576 * 960 + 576 * 576 + 3 * 576 * 1536)
    flops = 2 * (1024 * layers + 576 * 49152)
    attention = 30 * 4 * 576 * 1024 * 1025 / 2
    seconds = least_seconds(manifest, Case("prefill", 1024), Limits(flops=1.0, bytes=float("inf")))
    assert flops + attention < seconds < 1.01 * (flops + attention)


def test_the_least_time_of_a_token_is_that_of_its_weights(manifest: Manifest) -> None:
    parameters = 134_515_008
    cache = 30 * 2 * 192 * 33
    seconds = least_seconds(manifest, Case("decode", 32), Limits(flops=float("inf"), bytes=1.0))
    assert 4 * (parameters + cache) < seconds < 4.08 * (parameters + cache)


def test_limits_are_those_of_a_computer() -> None:
    with LimitsProgram(threads=1) as program:
        found = program.measure()
    assert 1e9 < found.flops < 1e12
    assert 1e8 < found.bytes < 1e12


@pytest.mark.slow
def test_it_runs(smollm2_path: Path) -> None:
    asked = ["--cases", "prefill:16", "decode:32", "--rounds", "1", "--json"]
    command = [sys.executable, "-m", "benchmarks.llm", str(smollm2_path), *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    assert [row["case"] for row in report["rows"]] == ["prefill 16", "decode after 32"]
    for row in report["rows"]:
        assert len(row["rates"]) == 2
        assert all(rate > 0 for rate in row["rates"].values())
        assert 0 < row["of_limit"] < 2
