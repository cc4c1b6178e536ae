"""What control costs: a decode plainly, with kernels chosen by the host, counted, traced, and launch by launch.

python -m benchmarks.control [CHECKPOINT] [--context 64] [--rounds 51]

Everything is done in turns in one process, on one state; what is shown is the median over the rounds, and by how much
each way exceeds the plain one of its round, for each launch.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import relax_llm as rl
from benchmarks.models import options_of


def main() -> None:
    """Measure and print."""
    options = _options()
    artifact = rl.compile(options.checkpoint)
    runner, pinned = rl.Runner(artifact), rl.Runner(artifact, selection="pinned")
    state = runner.start()
    runner.prefill(state, range(1, options.context + 1))

    debugged = rl.Runner(artifact)
    debugged.breakpoints.add(operator="attention", where="kv_len>1000000")

    def stepped() -> None:
        for launch in runner.steps("decode", state, 1):
            launch.run()

    def left() -> None:
        steps = runner.steps("decode", state, 1)
        steps.step()
        steps.detach()

    ways: dict[str, tuple[Callable[[], AbstractContextManager[object]], Callable[[], object]]] = {
        "plain": (nullcontext, lambda: runner.decode(state, 1)),
        "the same plan, by the host": (lambda: runner.plan(artifact.plan), lambda: runner.decode(state, 1)),
        "pinned": (nullcontext, lambda: pinned.decode(state, 1)),
        "counted": (runner.counting, lambda: runner.decode(state, 1)),
        "traced": (runner.tracing, lambda: runner.decode(state, 1)),
        "traced and pinned": (pinned.tracing, lambda: pinned.decode(state, 1)),
        "launch by launch": (nullcontext, stepped),
        "past a breakpoint": (nullcontext, lambda: debugged.steps("decode", state, 1).run()),
        "begun, then natively": (nullcontext, left),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, (control, run) in ways.items():
            with control():
                begun = time.perf_counter()
                run()
                if turn:  # the first round makes machines and maps memory
                    seconds[name].append(time.perf_counter() - begun)
            state.truncate(options.context)
    launches = artifact.manifest.functions["decode"]
    choices = sum(launch.kernel in artifact.manifest.dispatchers for launch in launches)
    print(f"{len(launches)} launches, {choices} of them with a choice; decode after {options.context} tokens")
    for name, measured in seconds.items():
        pairs = zip(measured, seconds["plain"], strict=True)
        more = median(ours - plain for ours, plain in pairs) / len(launches) * 1e6
        print(f"{name:<28}{median(measured) * 1e3:8.2f} ms  {more:+6.2f} us a launch")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=51)
    return options_of(parser)


if __name__ == "__main__":
    main()
