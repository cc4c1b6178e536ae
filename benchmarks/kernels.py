"""Matrix products of real models, f32: this project's kernels beside OpenBLAS, MKL and oneDNN, and beside the limits.

python -m benchmarks.kernels [--quick] [--json] [--threads 1] [--rows 1 8 64] [--shapes NAME ...] [--rounds 5]

Everybody takes turns, each in a process of its own: in each round of a shape the speed of reading memory is measured,
then every number of rows by every peer. What is shown is the median over the rounds. Weights are taken in turns from
1 GiB of memory, as the layers of a model are: they never come from the caches of a core. On a machine whose last-level
cache holds a part of that, part of them may come from there; the speed of reading is measured over as much memory.

The clock of a processor falls under wide multiply-adds, the more so the more data moves with them. So the peak of the
registers is measured by our process directly after each of its kernels, at the clock that this one left behind.

`plan` is the kernel that the costs choose for the rows, `best` the fastest of ours; `x peer` is the plan's speed over
that of the fastest peer; `of limit` compares the plan with the larger of two times that no program can beat: the
multiply-adds at the peak of the registers, and the bytes at the speed of reading memory.
"""

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks.limits import LimitsProgram
from benchmarks.products import PEERS, Shape, Worker
from relax_llm import cpu

SHAPES = (
    Shape("SmolLM2-135M qkv", 960, 576),
    Shape("SmolLM2-135M o", 576, 576),
    Shape("SmolLM2-135M gate+up", 3072, 576),
    Shape("SmolLM2-135M down", 576, 1536),
    Shape("SmolLM2-135M head", 49152, 576),
    Shape("GPT-2 fc", 3072, 768),
    Shape("Llama-3.2-1B qkv", 3072, 2048),
    Shape("Llama-3.2-1B o", 2048, 2048),
    Shape("Llama-3.2-1B gate+up", 16384, 2048),
    Shape("Llama-3.2-1B down", 2048, 8192),
    Shape("Llama-3-8B qkv", 6144, 4096),
    Shape("Llama-3-8B o", 4096, 4096),
    Shape("Llama-3-8B gate+up", 28672, 4096),
    Shape("Llama-3-8B down", 4096, 14336),
)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
QUICK_SHAPES, QUICK_ROWS = (0, 1, 2, 3, 7, 9), (1, 4, 8, 16, 32, 64, 128, 512)
LONGEST = 60e9
"""Operations of one call at most, so that a run ends: large sizes of large shapes are left out."""


@dataclass(frozen=True)
class Row:
    """One line of the result; times in seconds, the median over the rounds.

    Attributes:
        shape: Which product.
        m: Rows.
        times: Of every kernel of everybody.
        planned: The kernel that the plan takes.
        best: Our fastest.
        ratio: The fastest peer's time over the plan's.
        of_limit: The time that no program can beat over the plan's.
    """

    shape: str
    m: int
    times: dict[str, float]
    planned: str
    best: str
    ratio: float
    of_limit: float


def main() -> None:
    """Measure and print."""
    options = _options()
    shapes = [shape for shape in SHAPES if not options.shapes or any(s in str(shape) for s in options.shapes)]
    if options.quick and not options.shapes:
        shapes = [SHAPES[index] for index in QUICK_SHAPES]
    rows = options.rows or (QUICK_ROWS if options.quick else ROWS)
    rounds = options.rounds or (3 if options.quick else 5)
    if not options.json:
        print(f"{cpu.name()}, {options.threads} thread(s), medians of {rounds} rounds; GFLOP/s")
    results: list[Row] = []
    with ExitStack() as stack:
        limits = stack.enter_context(LimitsProgram(options.threads))
        workers = {name: stack.enter_context(Worker(name, options.threads)) for name in PEERS}
        for shape in shapes:
            found = list(
                _measure(
                    shape, [m for m in rows if 2 * m * shape.n * shape.k <= LONGEST], rounds, limits, workers
                )
            )
            results += found
            if not options.json:
                _show(shape, found)
    if options.json:
        print(json.dumps([asdict(row) for row in results], indent=1))
    else:
        _summarize(results)


def _measure(
    shape: Shape, rows: Sequence[int], rounds: int, program: LimitsProgram, workers: dict[str, Worker]
) -> list[Row]:
    times: dict[int, dict[str, list[float]]] = {m: {} for m in rows}
    names: dict[str, list[str]] = {}
    for peer, worker in workers.items():
        try:
            names[peer] = worker.shape(shape)
        except ImportError as error:
            print(f"{peer} is left out: {error}")
    bytes_read: list[float] = []
    flops: dict[int, list[float]] = {m: [] for m in rows}
    for _ in range(rounds):
        bytes_read.append(program.measure().bytes)
        for m in rows:
            for peer, kernels in names.items():
                for kernel in kernels:
                    seconds = workers[peer].seconds(kernel, m, budget=0.02)
                    if seconds is not None:
                        times[m].setdefault(kernel, []).append(seconds)
                        if peer == "relax_llm":
                            flops[m].append(workers[peer].flops())
    speed = median(bytes_read)
    result = []
    for m in rows:
        middle = {kernel: median(of) for kernel, of in times[m].items()}
        ours = {kernel: time for kernel, time in middle.items() if kernel in names["relax_llm"]}
        others = [time for kernel, time in middle.items() if kernel not in ours]
        planned = workers["relax_llm"].planned(m)
        least = max(
            2 * m * shape.n * shape.k / median(flops[m]), (shape.bytes + 4 * m * (shape.n + shape.k)) / speed
        )
        result.append(
            Row(
                str(shape),
                m,
                middle,
                planned,
                min(ours, key=ours.__getitem__),
                min(others, default=math.nan) / ours[planned],
                least / ours[planned],
            )
        )
    return result


def _show(shape: Shape, rows: Sequence[Row]) -> None:
    if not rows:
        return
    kernels = list(dict.fromkeys(kernel for row in rows for kernel in row.times))
    print(f"\n{shape}")
    print(
        f"{'M':>5}"
        + "".join(f"{kernel:>10}" for kernel in kernels)
        + "   plan       best       x peer  of limit"
    )
    for row in rows:
        work = 2e-9 * row.m * shape.n * shape.k
        speeds = [f"{work / row.times[k]:10.1f}" if k in row.times else f"{'':>10}" for k in kernels]
        print(
            f"{row.m:>5}{''.join(speeds)}   {row.planned:<10} {row.best:<10} {row.ratio:6.2f} {row.of_limit:9.2f}",
            flush=True,
        )


def _summarize(rows: Sequence[Row]) -> None:
    mean = math.exp(sum(math.log(row.ratio) for row in rows) / len(rows))
    worst = min(rows, key=lambda row: row.ratio)
    below = [row for row in rows if row.ratio < 0.95]
    regret = max(row.times[row.planned] / row.times[row.best] for row in rows)
    print(
        f"\nOver the fastest peer: geometric mean {mean:.2f}, worst {worst.ratio:.2f} ({worst.shape}, M = {worst.m}), "
    )
    print(
        f"{len(below)} of {len(rows)} sizes below 0.95. The plan's kernel takes at most {regret:.2f} times our best "
        "one's time."
    )
    for name, part in (("M = 1", [r for r in rows if r.m == 1]), ("M >= 32", [r for r in rows if r.m >= 32])):
        if part:
            values = sorted(row.of_limit for row in part)
            print(f"{name}: of the limit {values[0]:.2f} at least, {median(values):.2f} in the middle")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few shapes and sizes: about a minute")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rows", type=int, nargs="+", help="values of M")
    parser.add_argument("--shapes", nargs="+", help="parts of the shapes' names")
    return parser.parse_args()


if __name__ == "__main__":
    main()
