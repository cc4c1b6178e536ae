"""`relax-llm chat`: a conversation at a terminal, and lines through a pipe."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

import relax_llm as rl

from .conftest import COMMAND, edit_manifest
from .terminal import CTRL_C, CTRL_D, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .conftest import Outcome

AT_PROMPT = ">>> $"


@pytest.fixture
def terminal(endless: Path, environment: dict[str, str]) -> Iterator[Terminal]:
    """A chat that has just begun."""
    with Terminal([*COMMAND, "chat", str(endless), "-n", "1000000"], environment) as terminal:
        terminal.wait_for(AT_PROMPT)
        yield terminal


@pytest.mark.parametrize("system", [None, "You are a pirate."])
def test_lines_of_a_pipe_are_turns(
    launch: Callable[..., Outcome], artifact: Path, system: str | None
) -> None:
    flags = [] if system is None else ["--system", system]
    done = launch("chat", artifact, "-n", "8", *flags, stdin=b"Hello\n\nAnd you?\r\n")
    chat = rl.Chat(rl.Runner(rl.load(artifact)), system=system)
    texts = [chat.ask(turn, max_new_tokens=8).text for turn in ("Hello", "And you?")]
    assert done.out == "".join(f"{text}\n" for text in texts)
    assert done.err == "note: The checkpoint's generation config sets num_beams to 4, which is not applied.\n"
    assert done.code == 0


def test_later_turns_reuse_the_cache(launch: Callable[..., Outcome], artifact: Path) -> None:
    err = launch("chat", artifact, "-n", "3", "--timings", stdin=b"Hello\nAgain\n").err
    first, second = (line for line in err.split("\n") if line.startswith("prompt"))
    assert "in the cache" not in first
    assert "in the cache" in second


def test_commands_work_in_a_pipe(launch: Callable[..., Outcome], artifact: Path, tmp_path: Path) -> None:
    saved = tmp_path / "conversation.json"
    lines = f"/system Be brief.\nHello\n/save {saved}\n/reset\n/exit\nnever said\n"
    done = launch("chat", artifact, "-n", "4", stdin=lines.encode())
    assert done.code == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert [message["content"] for message in messages[:2]] == ["Be brief.", "Hello"]
    assert messages[2]["content"] + "\n" == done.out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"/foo\n", "There is no command /foo"),
        (b"/save\n", "Name the file"),
        (b"/save /dev/null\n", "exists; choose another name"),
        (b"/save /proc/nowhere/x\n", "cannot be written"),
        (b"caf\xe9\n", "Line 1 of standard input is not UTF-8"),
        (b"x" * 300 + b"\n", "the model's context holds"),
    ],
)
def test_a_mistake_ends_a_pipe_with_a_sentence(
    launch: Callable[..., Outcome], artifact: Path, line: bytes, expected: str
) -> None:
    done = launch("chat", artifact, "-n", "2", stdin=line + b"Hello\n")
    assert (done.code, done.out) == (2, "")
    assert expected in done.err.split("error: ")[1]
    assert "Traceback" not in done.err


def test_no_chat_template_is_told_before_the_first_turn(
    launch: Callable[..., Outcome], copy_of_artifact: Path
) -> None:
    template = copy_of_artifact / "chat_template.jinja"
    if template.exists():
        template.unlink()
    edit_manifest(copy_of_artifact, lambda manifest: manifest["files"].pop("chat_template.jinja", None))
    done = launch("chat", copy_of_artifact, stdin=b"")
    assert done.code == 2
    assert "has no chat template" in done.err


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(terminal: Terminal, tmp_path: Path) -> None:
    terminal.press("Hello\r")
    said = terminal.wait_for(r">>> Hello\n(?s:.{20})").end()
    terminal.press(CTRL_C)
    terminal.wait_for("Ctrl-C once more leaves", after=said)
    terminal.wait_for(AT_PROMPT, after=said)
    saved = tmp_path / "conversation.json"
    terminal.press(f"/save {saved}\r")
    terminal.wait_for("2 messages")
    question, answer = json.loads(saved.read_text())["messages"]
    assert question["content"] == "Hello"
    assert len(answer["content"]) > 10
    terminal.press("And you?\r")
    said = terminal.wait_for(r">>> And you\?\n(?s:.{20})").end()
    terminal.press(CTRL_C)
    terminal.wait_for(AT_PROMPT, after=said)
    terminal.press(CTRL_D)
    assert terminal.finish() == 0
    assert "Traceback" not in terminal.text


def test_a_second_ctrl_c_leaves(terminal: Terminal) -> None:
    time.sleep(0.2)  # readline shows its prompt a moment before it can be interrupted
    terminal.press("half a line")
    terminal.wait_for("half a line")
    terminal.press(CTRL_C)
    said = terminal.wait_for("once more leaves").end()
    terminal.wait_for(AT_PROMPT, after=said)
    terminal.press("/help\r")  # something else in between: the next Ctrl-C is a first one again
    said = terminal.wait_for("what was said of it stays").end()
    terminal.wait_for(AT_PROMPT, after=said)
    time.sleep(0.2)
    terminal.press(CTRL_C)
    said = terminal.wait_for("once more leaves", after=said).end()
    terminal.wait_for(AT_PROMPT, after=said)
    time.sleep(0.2)
    terminal.press(CTRL_C)
    assert terminal.finish() == 130
    assert "Traceback" not in terminal.text


def test_mistakes_at_a_terminal_are_told_and_forgiven(terminal: Terminal) -> None:
    for line, answer in (
        ("/nonsense", "There is no command /nonsense"),
        ("/save /proc/nowhere/x", "cannot be written"),
        ("/system", "There is no system prompt"),
        ("/system Be brief.", "begins with this system prompt"),
        ("/system", "The system prompt is: Be brief."),
        ("/reset", "A new conversation begins"),
    ):
        said = len(terminal.text)
        terminal.press(f"{line}\r")
        terminal.wait_for(answer.replace("/", "."), after=said)
        terminal.wait_for(AT_PROMPT, after=said)
    terminal.press("/exit\r")
    assert terminal.finish() == 0


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(
    launch: Callable[..., Outcome], artifact: Path
) -> None:
    turns = b"".join(b"turn %d is rather long and fills what there is\n" % number for number in range(6))
    done = launch("chat", artifact, "-n", "9", stdin=turns)
    assert done.code == 0
    assert "the oldest messages of the conversation were forgotten" in done.err
