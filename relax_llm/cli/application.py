"""The application: its commands, its exit codes, and what is said when one of them fails."""

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from relax_llm.cli import screen
from relax_llm.cli.bench import bench
from relax_llm.cli.bisect import bisect
from relax_llm.cli.chat import chat
from relax_llm.cli.compare import compare
from relax_llm.cli.compile import compile_
from relax_llm.cli.env import env
from relax_llm.cli.generate import generate
from relax_llm.cli.inspect import inspect
from relax_llm.cli.interrupts import Termination
from relax_llm.cli.record import record
from relax_llm.cli.replay import replay
from relax_llm.cli.repro import repro
from relax_llm.cli.step import step
from relax_llm.cli.trace import trace
from relax_llm.cli.tune import tune

PROGRAM = "relax-llm"
USER, FAULT, INTERRUPTED, TERMINATED, PIPE = 2, 1, 130, 143, 141

_ClickException: Any = typer.BadParameter.__mro__[2]
"""The class of what is wrong with a command line; Typer brings its own copy of Click, or uses the installed one."""


class Command(TyperCommand):
    """A command whose failures become exit codes here: further out Typer gives some of them its own."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The arguments as their metavars say: Click would put "{[MODEL] PROMPT}..."."""
        return [piece.removesuffix("...").strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def invoke(self, ctx: Any) -> Any:
        """Carry the command out."""
        raise typer.Exit(
            _carry_out(lambda: super(Command, self).invoke(ctx), debug=bool(ctx.params.get("debug")))
        )


app = typer.Typer(
    name=PROGRAM,
    help="Compile a language model once, for every length, into kernels that you own.",
    epilog='Begin with: relax-llm generate "My favorite music is"',
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{PROGRAM} {metadata.version(PROGRAM)}")
        raise typer.Exit


@app.callback()
def _application(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "chat": chat,
    "compile": compile_,
    "inspect": inspect,
    "step": step,
    "trace": trace,
    "bench": bench,
    "tune": tune,
    "record": record,
    "replay": replay,
    "repro": repro,
    "compare": compare,
    "bisect": bisect,
    "env": env,
}
for _name, _function in _COMMANDS.items():
    app.command(_name, cls=Command)(_function)


def run(arguments: Sequence[str] | None) -> int:
    """Run the application and return its exit code."""
    screen.prepare()
    given = list(sys.argv[1:] if arguments is None else arguments)
    with Termination() as termination:
        try:
            code = typer.main.get_command(app).main(given or ["--help"], PROGRAM, standalone_mode=False)
        except _ClickException as refusal:
            code = _refuse(refusal)
        except typer.Abort:
            code = INTERRUPTED
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else FAULT
    if termination.requested:
        return TERMINATED
    return _carry_out(sys.stdout.flush, debug=False) or code or 0


def _refuse(refusal: Any) -> int:
    context = getattr(refusal, "ctx", None)
    path = context.command_path if context is not None else PROGRAM
    message = refusal.format_message().strip()
    end = "" if message.endswith((".", "?", "!")) else "."
    screen.error(f"{message}{end} See `{path} --help`.")
    return USER


def _carry_out(work: Callable[[], Any], *, debug: bool) -> int:
    try:
        work()
        sys.stdout.flush()
    except (typer.Exit, _ClickException):
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        screen.abandon_output()
        return PIPE
    except Exception as failure:
        return _report(failure, debug=debug)
    return 0


def _report(failure: Exception, *, debug: bool) -> int:
    """Say what went wrong, in a sentence, and with `debug` where; return the exit code."""
    sentence = screen.sentence_of(failure)
    try:
        if debug:
            sys.stderr.write("".join(traceback.format_exception(failure)))
        if sentence is not None:
            screen.error(sentence)
        else:
            described = f"{type(failure).__name__}: {failure}".strip().removesuffix(":")
            again = "" if debug else " Run it again with --debug for the traceback."
            screen.error(f"This is a fault of {PROGRAM}, please report it: {described}.{again}")
    except OSError:  # nobody can be told
        pass
    if isinstance(
        failure, OSError
    ):  # perhaps that of standard output itself: what it still holds cannot be written
        screen.abandon_output()
    return FAULT if sentence is None else USER
