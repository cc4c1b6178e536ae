"""`relax-llm bench`: how fast a model is on this machine."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relax_llm.cli import options as o, screen, tables
from relax_llm.cli.models import check_threads, named_or_default, open_artifact, start_runner
from relax_llm.errors import InputError
from relax_llm.progress import Bars

if TYPE_CHECKING:
    from relax_llm.runtime.speed import Speeds

_RUN, _OUTPUT = "Run", "Output"


def bench(
    model: o.Subject = None,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N", help="Tokens of the prompts.", rich_help_panel=_RUN)
    ] = "16,64,256,1024",
    decodes: Annotated[
        int,
        typer.Option(
            "--decodes", "-n", metavar="N", help="Tokens decoded behind each.", rich_help_panel=_RUN
        ),
    ] = 16,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", help="How often.", rich_help_panel=_RUN)
    ] = 5,
    limits: o.Limits = None,
    weights: o.Weights = None,
    kv_cache: o.KVCache = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure prompts of some lengths and the tokens decoded behind them, and how near they are to the limit.

    To compare with other engines, in the same minutes, run `python -m benchmarks.llm` in a checkout.
    """
    from relax_llm.runtime.speed import measure

    check_threads(threads)
    wanted = _lengths(lengths)
    given = o.limits_given(limits)
    named = named_or_default(model)
    artifact = open_artifact(
        named, weights=weights, kv_cache=kv_cache, architecture=architecture, kernels=kernels, target=target
    )
    runner = start_runner(artifact, threads)
    if limits == o.ANEW:
        runner.limits(anew=True)
    found = measure(runner, wanted, decodes=decodes, rounds=rounds, limits=given, progress=Bars())
    if json:
        screen.json_document(_data(named, found))
    else:
        _show(found)


def _lengths(text: str) -> list[int]:
    """The numbers of a list such as "16,64".

    Raises:
        InputError: It is something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise InputError(f"--lengths is {text!r}; it must be numbers of tokens, such as 16,64.")
    return list(dict.fromkeys(map(int, words)))


def _show(found: "Speeds") -> None:
    from rich.text import Text

    screen.console(sys.stdout).print(Text(found.headline))
    screen.write("\n")
    table = found.table()
    tables.table(table.header, table.rows, numbers=table.numbers)


def _data(model: str, found: "Speeds") -> dict[str, Any]:
    return {"model": model, "limits": vars(found.limits), "lengths": [asdict(speed) for speed in found]}
