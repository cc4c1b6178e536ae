"""Every operator's kernel on the problems of real models, beside what the machine can do at most.

python -m benchmarks.operators [--operators norm attention] [--threads 2] [--rounds 7] [--json]

Problems, inputs and costs come from the operators' records (`relax_llm.kernels.operators`). In each round the machine's
limits are measured, then every launch; what is shown is the median over the rounds. `of limit` compares a launch with
the larger of two times that no program can beat: its flops at the peak of multiply-adds, and its bytes at the speed of
reading memory. Inputs stay in the caches, so a small launch may move its bytes faster than memory does: above 100 %.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.limits import LimitsProgram
from relax_llm import cpu
from relax_llm.artifact.formulas import evaluate
from relax_llm.artifact.memory import aligned

SIZES: tuple[Mapping[str, int], ...] = (
    {"batch": 1, "seq": 1, "kv_len": 128},
    {"batch": 1, "seq": 1, "kv_len": 2048},
    {"batch": 1, "seq": 64, "kv_len": 64},
    {"batch": 1, "seq": 512, "kv_len": 512},
)
_BATCH = 2e-3  # Seconds that are timed at once, at least.


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        problem: What was solved.
        sizes: At which sizes.
        seconds: A launch, the median.
        flops: Operations in a second.
        bytes: Bytes in a second.
        of_limit: The time that no program can beat over this one.
    """

    problem: str
    sizes: Mapping[str, int]
    seconds: float
    flops: float
    bytes: float
    of_limit: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operators", description="Kernels against limits."
    )
    parser.add_argument("--operators", nargs="+", help="which; by default all")
    parser.add_argument("--threads", type=int, default=cpu.cores())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    rows = list(_measured(options.operators, options.threads, options.rounds))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(f"{'problem':44} {'at':32} {'us':>9} {'GFLOP/s':>8} {'GB/s':>7} {'of limit':>8}")
    for row in rows:
        at = ", ".join(f"{name}={size}" for name, size in row.sizes.items() if name != "batch")
        print(
            f"{row.problem:44} {at:32} {row.seconds * 1e6:9.1f} {row.flops / 1e9:8.1f} {row.bytes / 1e9:7.1f} "
            f"{row.of_limit:8.0%}"
        )


def _measured(names: list[str] | None, threads: int, rounds: int) -> Iterator[Row]:
    from relax_llm.kernels.operators import OPERATORS

    for record in OPERATORS.values():
        if names is not None and record.name not in names:
            continue
        for problem in record.benchmarks:
            cases = {}
            for sizes in SIZES:
                used = {size: sizes[size] for size in ("batch", "seq", "kv_len")}
                if "kv_len" not in record.axes:
                    used.pop("kv_len")
                cases[tuple(used.items())] = _launch(record, problem, used)
            with LimitsProgram(threads) as program:
                seconds: dict[Any, list[float]] = {case: [] for case in cases}
                limits = []
                for _ in range(rounds):
                    limits.append(program.measure())
                    for case, launch in cases.items():
                        seconds[case].append(_timed(launch))
            peak, speed = median(each.flops for each in limits), median(each.bytes for each in limits)
            for case, times in seconds.items():
                known = {"kv_len": 1, **dict(case)}
                flops, moved = evaluate(problem.flops, known), evaluate(problem.bytes, known)
                took = median(times)
                least = max(flops / peak, moved / speed)
                yield Row(problem.name, dict(case), took, flops / took, moved / took, least / took)


def _launch(record: Any, problem: Any, sizes: dict[str, int]) -> Callable[[], object]:
    """A kernel bound to random inputs."""
    import tvm_ffi

    from relax_llm.kernels.forms import realize
    from relax_llm.kernels.generate import generate
    from relax_llm.kernels.library import build, built_in
    from relax_llm.kernels.machine import machine
    from relax_llm.kernels.points import all_sizes
    from relax_llm.kernels.threads import load

    here = machine()
    function = load(generate({problem.name: build(problem, here)}, here))[problem.name]
    every = {**all_sizes(record, sizes)}
    values = record.inputs(problem, every, np.random.default_rng(0), False)
    layout = None
    if record.name == "matmul":
        layout = realize(built_in(problem, here)[0], problem, here).layout
        values["weight"] = layout.pack(values["weight"]) if layout else values["weight"]
    arguments: list[Any] = []
    for operand in record.launched(problem, layout):
        if not operand.is_tensor:
            arguments.append(every[operand.name])
        else:
            shape = operand.at(every)
            array = aligned(shape, operand.dtype)
            array[...] = values[operand.name].reshape(shape) if operand.name in values else 0
            arguments.append(tvm_ffi.from_dlpack(array))
    return lambda: function(*arguments)


def _timed(launch: Callable[[], object]) -> float:
    """Seconds of a launch, of as many as fill a batch."""
    launch()
    count = 1
    while True:
        began = time.perf_counter()
        for _ in range(count):
            launch()
        took = time.perf_counter() - began
        if took >= _BATCH:
            return took / count
        count = max(2 * count, int(1.2 * count * _BATCH / max(took, 1e-7)))


if __name__ == "__main__":
    main()
