"""How the process behaves: exit codes, faults, pipes that break, streams that are full or closed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import relax_llm as rl

from .conftest import COMMAND

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import Outcome


def break_down(*_: object, **__: object) -> None:
    raise KeyError("a fault")


def test_a_fault_is_told_apart_from_mistakes(
    call: Callable[..., Outcome], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rl.Runner, "stream", break_down)
    done = call("generate", artifact, "Hello")
    assert (done.code, done.out) == (1, "")
    assert "This is a fault of relax-llm, please report it: KeyError: 'a fault'." in done.err
    assert "--debug" in done.err
    assert "Traceback" not in done.err
    done = call("generate", artifact, "Hello", "--debug")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "in break_down" in done.err


def test_debug_shows_where_a_mistake_was_found(call: Callable[..., Outcome], artifact: Path) -> None:
    done = call("generate", artifact, "", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.endswith("error: The prompt is empty; give some text.\n")


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (MemoryError(), "There is not enough memory for this."),
        (OSError(28, "No space left on device", "/somewhere"), "/somewhere: No space left on device."),
        (OSError(5, "Input/output error"), "Reading or writing failed: Input/output error."),
    ],
)
def test_what_the_machine_refuses_is_no_fault(
    call: Callable[..., Outcome],
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    sentence: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(rl.Runner, "stream", refuse)
    monkeypatch.setattr("relax_llm.cli.screen.abandon_output", lambda: None)  # this process goes on
    done = call("generate", artifact, "Hello")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith(f"error: {sentence}\n")


def test_a_reader_who_goes_away_is_no_error(endless: Path, environment: dict[str, str]) -> None:
    for command in (
        ["generate", str(endless), "Hello", "-n", "100000"],
        ["inspect", str(endless), "--sites"],
    ):
        with subprocess.Popen(
            [*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            if command[0] == "generate":
                assert process.stdout.read(3)
            process.stdout.close()
            err = process.stderr.read().decode()
            assert process.wait(30) == 141
        assert "error" not in err
        assert "Traceback" not in err
        assert "Exception" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "command",
    [["generate", "{}", "Hello", "-n", "3"], ["inspect", "{}"], ["inspect", "{}", "--json"]],
    ids=" ".join,
)
def test_an_output_that_is_full(artifact: Path, environment: dict[str, str], command: list[str]) -> None:
    filled = [word.replace("{}", str(artifact)) for word in command]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, *filled], stdout=full, stderr=subprocess.PIPE, env=environment, timeout=30, check=False
        )
    assert done.returncode == 2
    assert done.stderr.decode().endswith("error: Reading or writing failed: No space left on device.\n")
    assert b"Exception" not in done.stderr


def test_streams_that_are_closed(artifact: Path, environment: dict[str, str]) -> None:
    line = " ".join([*(f"'{word}'" for word in COMMAND), "generate", f"'{artifact}'"])
    for closing in ("Hello -n 3 >&-", "Hello -n 3 2>&-", "Hello -n 3 <&-"):
        done = subprocess.run(
            ["sh", "-c", f"{line} {closing}"], capture_output=True, env=environment, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
    done = subprocess.run(
        ["sh", "-c", f"{line} - <&-"], capture_output=True, env=environment, timeout=30, check=False
    )
    assert done.returncode == 2
    assert b"which is closed" in done.stderr


def test_text_that_the_terminal_s_encoding_lacks(launch: Callable[..., Outcome], artifact: Path) -> None:
    done = launch("generate", artifact, "Hé", "-n", "3", "--json", env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0
    assert done.json["prompt"] == "Hé"
    assert launch("generate", artifact, "Hé", "-n", "20", env={"PYTHONIOENCODING": "ascii"}).code == 0


def test_the_installed_command_is_quick_to_help(environment: dict[str, str]) -> None:
    command = shutil.which("relax-llm", path=str(Path(sys.executable).parent))
    assert command is not None

    def seconds() -> float:
        """Of processor time, which other work on this machine does not add to."""
        began = os.times()
        done = subprocess.run(
            [command, "--help"], capture_output=True, env=environment, timeout=30, check=True
        )
        assert b"generate" in done.stdout
        ended = os.times()
        return ended.children_user + ended.children_system - began.children_user - began.children_system

    assert min(seconds() for _ in range(4)) < 0.6  # TVM alone takes twice that


@pytest.mark.parametrize("command", ["generate", "chat", "compile", "inspect", "env"])
def test_help_fits_a_terminal(launch: Callable[..., Outcome], command: str) -> None:
    done = launch(command, "--help", env={"COLUMNS": "80"})
    assert done.code == 0
    assert f"relax-llm {command}" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "…" not in done.out


def test_no_arguments_show_the_help(call: Callable[..., Outcome]) -> None:
    done = call()
    assert done.code == 0
    assert "Commands" in done.out
