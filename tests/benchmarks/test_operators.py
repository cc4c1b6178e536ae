"""The benchmark of all operators measures what the records say, and reports it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_every_problem_of_an_operator() -> None:
    command = [sys.executable, "-m", "benchmarks.operators", "--operators", "last_token", "positions"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["problem"] for row in rows} == {"last_token_hidden576", "last_token_hidden64_h9", "positions"}
    assert {row["sizes"]["seq"] for row in rows} == {1, 64, 512}
    for row in rows:
        assert row["seconds"] > 0
        assert row["bytes"] > 0
