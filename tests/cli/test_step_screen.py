"""`relax-llm step` on a full screen, driven by its keys, at 80 by 24 and wider."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from textual.widgets import DataTable, Input, Log, Static, TabbedContent

import relax_llm as rl
from relax_llm.debugger.commands import COMMANDS
from relax_llm.debugger.screen import Debugger, Help
from relax_llm.debugger.session import Session

from .conftest import COMMAND
from .terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


class Driver:
    """The screen and its keyboard."""

    def __init__(self, app: Debugger, pilot: Any) -> None:
        self.app, self._pilot = app, pilot

    @property
    def session(self) -> Session:
        return self.app.session

    @property
    def at(self) -> int:
        return self.session.launch.index

    @property
    def says(self) -> str:
        return str(self.app.query_one("#says", Static).render())

    @property
    def answers(self) -> list[str]:
        return self._log("answers")

    @property
    def tensors(self) -> str:
        return "\n".join(self._log("tensors"))

    @property
    def code(self) -> str:
        return "\n".join(self._log("code"))

    @property
    def pane(self) -> str:
        return self.app.query_one("#about", TabbedContent).active

    @property
    def lines(self) -> list[str]:
        """What the terminal shows."""
        return [
            "".join(segment.text for segment in strip)
            for strip in self.app.screen._compositor.render_strips()
        ]

    def row(self, index: int) -> list[str]:
        return [str(cell).strip() for cell in self.app.query_one("#launches", DataTable).get_row_at(index)]

    def _log(self, name: str) -> list[str]:
        return list(self.app.query_one(f"#{name}_log", Log).lines)

    async def press(self, *keys: str) -> None:
        await self._pilot.press(*keys)
        await self.settle()

    async def type(self, text: str) -> None:
        """What follows a key that asks for words, and Enter."""
        await self.press(*({" ": "space"}.get(letter, letter) for letter in text), "enter")

    async def settle(self) -> None:
        await self._pilot.pause()
        await self.app.workers.wait_for_complete()
        await self._pilot.pause()


@pytest.fixture
def drive(artifact: Path) -> Callable[..., None]:
    """Run a script of keys against a new session."""
    runner = rl.Runner(rl.load(artifact))

    def run(script: Callable[[Driver], Awaitable[None]], size: tuple[int, int] = (80, 24)) -> None:
        assert runner.tokenizer is not None
        app = Debugger(Session(runner, runner.tokenizer.encode("one two")), "tiny")

        async def driven() -> None:
            async with app.run_test(size=size) as pilot:
                driver = Driver(app, pilot)
                await driver.settle()
                await script(driver)

        asyncio.run(driven())

    return run


def test_what_is_seen_at_80_by_24(drive: Callable[..., None]) -> None:
    async def script(driver: Driver) -> None:
        lines = driver.lines
        assert len(lines) == 24
        assert lines[0].startswith("tiny  prefill: batch = 1, seq = 7, kv_len = 7")
        assert lines[1].split() == ["#", "us", "site", "kernel", "operator"]
        assert lines[2].split() == [">", "0", "embed_tokens", "by_row", "embedding"]
        assert "tiled" in lines[4]
        assert "matmul" in lines[4]
        assert lines[10].split() == ["1", "tensors", "2", "code", "3", "answers"]
        assert lines[12].startswith("kernel  by_row, for embedding")
        assert "0  activation 1x7" in "\n".join(lines)
        assert lines[22].startswith("prefill[0] embed_tokens: by_row, about to be made")
        assert lines[23].startswith("s step  n next token  r run  b break  k skip  x replace")
        assert all(len(line) == 80 for line in lines)

    drive(script)


def test_keys_that_launch(drive: Callable[..., None]) -> None:
    async def script(driver: Driver) -> None:
        await driver.press("s")
        assert driver.at == 1
        assert driver.row(0)[0] == ""
        assert float(driver.row(0)[2]) > 0
        assert driver.row(1)[:3] == [">", "1", ""]
        assert driver.says == f"{driver.session.launch}, about to be made"
        await driver.press("s", "s")
        assert driver.at >= 2  # a key that comes while a command runs is dropped
        await driver.press("m")
        assert driver.session.launch.done == "run"
        assert "state   run in" in driver.tensors
        assert "output" in driver.tensors
        await driver.press("t")
        assert driver.says.endswith("chosen")
        await driver.press("e")
        assert driver.session.steps.ended
        assert driver.says.splitlines()[1].startswith("expected next: ")
        await driver.press("s")
        assert driver.says.startswith("error: All launches of this prefill have been made; `next` begins")
        await driver.press("n")
        assert driver.session.steps.function == "decode"
        assert driver.lines[0].startswith("tiny  decode: batch = 1, seq = 1, kv_len = 8")
        assert driver.says.splitlines()[0] == repr(driver.session.text)
        await driver.press("d")
        assert driver.session.steps.ended
        await driver.press("n")
        await driver.press("k")
        assert driver.at == 1
        assert driver.row(0)[2] == "skipped"
        await driver.press("r")
        assert driver.session.steps.ended

    drive(script)


def test_keys_that_ask(drive: Callable[..., None]) -> None:
    async def script(driver: Driver) -> None:
        field = driver.app.query_one("#command", Input)
        await driver.press("b")
        assert field.has_class("-asked")
        assert field.value == "break "
        await driver.type("layers.1.*")
        assert not field.has_class("-asked")
        assert driver.says == "breakpoint 1: site layers.1.*"
        await driver.press("r")
        assert driver.session.launch.site == "layers.1.input_layernorm"
        assert driver.says.startswith("breakpoint 1, before")
        await driver.press("colon")
        await driver.type("delete all")
        await driver.press("u")
        await driver.type("layers.1.mlp.down_proj")
        assert driver.session.launch.site == "layers.1.mlp.down_proj"
        await driver.press("x")
        await driver.type("zip")
        assert driver.says.startswith("error: The kernel 'zip' does not serve layers.1.mlp.down_proj")
        kernel = driver.session.launch.kernels[-1]
        await driver.press("x")
        await driver.type(kernel)
        assert driver.session.launch.done == "replaced"
        assert driver.row(driver.at)[2].endswith("*")
        await driver.press("w")
        await driver.type("norm")
        assert driver.says == "breakpoint 2: norm changes"
        await driver.press("p")
        await driver.type("0")
        assert driver.pane == "answers"
        assert driver.says.endswith("lines of answer to print 0")
        assert any("#" in line for line in driver.answers)
        await driver.press("i")
        await driver.press("escape")
        assert not field.has_class("-asked")
        assert driver.app.focused is driver.app.query_one("#launches")
        await driver.press("colon")
        await driver.type("")
        await driver.press("colon")
        await driver.type("nonsense")
        assert driver.says == "error: There is no command 'nonsense'; `help` lists them."

    drive(script)


def test_keys_that_show(drive: Callable[..., None]) -> None:
    async def script(driver: Driver) -> None:
        for key, pane in (("2", "code"), ("3", "answers"), ("1", "tensors")):
            await driver.press(key)
            assert driver.pane == pane
        assert "#" in driver.tensors
        assert "0: activation, 1x7, int32" in driver.tensors
        await driver.press("o")
        assert "1: weight model.embed_tokens.weight" in driver.tensors
        await driver.press("o")
        assert "0: activation, 1x7, int32" in driver.tensors
        for form in ("tir", "llvm", "assembly", "source"):
            await driver.press("f")
            assert driver.pane == "code"
            assert driver.code.startswith((f"{form} of by_row\n", "Nobody wrote by_row"))
            assert len(driver.code) > 20
        await driver.press("down", "down")
        assert driver.app.query_one("#launches", DataTable).cursor_row == 2
        await driver.press("escape")
        assert driver.says == "q leaves."

    drive(script)


def test_help(drive: Callable[..., None]) -> None:
    async def script(driver: Driver) -> None:
        await driver.press("question_mark")
        assert isinstance(driver.app.screen, Help)
        text = "\n".join(driver.app.screen.query_one(Log).lines)
        for binding in driver.app.BINDINGS:
            assert f"\n{_shown(binding.key)}" in f"\n{text}", binding  # type: ignore[union-attr]
        for command in COMMANDS.values():
            assert command.says in text
        await driver.press("escape")
        assert len(driver.app.screen_stack) == 1
        await driver.press("s")
        assert driver.at == 1

    drive(script)


def _shown(key: str) -> str:
    names = {
        "colon": ":",
        "question_mark": "?",
        "escape": "Escape",
        "ctrl+c": "Escape",
        "2": "1 2",
        "3": "1 2 3",
    }
    return names.get(key, key)


@pytest.mark.parametrize("keys", [("q",), ("colon", "q", "u", "i", "t", "enter")])
def test_leaving(drive: Callable[..., None], keys: tuple[str, ...]) -> None:
    async def script(driver: Driver) -> None:
        await driver.press(*keys)
        assert driver.app._exit

    drive(script)


def test_what_runs_can_be_interrupted(drive: Callable[..., None]) -> None:
    """By Escape and by Ctrl-C, before the next launch; other commands wait outside."""

    async def script(driver: Driver) -> None:
        for key in ("escape", "ctrl+c"):
            begun, going = threading.Event(), threading.Event()

            def slow(*inputs: Any) -> Any:
                begun.set()  # noqa: B023
                going.wait(10)  # noqa: B023
                return inputs[0]

            driver.session.steps.replace("layers.1.input_layernorm", slow)
            await driver._pilot.press("e")
            while not begun.is_set():
                await asyncio.sleep(0.01)
            assert _busy(driver)
            await driver._pilot.press("s")
            await driver._pilot.press(key)
            going.set()
            await driver.settle()
            assert not _busy(driver)
            assert driver.says.startswith("interrupted")
            index = driver.at
            assert driver.session.steps.launches[index - 1].site == "layers.1.input_layernorm"
            await driver.press("n")

    drive(script)


def _busy(driver: Driver) -> bool:
    return driver.app.busy


def test_a_wide_terminal(drive: Callable[..., None]) -> None:
    async def script(driver: Driver) -> None:
        lines = driver.lines
        assert "site" in lines[1]
        assert "1 tensors" in lines[1]  # beside each other
        assert "kernel  by_row" in lines[3]

    drive(script, (160, 40))


@pytest.mark.parametrize("size", [(40, 10), (20, 5)])
def test_small_terminals_do_not_break_it(drive: Callable[..., None], size: tuple[int, int]) -> None:
    async def script(driver: Driver) -> None:
        await driver.press("s")
        await driver.press("question_mark")
        await driver.press("escape")
        assert driver.at == 1

    drive(script, size)


def test_no_color(drive: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def script(driver: Driver) -> None:
        assert driver.app.no_color
        assert driver.lines[2].startswith(">")

    drive(script)


def test_on_a_real_terminal(environment: dict[str, str], artifact: Path) -> None:
    terminal = Terminal(
        [*COMMAND, "step", str(artifact), "--prompt", "abc"], {**environment, "NO_COLOR": "1"}
    )
    try:
        terminal.wait_for("about to be made")
        assert "\x1b[?1049h" in terminal.raw  # the alternate screen
        assert "\x1b[?1000h" not in terminal.raw  # the mouse is the terminal's
        terminal.press("s")
        terminal.wait_for(r"prefill\[1\]")
        terminal.press("q")
        assert terminal.finish() == 0
        assert terminal.raw.rindex("\x1b[?1049l") > terminal.raw.rindex("\x1b[?1049h")
    finally:
        terminal.close()


def test_textual_is_imported_only_for_the_screen() -> None:
    """And `--help` needs neither it nor NumPy."""
    code = (
        "import sys\n"
        "from relax_llm.cli.application import run\n"
        "run(['--help'])\n"
        "print([name for name in ('numpy', 'tvm_ffi', 'textual') if name in sys.modules])\n"
        "import relax_llm.debugger.lines\n"
        "print('textual' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "False"]
