"""What other programs on the same cores cost: a model alone, beside a busy neighbour, and beside itself.

python -m benchmarks.contention [CHECKPOINT] [--weights q4] [--seconds 1.5] [--rounds 3]

In each round a model decodes and reads prompts of 256 tokens for some seconds, alone; then with one core kept busy by a
program that does nothing else; then beside a second process that runs the same model. What is shown is the median over
the rounds, and the median of the ratios to the round's figure alone. A second model can leave half of the speed, and a
busy neighbour on one of two cores three quarters.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from benchmarks.models import options_of

PROMPT, CONTEXT = 256, 64
WORK = ("decode", "prefill")


def main() -> None:
    """Measure and print."""
    options = _options()
    context = multiprocessing.get_context("spawn")
    with _serving(context, options) as first, _serving(context, options) as second:
        rates: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for work in WORK:
                rates.setdefault((work, "alone"), []).append(_together([first], work, options.seconds)[0])
                with _neighbour(context):
                    rates.setdefault((work, "a busy neighbour"), []).append(
                        _together([first], work, options.seconds)[0]
                    )
                both = _together([first, second], work, options.seconds)
                rates.setdefault((work, "beside itself"), []).append(min(both))
    print(f"{options.weights}, {options.threads} threads each, tokens/s")
    for (work, how), found in rates.items():
        shares = [rate / alone for rate, alone in zip(found, rates[work, "alone"], strict=True)]
        print(f"{work:<10}{how:<20}{median(found):9.1f}{median(shares):8.2f}")


def _together(servers: list[Connection], work: str, seconds: float) -> list[float]:
    """Tokens per second of every server, all at once."""
    for server in servers:
        server.send((work, seconds))
    rates: list[float] = [server.recv() for server in servers]
    time.sleep(0.2)
    return rates


@contextmanager
def _serving(
    context: multiprocessing.context.SpawnContext, options: argparse.Namespace
) -> Iterator[Connection]:
    ours, theirs = context.Pipe()
    arguments = (theirs, options.checkpoint, options.weights, options.threads)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.recv() != "ready":
            raise RuntimeError("a model was not loaded")
        yield ours
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection, checkpoint: Path, weights: str, threads: int) -> None:
    import relax_llm as rl

    runner = rl.Runner(rl.compile(checkpoint, weights=weights), threads=threads)
    state = runner.start()
    runner.prefill(state, range(1, CONTEXT + 1))

    def decode() -> int:
        runner.decode(state, 1)
        state.truncate(CONTEXT)
        return 1

    def prefill() -> int:
        runner.prefill(runner.start(), range(1, PROMPT + 1))
        return PROMPT

    works: dict[str, Callable[[], int]] = {"decode": decode, "prefill": prefill}
    for work in works.values():
        work()
    connection.send("ready")
    while True:
        name, seconds = connection.recv()
        begun, tokens = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            tokens += works[name]()
        connection.send(tokens / (time.perf_counter() - begun))


@contextmanager
def _neighbour(context: multiprocessing.context.SpawnContext) -> Iterator[None]:
    process = context.Process(target=_spin, daemon=True)
    process.start()
    time.sleep(0.3)
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin() -> None:
    while True:
        pass


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="q4")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.5, help="for each figure")
    parser.add_argument("--rounds", type=int, default=3)
    return options_of(parser)


if __name__ == "__main__":
    main()
