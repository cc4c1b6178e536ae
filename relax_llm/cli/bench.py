"""`relax-llm bench`: how fast a model is on this machine."""

import sys
from dataclasses import asdict
from statistics import median
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
    beside: o.Beside = None,
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

    With --beside, models take turns, and the last table has the ratios within rounds: what a kernel of yours, a plan
    or a weight format is worth. Where cores of a virtual machine were moved meanwhile, which shows in how long a loop
    over them takes, two more tables tell these rounds apart. To compare with other engines, in the same minutes, run
    `python -m benchmarks.llm` in a checkout.
    """
    from relax_llm.runtime.speed import in_turns

    check_threads(threads)
    wanted = _lengths(lengths)
    given = o.limits_given(limits)
    names = [named_or_default(model), *(beside or [])]
    first = open_artifact(
        names[0],
        weights=weights,
        kv_cache=kv_cache,
        architecture=architecture,
        kernels=kernels,
        target=target,
    )
    runners = [start_runner(artifact, threads) for artifact in (first, *map(open_artifact, names[1:]))]
    found = in_turns(runners, wanted, decodes=decodes, rounds=rounds, limits=given, progress=Bars())
    if json:
        screen.json_document(_data(names, found))
    else:
        _show(names, found)


def _lengths(text: str) -> list[int]:
    """The numbers of a list such as "16,64".

    Raises:
        InputError: It is something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise InputError(f"--lengths is {text!r}; it must be numbers of tokens, such as 16,64.")
    return list(dict.fromkeys(map(int, words)))


def _show(names: list[str], found: list["Speeds"]) -> None:
    from rich.text import Text

    def caption(text: str) -> None:
        screen.write("\n")
        if len(names) > 1:
            screen.write(f"{text}\n")

    screen.console(sys.stdout).print(Text(found[0].headline))
    for name, speeds in zip(names, found, strict=True):
        caption(name)
        tables.show(speeds.table())
    places = found[0].places
    for name, speeds in zip(names[1:], found[1:], strict=True):
        caption(f"{name}, times as fast as {names[0]}, the median of the rounds")
        tables.show(speeds.beside(found[0]))
        for rounds in places if len(places) > 1 else []:
            loop = median(speeds.rounds[number].loop for number in rounds)
            caption(f"In the {len(rounds)} rounds in which a loop over all threads cost {loop * 1e6:.2f} us")
            tables.show(speeds.beside(found[0], rounds))


def _data(names: list[str], found: list["Speeds"]) -> dict[str, Any]:
    first, *others = [
        {"model": name, "lengths": [asdict(speed) for speed in speeds]}
        for name, speeds in zip(names, found, strict=True)
    ]
    rounds = [vars(limits) for limits in found[0].rounds]
    return {**first, "limits": vars(found[0].limits), "rounds": rounds, "beside": others}
