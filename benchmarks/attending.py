"""What attention of a token costs beside reading its keys and values once, launch by launch, in the middle of a token.

python -m benchmarks.attending [CHECKPOINT] [--weights f32 bf16 q8 q4] [--contexts 1000 2000] [--rounds 15]

Formats take turns in one process, and before and behind each turn memory's speed is measured: what is printed are
medians over the rounds of the time of a launch, and of how many times as long it is as reading takes. The cores of a
virtual machine may be moved meanwhile: turns are told apart by whether these were near each other, which a loop shows
in which there is nothing to do, and those in which that changed are left out.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

import numpy as np

import relax_llm as rl
from benchmarks.models import options_of
from relax_llm.tracing.trace import TracedLaunch

_TOKENS = 6  # of a turn that are traced
_WARM = 3  # and before them, for caches and threads
_FAR = (
    0.7e-6  # seconds of an empty loop over two cores: 0.4 us where they share a cache, 1 us where they do not
)


def main() -> None:
    """Measure and print."""
    options = _options()
    runners = {
        weights: rl.Runner(rl.compile(options.checkpoint, weights=weights)) for weights in options.weights
    }
    print("weights   cache   context   cores   turns   attention   reading once    ratio   its quartiles")
    for context in options.contexts:
        turns: dict[str, list[_Turn]] = {weights: [] for weights in runners}
        states = {weights: _filled(runner, context) for weights, runner in runners.items()}
        for number in range(options.rounds):
            for weights in runners if number % 2 else reversed(runners):
                turns[weights].append(_turn(runners[weights], states[weights]))
        for weights, runner in runners.items():
            for where in ("near", "far"):
                if found := [turn for turn in turns[weights] if turn.where == where]:
                    cache = runner.artifact.manifest.caches[0].format
                    print(
                        f"{weights:<10}{cache:<8}{context:7}   {where:<6}{len(found):7}{_row(found)}",
                        flush=True,
                    )


@dataclass(frozen=True)
class _Turn:
    taken: float  # seconds of a launch
    reading: float  # and of reading what it reads
    where: str  # the cores were: "near" or "far", or "moved" from one to the other


def _row(turns: Sequence[_Turn]) -> str:
    taken, reading = (1e6 * median(getattr(turn, name) for turn in turns) for name in ("taken", "reading"))
    low, middle, high = np.quantile([turn.taken / turn.reading for turn in turns], (0.25, 0.5, 0.75))
    return f"{taken:9.1f} us{reading:12.1f} us{middle:9.2f}   {low:.2f} to {high:.2f}"


def _filled(runner: rl.Runner, context: int) -> rl.State:
    state = runner.start()
    runner.prefill(state, np.random.default_rng(0).integers(0, runner.vocab_size, context, np.int32))
    return state


def _turn(runner: rl.Runner, state: rl.State) -> _Turn:
    before = runner.limits(anew=True)
    launches = _traced(runner, state)
    around = (before, runner.limits(anew=True))
    far = {limits.loop > _FAR for limits in around}
    where = "moved" if len(far) > 1 else "far" if far.pop() else "near"
    speed = mean(limits.bytes for limits in around)
    return _Turn(median(launch.duration for launch in launches), launches[0].bytes / speed, where)


def _traced(runner: rl.Runner, state: rl.State) -> list[TracedLaunch]:
    length = state.length
    for _ in range(_WARM):
        runner.decode(state, 0)
    with runner.tracing() as trace:
        for _ in range(_TOKENS):
            runner.decode(state, 0)
    state.truncate(length)
    return [launch for launch in trace.launches if launch.operator == "attention"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", nargs="+", default=["f32", "bf16", "q8", "q4"])
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[1000, 2000], help="tokens that are attended to"
    )
    parser.add_argument("--rounds", type=int, default=15)
    return options_of(parser)


if __name__ == "__main__":
    main()
