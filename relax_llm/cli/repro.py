"""`relax-llm repro`: one launch of a model as a directory that anyone with TVM can run."""

import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relax_llm.cli import options as o, prompts, screen
from relax_llm.cli.models import check_threads, named_or_default, open_artifact, start_runner
from relax_llm.errors import InputError

if TYPE_CHECKING:
    from relax_llm.runtime.recording.replay import RecordedLaunch
    from relax_llm.runtime.runner import Output, Runner

_CHOICE, _OUTPUT = "The launch", "Output"
_OUTPUTS: "dict[str, Output]" = {"prefill": "last", "logits": "all", "hidden": "hidden"}


def repro(
    model: o.Subject = None,
    site: Annotated[
        str,
        typer.Option(
            "--site",
            metavar="SITE",
            help="Where in the model: layers.3.mlp.down_proj.",
            rich_help_panel=_CHOICE,
        ),
    ] = "",
    operator: Annotated[
        str,
        typer.Option(
            "--operator", metavar="NAME", help="Which, where the site has several.", rich_help_panel=_CHOICE
        ),
    ] = "*",
    function: Annotated[
        str,
        typer.Option(
            "--function",
            metavar="NAME",
            help="In which function: decode, prefill, logits or hidden.",
            rich_help_panel=_CHOICE,
        ),
    ] = "decode",
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel", metavar="NAME", help="Another kernel than the plan's.", rich_help_panel=_CHOICE
        ),
    ] = None,
    prompt: prompts.Prompt = prompts.DEFAULT,
    ids: prompts.Ids = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where to; by default repro-SITE.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    weights: o.Weights = None,
    architecture: o.Architecture = None,
    kernels: o.Kernels = None,
    target: o.Target = None,
    threads: o.Threads = None,
    debug: o.Debug = False,
) -> None:
    """Write the kernel, the tensors and some lines of Python that show one launch without this package."""
    check_threads(threads)
    if not site:
        raise InputError("Name a place in the model with --site; `relax-llm inspect --sites` lists them.")
    if function != "decode" and function not in _OUTPUTS:
        raise InputError(f"There is no function {function!r}; there are: decode, {', '.join(_OUTPUTS)}.")
    named = named_or_default(model)
    artifact = open_artifact(
        named, weights=weights, architecture=architecture, kernels=kernels, target=target
    )
    tokens = prompts.token_ids(named, artifact, prompt, ids=ids)
    runner = start_runner(artifact, threads)
    with tempfile.TemporaryDirectory(prefix="relax_llm_repro_") as directory:
        launch = _recorded(runner, Path(directory) / "launch.rec", site, operator, function, kernel, tokens)
        directory_made = output or Path(f"repro-{re.sub(r'[^0-9A-Za-z_.+-]+', '_', site)}")
        script = launch.repro(directory_made, artifact)
    screen.write(f"{launch}\n")
    for file in sorted(script.parent.iterdir()):
        screen.write(f"{file}  {file.stat().st_size:,} bytes\n")
    screen.hint(f"python {script}")


def _recorded(
    runner: "Runner",
    path: Path,
    site: str,
    operator: str,
    function: str,
    kernel: str | None,
    tokens: list[int],
) -> "RecordedLaunch":
    """Make one launch of a run, recorded.

    Raises:
        InputError: The site has several.
    """
    from relax_llm.runtime.recording.replay import replay

    state = runner.start()
    logits = runner.prefill(state, tokens) if function == "decode" else None
    forced = runner.force(site, kernel) if kernel is not None else nullcontext()
    with forced, runner.recording(path, site=site, operator=operator):
        if logits is not None:
            runner.decode(state, int(logits.argmax()))
        else:
            runner.prefill(state, tokens, _OUTPUTS[function])
    found = list(replay(path))
    if len(found) > 1:
        listed = ", ".join(f"{launch.operator} at {launch.site}" for launch in found[:5])
        raise InputError(
            f"{function} makes {len(found)} launches at {site!r}, as {listed}; name one site, and its --operator."
        )
    return found[0]
