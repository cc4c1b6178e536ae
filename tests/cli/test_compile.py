"""`relax-llm compile` makes an artifact or nothing at all."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import relax_llm as rl

from ..artifact.checkpoints import LLAMA, write
from ..machines import PLAINER
from .conftest import COMMAND
from .terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Outcome

QUICKLY = ("--target", PLAINER) if PLAINER else ()


def test_an_artifact_is_made_and_summed_up(
    call: Callable[..., Outcome], checkpoint: Path, tmp_path: Path
) -> None:
    done = call("compile", checkpoint, "-o", tmp_path / "out", "--no-cache", *QUICKLY)
    made = rl.load(tmp_path / "out").manifest
    assert (done.code, done.err) == (0, f"To see its kernels: relax-llm inspect {tmp_path / 'out'}\n")
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.out.splitlines())
    assert facts["kernels"].startswith(f"{len(made.kernels)}, in ")
    assert facts["weights"].startswith(f"{len(made.weights)} tensors, ")
    assert facts["weights"].endswith("kB as f32")
    assert re.fullmatch(r"\d+\.\d s", facts["time"])


WITHOUT_PYTORCH = """
import sys
from relax_llm.cli import main

code = main(sys.argv[1:])
sys.exit(code or (3 if "torch" in sys.modules else 4 if "tvm" not in sys.modules else 0))
"""


def test_pytorch_is_not_imported_though_it_is_installed(
    checkpoint: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """By TVM: it takes two seconds, and Ctrl-C within it ends the process in C++."""
    assert importlib.util.find_spec("torch") is not None
    arguments = ["compile", str(checkpoint), "-o", str(tmp_path / "out"), "--no-cache", *QUICKLY]
    command = [sys.executable, "-c", WITHOUT_PYTORCH, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_json(call: Callable[..., Outcome], checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    found = call("compile", checkpoint, "-o", tmp_path / "out", "--json").json
    manifest = rl.load(artifact).manifest
    assert found["path"] == str(tmp_path / "out")
    assert found["weight_format"] == "f32"
    assert found["kernels"] == len(manifest.kernels)
    assert found["launches"] == {name: len(calls) for name, calls in manifest.functions.items()}
    assert found["weights_bytes"] == (artifact / "weights.safetensors").stat().st_size
    assert found["seconds"] > 0


def test_an_architecture_of_one_s_own(call: Callable[..., Outcome], checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from relax_llm.models.llama import Llama\n\n\nclass Mine(Llama):\n    pass\n")
    done = call("compile", checkpoint, "-o", tmp_path / "out", "--architecture", file, "--json", *QUICKLY)
    assert done.json["architecture"].endswith(".Mine")


def test_a_warning_is_a_note(call: Callable[..., Outcome], checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "with NaN"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    showing = warnings.showwarning
    done = call("compile", broken, "-o", tmp_path / "out", *QUICKLY)
    assert done.code == 0
    assert re.search(r"^note: .*model\.norm\.weight.*NaN", done.err, re.MULTILINE)
    assert done.err.count("NaN") == 1
    assert "RuntimeWarning" not in done.err
    assert warnings.showwarning is showing  # nothing is left changed behind


def test_bars_on_a_terminal(checkpoint: Path, environment: dict[str, str], tmp_path: Path) -> None:
    command = [*COMMAND, "compile", str(checkpoint), "-o", str(tmp_path / "out"), "--no-cache", *QUICKLY]
    with Terminal(command, environment) as terminal:
        assert terminal.finish(60) == 0
        for task in ("Tracing", "Passes", "Compiling kernels", "Packing weights"):
            assert task in terminal.text
        assert "100%" in terminal.text
        assert max(map(len, terminal.text.rpartition("\r")[2].split("\n"))) <= 80


@pytest.mark.parametrize(
    ("how", "delay"), [(signal.SIGINT, 0.0), (signal.SIGINT, 0.5), (signal.SIGTERM, 0.0)], ids=str
)
def test_an_interrupted_compilation_leaves_nothing(
    checkpoint: Path, environment: dict[str, str], tmp_path: Path, how: signal.Signals, delay: float
) -> None:
    place = tmp_path / "place"
    command = [*COMMAND, "compile", str(checkpoint), "-o", str(place / "out"), "--no-cache"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        end = time.monotonic() + 30
        while not (place.is_dir() and any(place.iterdir())) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(delay)
        assert process.poll() is None
        process.send_signal(how)
        out, err = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how], err.decode()
    assert out == b""
    assert b"Traceback" not in err
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("file", "file is a file; an artifact is a directory"),
        ("file/below/out", "out cannot be written: Not a directory"),
        ("folder", "folder holds something that is not an artifact"),
        ("/proc/nowhere/out", "/proc/nowhere/out cannot be written"),
        ("x" * 300, ": File name too long"),
    ],
)
def test_a_place_that_cannot_be_written(
    call: Callable[..., Outcome], checkpoint: Path, artifact: Path, tmp_path: Path, place: str, sentence: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for flags in ([], ["--no-cache"]):
        done = call("compile", checkpoint, "-o", tmp_path / place, *flags)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ")
        assert sentence in done.err
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thesis.txt"]


def test_a_full_disk(
    environment: dict[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The library still fits, and what it is linked of; the weights do not."""
    checkpoint = write(tmp_path_factory.mktemp("large") / "model", {**LLAMA, "vocab_size": 20_000})
    made = rl.compile(checkpoint, target=PLAINER).path
    limit = (made / "weights.safetensors").stat().st_size - 1
    assert (made / "lib.so").stat().st_size < 0.5 * limit
    program = (
        "import resource, sys; from relax_llm.cli import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["compile", str(checkpoint), "-o", str(tmp_path / "out"), "--no-cache", *QUICKLY]
    done = subprocess.run(
        [COMMAND[0], "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**environment, "TMPDIR": str(tmp_path)},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'out'} cannot be written: File too large.\n"
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_in_the_way_stays_when_the_new_one_fails(
    call: Callable[..., Outcome], checkpoint: Path, copy_of_artifact: Path, tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in copy_of_artifact.iterdir()}
    bad = tmp_path / "bad.py"
    bad.write_text("raise RuntimeError('not today')")
    done = call("compile", checkpoint, "-o", copy_of_artifact, "--architecture", bad)
    assert done.code == 2
    assert {file.name: file.read_bytes() for file in copy_of_artifact.iterdir()} == before
    assert call("compile", checkpoint, "-o", copy_of_artifact, *QUICKLY).code == 0


def test_two_processes_may_fill_the_cache_at_once(
    checkpoint: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    env = {**environment, "XDG_CACHE_HOME": str(tmp_path)}
    command = [*COMMAND, "generate", str(checkpoint), "Hello", "-n", "5", "--json"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) for _ in range(2)
    ]
    answers: list[Any] = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    (found,) = (tmp_path / "relax_llm" / "artifacts").glob("*/manifest.json")
    assert found.parent.parent.stat().st_mode & 0o077 == 0
