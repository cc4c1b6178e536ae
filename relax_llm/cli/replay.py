"""`relax-llm replay`: make recorded launches again, and compare."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relax_llm.cli import options as o, screen, tables
from relax_llm.cli.models import check_threads, open_artifact
from relax_llm.errors import InputError

if TYPE_CHECKING:
    from relax_llm.artifact.artifact import Artifact
    from relax_llm.runtime.recording.replay import RecordedLaunch


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `relax-llm record` wrote.")],
    beside: Annotated[
        str | None,
        typer.Option(
            "--with",
            metavar="MODEL",
            help="Run the kernels of this artifact; by default of the one recorded.",
        ),
    ] = None,
    site: Annotated[str, typer.Option("--site", metavar="PATTERN", help="Only these sites.")] = "*",
    kernel: Annotated[
        str | None,
        typer.Option("--kernel", metavar="NAME", help="Another kernel; by default the one recorded."),
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Time each launch, too.")] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="With --time: clear the processor's caches before each launch.")
    ] = False,
    repeat: Annotated[int, typer.Option("--repeat", metavar="N", help="With --time: launches.")] = 20,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Make recorded launches again, and say how far what they give is from what was recorded."""
    from relax_llm.runtime import vm
    from relax_llm.runtime.recording.replay import replay as open_recording

    check_threads(threads)
    if repeat < 1:
        raise InputError(f"--repeat is {repeat}; it must be 1 or above.")
    if cold and not time:
        raise InputError("--cold goes with --time.")
    recording = open_recording(file)
    artifact = open_artifact(beside) if beside is not None else recording.artifact
    if threads is not None:
        vm.set_threads(threads)
    chosen = [launch for launch in recording if fnmatchcase(launch.site, site)]
    if not chosen:
        sites = ", ".join(list(dict.fromkeys(launch.site for launch in recording))[:5])
        raise InputError(f"{file} has no launch at {site!r}; its sites are {sites}.")
    rows = [_made(launch, artifact, kernel, repeat if time else 0, cold=cold) for launch in chosen]
    if json:
        screen.json_document({"recording": str(file), "artifact": str(artifact.path), "launches": rows})
        return
    header = ["launch", "site", "operator", "kernel", "sizes", "differs by", "ULP", *(["us"] if time else [])]
    lines = []
    for row in rows:
        apart = ("0", "0") if row["equal"] else (f"{row['max_abs']:.3g}", f"{row['ulp']:,.0f}")
        shown = [row["launch"], row["site"], row["operator"], row["kernel"], row["sizes"], *apart]
        lines.append([*shown, f"{row['seconds'] * 1e6:.1f}"] if time else shown)
    tables.table(header, lines, numbers=(5, 6, 7))
    different = sum(not row["equal"] for row in rows)
    screen.write(
        f"\n{len(rows)} launches, {f'{different} differ' if different else 'all equal bit for bit'}\n"
    )


def _made(
    launch: "RecordedLaunch", artifact: "Artifact", kernel: str | None, repeat: int, *, cold: bool
) -> dict[str, Any]:
    checked = launch.check(artifact, kernel=kernel)
    row = {
        "launch": f"{launch.made.call}:{launch.function}[{launch.made.index}]",
        "site": launch.site,
        "operator": launch.operator,
        "kernel": checked.kernel,
        "sizes": launch.shown_sizes,
        "equal": checked.equal,
        "max_abs": checked.max_abs,
        "ulp": checked.ulp,
    }
    if repeat:
        row["seconds"] = launch.time(artifact, kernel=kernel, repeat=repeat, cold=cold)
    return row
