"""Repros: one launch in a directory, made again by a process that cannot import this package."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl
from relax_llm.errors import RecordingError
from relax_llm.runtime.recording.replay import Replay
from tests.artifact.checkpoints import LLAMA, write
from tests.recording.conftest import DOWN, IDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ALONE = """
import runpy, sys
for name in ("relax_llm", "torch"):
    sys.modules[name] = None
for script in sys.argv[1:]:
    sys.modules.pop("kernel", None)
    runpy.run_path(script)
"""


def _run(*scripts: Path) -> str:
    command = [sys.executable, "-I", "-c", ALONE, *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_launches_are_made_again_without_this_package(
    recorded: Callable[..., Replay], tmp_path: Path
) -> None:
    """Micro-kernels behind a dispatcher, caches that grow, and C with a header."""
    replayed = recorded(site="layers.*")
    chosen = {
        "matmul": next(launch for launch in replayed if launch.kernel == "tiled"),
        "append": next(launch for launch in replayed if launch.operator == "append"),
        "c": replayed.at(DOWN)[0],
    }
    scripts = [launch.repro(tmp_path / name) for name, launch in chosen.items()]
    printed = _run(*scripts).splitlines()
    equal = [line for line in printed if line.endswith(": equal bit for bit")]
    assert [line.partition(":")[0] for line in equal] == [
        *["expected_out", "expected_k_cache", "expected_v_cache", "expected_q", "expected_out"]
    ]
    assert sum(line.endswith("us, the median of 50 launches") for line in printed) == 3
    assert len(printed) == 8
    for script in scripts:
        assert "relax_llm" not in script.read_text().replace("relax_llm.", "")
        assert len(script.read_text().splitlines()) < 70
    assert {"few_rows.c", "sizes.h"} <= {file.name for file in scripts[2].parent.iterdir()}
    assert "any_rows" not in (scripts[2].parent / "kernel.py").read_text().replace("any_rows_few_rows", "")


def test_a_difference_is_said(recorded: Callable[..., Replay], tmp_path: Path) -> None:
    script = recorded(site="norm")[0].repro(tmp_path / "norm")
    expected = np.load(tmp_path / "norm" / "expected_out.npy")
    np.save(tmp_path / "norm" / "expected_out.npy", expected + np.float32(0.5))
    assert "expected_out: off by at most 0.5" in _run(script)


def test_a_repro_takes_the_place_of_a_repro_only(recorded: Callable[..., Replay], tmp_path: Path) -> None:
    launch = recorded(site="norm")[0]
    launch.repro(tmp_path / "norm")
    (tmp_path / "norm" / "more.txt").write_text("x")
    assert launch.repro(tmp_path / "norm") == tmp_path / "norm" / "repro.py"
    assert not (tmp_path / "norm" / "more.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for place in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(RecordingError, match="no repro; choose"):
            launch.repro(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "norm"]


def test_a_kernel_in_python_is_refused(tmp_path: Path, plainer_machine: None) -> None:
    @rl.kernel("norm", form="python")
    def in_python(problem: Any, x: Any, weight: Any, out: Any) -> None:
        scale = np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + problem.eps)
        out[...] = x / scale * weight

    runner = rl.Runner(rl.compile(write(tmp_path / "checkpoint", LLAMA), kernels=[in_python]))
    with runner.recording(tmp_path / "x.rec", site="norm"):
        runner.prefill(runner.start(), IDS)
    (launch,) = rl.replay(tmp_path / "x.rec")
    assert launch.check(runner.artifact).equal
    found = runner.artifact.kernel("in_python", site="norm")
    assert "def in_python(" in str(found.source)
    assert found.tir == found.llvm == found.assembly == ""
    with pytest.raises(RecordingError, match="in_python is a function in Python"):
        launch.repro(tmp_path / "repro", runner.artifact)
