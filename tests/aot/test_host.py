"""The C++ host program of docs/examples: built with the FFI's headers alone, it continues as the runner does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relax_llm as rl

from .conftest import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("host")
    for name in ("host.cpp", "artifact.h", "Makefile"):
        shutil.copyfile(EXAMPLES / name, directory / name)
    done = subprocess.run(
        ["make", f"PYTHON={sys.executable}", "CXXFLAGS=-O1 -Wall -Wextra -Werror"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory / "host"


def _run(program: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"]}  # nothing that finds Python or its libraries
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def _greedy(runner: rl.Runner, prompt: Sequence[int], count: int) -> list[int]:
    state = runner.start()
    logits = runner.prefill(state, prompt) if len(prompt) > 1 else runner.decode(state, prompt[0])
    found = []
    for _ in range(count):
        found.append(int(np.argmax(logits)))
        logits = runner.decode(state, found[-1])
    return found


@pytest.mark.parametrize(
    ("length", "count"),
    [(1, 5), (2, 3), (17, 60), (63, 3), (64, 4), (65, 110), (130, 40)],
    ids=lambda value: str(value),
)
def test_it_continues_as_the_runner_does(
    program: Path, artifact: rl.Artifact, length: int, count: int
) -> None:
    """Among the lengths are those at which caches grow: beyond 64, 128 and to the end of the context, 200."""
    prompt = np.random.default_rng(length).integers(0, artifact.manifest.vocab_size, length).tolist()
    done = _run(program, artifact.path, count, *prompt)
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == _greedy(rl.Runner(artifact), prompt, count)


@pytest.mark.parametrize("format", ["bf16", "q8"])
def test_smaller_caches(program: Path, checkpoint: Path, tmp_path: Path, format: str) -> None:
    """Through their growth, which copies tiles of words, and scales."""
    smaller = rl.compile(
        checkpoint, output=tmp_path / "smaller", target=PLAIN, kv_cache=format, selection="pinned"
    )
    prompt = np.random.default_rng(0).integers(0, smaller.manifest.vocab_size, 61).tolist()
    done = _run(program, smaller.path, 80, *prompt)
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == _greedy(rl.Runner(smaller), prompt, 80)


def test_mistakes_are_answered_with_a_sentence(program: Path, artifact: rl.Artifact, tmp_path: Path) -> None:
    vocab, context = artifact.manifest.vocab_size, artifact.manifest.context_length
    for arguments, says in (
        ([artifact.path, 3, "five"], "A token id must be a whole number, not 'five'."),
        ([artifact.path, -1, 5], "NEW_TOKENS must be a whole number, not '-1'."),
        ([artifact.path, 3, vocab], f"Token id {vocab} is outside the vocabulary of {vocab}."),
        (
            [artifact.path, 3, *[1] * (context + 1)],
            f"{context + 1} tokens do not fit the model's context of {context}",
        ),
        ([tmp_path, 3, 1], f"{tmp_path}/manifest.json: No such file or directory"),
        ([artifact.path], "Usage: host ARTIFACT NEW_TOKENS TOKEN_ID..."),
    ):
        done = _run(program, *arguments)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert done.stderr.startswith(says)


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_damaged_artifacts_are_refused(program: Path, artifact: rl.Artifact, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(artifact.path, tmp_path / name))

    manifest, weights = "manifest.json", "weights.safetensors"
    _edit(damaged("format") / manifest, lambda data: data.update(format=9))
    _edit(damaged("field") / manifest, lambda data: data.pop("caches"))
    _edit(damaged("type") / manifest, lambda data: data.update(vocab_size="many"))
    _edit(damaged("shape") / manifest, lambda data: data["weights"][0].update(shape=[1]))
    _edit(damaged("name") / manifest, lambda data: data["weights"][0].update(name="other"))
    (damaged("json") / manifest).write_text("{")
    os.truncate(damaged("short") / weights, 4)
    os.truncate(damaged("cut") / weights, (artifact.path / weights).stat().st_size - 8)
    (damaged("library") / "lib.so").unlink()
    for name, says in (
        ("format", "the artifact has format 9, but this program reads format 3."),
        ("field", "the field 'caches' is missing"),
        ("type", "the field 'vocab_size' has another type"),
        ("shape", "differs from the manifest"),
        ("name", "the field 'other' is missing"),
        ("json", "this is not JSON of an artifact"),
        ("short", "the file is truncated"),
        ("cut", "the file is truncated"),
        ("library", "lib.so: No such file or directory"),
    ):
        done = _run(program, tmp_path / name, 3, 1)
        assert (done.returncode, done.stdout) == (1, ""), name
        assert says in done.stderr, name
        assert str(tmp_path / name) in done.stderr
