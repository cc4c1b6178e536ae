"""The debugger on a full screen: the launches, what the present one computes on, its code, and keys for commands."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.coordinate import Coordinate
from textual.screen import ModalScreen
from textual.widgets import DataTable, Input, Log, Static, TabbedContent, TabPane

from relax_llm.debugger import describe
from relax_llm.debugger.commands import COMMANDS, Quit, execute
from relax_llm.debugger.session import Session
from relax_llm.errors import RelaxLLMError
from relax_llm.runtime.listing import Listed

_ASKED = {"b": "break", "u": "until", "x": "replace", "w": "watch", "p": "print", "i": "info"}
"""Keys that begin a command that takes words."""

_COLUMNS = (" ", "   #", "       us", " site", "kernel", "operator")


@dataclass(frozen=True)
class View:
    """What is on the screen between two commands."""

    title: str
    launches: tuple[Listed, ...]
    tensors: str
    code: str


class Help(ModalScreen[None]):
    """Every key and every command."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter", "app.pop_screen", "Close")
    ]
    DEFAULT_CSS = "Help { align: center middle; } Help Log { width: 80; height: 90%; border: solid; }"

    def compose(self) -> ComposeResult:
        """One list."""
        yield Log(id="help")

    def on_mount(self) -> None:
        """Fill it."""
        keys = [f"{known.key:<10} {known.says}" for known in COMMANDS.values() if known.key]
        keys += [f"{key:<10} begin the command `{name}`" for key, name in _ASKED.items()]
        keys += [
            ":          type a command",
            "1 2 3      tensors, code, answers",
            "f          another form of the code: source, TIR, LLVM IR, assembly",
            "o          the numbers of another tensor",
            "Escape     leave what is typed; interrupt what runs",
            "?          this; Escape closes it",
        ]
        commands = [f"{f'{known.name} {known.usage}':<27} {known.says}" for known in COMMANDS.values()]
        self.query_one(Log).write_lines(["KEYS", *keys, "", "COMMANDS", *commands]).scroll_home(animate=False)


class Debugger(App[None]):
    """The screen. It computes nothing: keys become commands, which one other thread carries out."""

    TITLE = "relax-llm step"
    ENABLE_COMMAND_PALETTE = False
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (130, "-wide")]  # noqa: RUF012 - as Textual declares it
    CSS = """
    #title { height: 1; background: $primary-background; }
    #body { height: 1fr; }
    DataTable { height: 9; }
    TabbedContent { height: 1fr; }
    TabPane { padding: 0; }
    .-wide #body { layout: horizontal; }
    .-wide DataTable { width: 1fr; height: 1fr; }
    .-wide TabbedContent { width: 1fr; height: 1fr; }
    #says { height: auto; max-height: 3; }
    #command { height: 1; border: none; padding: 0; display: none; }
    #command.-asked { display: block; }
    #keys { height: 1; color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(known.key, f"carry_out('{known.name}')", known.says)
            for known in COMMANDS.values()
            if known.key
        ),
        *(Binding(key, f"ask('{name} ')", name) for key, name in _ASKED.items()),
        Binding("colon", "ask('')", "type a command"),
        Binding("1", "show('tensors')", "tensors"),
        Binding("2", "show('code')", "code"),
        Binding("3", "show('answers')", "answers"),
        Binding("f", "form", "another form of the code"),
        Binding("o", "tensor", "the numbers of another tensor"),
        Binding("escape", "escape", "interrupt"),
        Binding("ctrl+c", "escape", "interrupt", priority=True),
        Binding("question_mark", "help", "help"),
    ]

    def __init__(self, session: Session, model: str) -> None:
        """Nothing is shown yet.

        Args:
            session: What the commands act on.
            model: Its name.
        """
        super().__init__()
        self.session = session
        self.busy = False
        self._model = model
        self._form = describe.LISTINGS[0]
        self._tensor = 0
        self._shown: tuple[Listed, ...] = ()
        # One thread for all: TVM keeps workers for every thread that launches kernels.
        self._thread = ThreadPoolExecutor(1, "launches")

    def compose(self) -> ComposeResult:
        """The launches, what is known of the present one, the last answer, and the keys."""
        yield Static(id="title", markup=False)
        with Vertical(id="body"):
            yield DataTable(id="launches", cursor_type="row", cell_padding=0)
            with TabbedContent(id="about"):
                with TabPane("1 tensors", id="tensors"):
                    yield Log(id="tensors_log")
                with TabPane("2 code", id="code"):
                    yield Log(id="code_log")
                with TabPane("3 answers", id="answers"):
                    yield Log(id="answers_log")
        yield Static(id="says", markup=False)
        yield Input(id="command", placeholder="a command; help lists them", select_on_focus=False)
        yield Static(
            "s step  n next token  r run  b break  k skip  x replace  t time  ? help  q quit", id="keys"
        )

    async def on_mount(self) -> None:
        """Show where the run stands."""
        self.query_one("#launches", DataTable).add_columns(*_COLUMNS)
        self.query_one("#launches").focus()
        await self._carry_out("", says=describe.where(self.session))

    def on_unmount(self) -> None:
        """Let the other thread end."""
        self._thread.shutdown(wait=False)

    def action_carry_out(self, line: str) -> None:
        """Carry out a command, unless another one runs."""
        if self.busy and line == "quit":
            self.session.interrupt()
            self.exit()
        elif self.busy:
            self.bell()
        else:
            self.busy = True
            self.run_worker(self._carry_out(line))

    def action_ask(self, begun: str) -> None:
        """Have the user type a command, or the rest of one."""
        field = self.query_one("#command", Input)
        field.value = begun
        field.cursor_position = len(begun)
        field.add_class("-asked")
        field.focus()

    def action_show(self, pane: str) -> None:
        """Show a pane."""
        self.query_one("#about", TabbedContent).active = pane

    def action_form(self) -> None:
        """Show the code in its next form."""
        forms = describe.LISTINGS
        self._form = forms[(forms.index(self._form) + 1) % len(forms)]
        self.action_show("code")
        self.action_carry_out("")

    def action_tensor(self) -> None:
        """Show the numbers of the next tensor."""
        self._tensor += 1
        self.action_show("tensors")
        self.action_carry_out("")

    def action_escape(self) -> None:
        """Leave the line that is being typed; else interrupt what runs."""
        if self.query_one("#command").has_class("-asked"):
            self._put_away()
        elif self.busy:
            self.session.interrupt()
        else:
            self._say("q leaves.")

    def action_help(self) -> None:
        """Every key and every command."""
        self.push_screen(Help())

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Carry out what was typed."""
        self._put_away()
        self.action_carry_out(event.value)

    def _put_away(self) -> None:
        self.query_one("#command").remove_class("-asked")
        self.query_one("#launches").focus()

    async def _carry_out(self, line: str, says: str = "") -> None:
        """Carry out a command in the thread of launches, and show what became of it."""
        loop = asyncio.get_running_loop()
        self.busy = True
        try:
            if line:
                self._say("...")
                try:
                    says = await loop.run_in_executor(self._thread, execute, self.session, line)
                except RelaxLLMError as error:
                    says = f"error: {error}"
            view = await loop.run_in_executor(self._thread, self._view)
        except Quit:
            self.exit()
            return
        finally:
            self.busy = False
        self._show(view)
        self._answer(line, says)

    def _view(self) -> View:
        """What to show; in the thread of launches, as looking at a large tensor takes a while."""
        session = self.session
        steps = session.steps
        sizes = ", ".join(f"{name} = {size}" for name, size in steps.sizes.items())
        title = f"{self._model}  {steps.function}: {sizes}"
        if steps.current is None:
            ended = describe.expected(session)
            return View(title, steps.launches, ended, ended)
        try:
            code = f"{self._form} of {steps.current.kernel}\n{describe.listing(steps.current, self._form)}"
        except RelaxLLMError as error:
            code = str(error)
        about = f"{describe.about(steps.current)}\n\n{describe.shown(steps.current, self._tensor)}"
        return View(title, steps.launches, about, code)

    def _show(self, view: View) -> None:
        self.query_one("#title", Static).update(view.title)
        table = self.query_one("#launches", DataTable)
        if [row.site for row in view.launches] != [row.site for row in self._shown]:
            table.clear()
            for row in view.launches:
                table.add_row(*_cells(row))
        else:
            for row, before in zip(view.launches, self._shown, strict=True):
                if row != before:
                    for column, cell in enumerate(_cells(row)):
                        table.update_cell_at(Coordinate(row.index, column), cell, update_width=True)
        self._shown = view.launches
        at = next((row.index for row in view.launches if row.current), len(view.launches) - 1)
        table.move_cursor(row=at, animate=False)
        for name, text in (("#tensors_log", view.tensors), ("#code_log", view.code)):
            log = self.query_one(name, Log)
            log.clear()
            log.write(text, scroll_end=False)
            log.scroll_home(animate=False)

    def _answer(self, line: str, text: str) -> None:
        """Keep an answer, and show its end; one that is long has the whole pane."""
        lines = text.splitlines()
        self.query_one("#answers_log", Log).write_lines([f"> {line}", *lines] if line else lines)
        if len(lines) > _FEW:
            self.action_show("answers")
        self._say(text if len(lines) <= _FEW else f"{len(lines)} lines of answer to {line}")

    def _say(self, text: str) -> None:
        self.query_one("#says", Static).update(text)


_FEW = 3


def _cells(row: Listed) -> tuple[str, ...]:
    mark = ">" if row.current else " "
    site, kernel = f" {row.site} ", f"{row.kernel} "
    return mark, f"{row.index:>4}", f"{describe.mark(row):>9}", site, kernel, row.operator


def show(session: Session, model: str) -> None:
    """Fill the terminal with the debugger until the user leaves.

    Args:
        session: What it acts on.
        model: Its name.
    """
    Debugger(session, model).run(mouse=False)  # what is on the screen can be selected and copied as ever
    session.interrupt()
    session.close()
