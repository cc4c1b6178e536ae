"""How near launches come to the machine's limits in the middle of a model: products of prompts, attention of tokens.

python -m benchmarks.launches [CHECKPOINT] [--weights f32 bf16 q8 q4] [--prompts 64 128 256 512 1024]
                              [--contexts 1000 2000] [--rounds 15]

Formats take turns in one process, and before and behind each turn the limits are measured. Of products the share of the
limit is printed, of attention how many times as long it takes as reading its cache: medians over the rounds. The cores
of a virtual machine may be moved meanwhile: turns are told apart by whether these were near each other, which shows in
what a loop over them costs, and those in which that changed are left out.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

import numpy as np

import relax_llm as rl
from benchmarks.models import options_of
from relax_llm.tracing.limits import Limits
from relax_llm.tracing.trace import TracedLaunch

_TOKENS = 6  # of a turn that are traced
_WARM = 3  # tokens, or prompts, before what is traced: for caches and threads
_FAR = 0.7e-6  # seconds that a loop over two cores costs: 0.4 us where they share a cache, 1 us where they do not

Launches: TypeAlias = Sequence[TracedLaunch]


@dataclass(frozen=True)
class _Turn:
    launches: Launches
    limits: Limits  # the mean of before and behind
    where: str  # the cores were: "near" or "far", or "moved" from one to the other


def main() -> None:
    """Measure and print."""
    options = _options()
    runners = {
        weights: rl.Runner(rl.compile(options.checkpoint, weights=weights)) for weights in options.weights
    }
    print("Products of layers in prompts, in shares of the limit")
    print("weights   tokens   cores   turns     all   each kind")
    for tokens in options.prompts:
        turns = _in_turns(runners, options.rounds, tokens, _prompt)
        for weights, where, found in _by_place(turns):
            shares = _shares(found)
            row = "   ".join(f"{name} {share:.0%}" for name, share in shares.items())
            print(f"{weights:<10}{tokens:6}   {where:<6}{len(found):7}   {row}", flush=True)
    print("\nAttention of a token, beside reading its cache once")
    print("weights   cache   context   cores   turns   attention   reading once    ratio   its quartiles")
    for context in options.contexts:
        turns = _in_turns(runners, options.rounds, context, _tokens)
        for weights, where, found in _by_place(turns):
            cache = runners[weights].artifact.manifest.caches[0].format
            row = _beside_reading(found)
            print(f"{weights:<10}{cache:<8}{context:7}   {where:<6}{len(found):7}{row}", flush=True)


def _in_turns(
    runners: Mapping[str, rl.Runner],
    rounds: int,
    tokens: int,
    traced: Callable[[rl.Runner, rl.State], Launches],
) -> dict[str, list[_Turn]]:
    states = {weights: _filled(runner, tokens) for weights, runner in runners.items()}
    turns = defaultdict(list)
    for number in range(rounds):
        for weights in runners if number % 2 else reversed(list(runners)):
            runner = runners[weights]
            before = runner.limits(anew=True)
            launches = traced(runner, states[weights])
            around = (before, runner.limits(anew=True))
            far = {limits.loop > _FAR for limits in around}
            where = "moved" if len(far) > 1 else "far" if far.pop() else "near"
            turns[weights].append(_Turn(launches, Limits.middle(around), where))
    return turns


def _by_place(turns: Mapping[str, Sequence[_Turn]]) -> Iterable[tuple[str, str, list[_Turn]]]:
    for weights, all_of_them in turns.items():
        for where in ("near", "far"):
            if found := [turn for turn in all_of_them if turn.where == where]:
                yield weights, where, found


def _filled(runner: rl.Runner, tokens: int) -> rl.State:
    state = runner.start()
    runner.prefill(state, np.random.default_rng(0).integers(0, runner.vocab_size, tokens, np.int32))
    return state


def _prompt(runner: rl.Runner, state: rl.State) -> Launches:
    """Products of layers, but those of the last token alone."""
    for _ in range(_WARM):
        runner.prefill(runner.start(), state.tokens)
    with runner.tracing() as trace:
        runner.prefill(runner.start(), state.tokens)
    return [one for one in trace.launches if one.operator == "matmul" and one.sizes["M"] == state.length]


def _tokens(runner: rl.Runner, state: rl.State) -> Launches:
    length = state.length
    for _ in range(_WARM):
        runner.decode(state, 0)
    with runner.tracing() as trace:
        for _ in range(_TOKENS):
            runner.decode(state, 0)
    state.truncate(length)
    return [launch for launch in trace.launches if launch.operator == "attention"]


def _shares(turns: Sequence[_Turn]) -> dict[str, float]:
    """The share of the limit of all launches, and of those of each kind of site."""
    found = defaultdict(list)
    for turn in turns:
        least: dict[str, float] = defaultdict(float)
        taken: dict[str, float] = defaultdict(float)
        for launch in turn.launches:
            for kind in ("", launch.site.rpartition(".")[2]):
                least[kind] += turn.limits.seconds(launch.flops, launch.bytes, launch.products)
                taken[kind] += launch.duration
        for kind in taken:
            found[kind].append(least[kind] / taken[kind])
    return {kind: median(shares) for kind, shares in found.items()}


def _beside_reading(turns: Sequence[_Turn]) -> str:
    times = [(median(x.duration for x in t.launches), t.launches[0].bytes / t.limits.bytes) for t in turns]
    taken, reading = (1e6 * median(column) for column in zip(*times, strict=True))
    low, middle, high = np.quantile([there / here for there, here in times], (0.25, 0.5, 0.75))
    return f"{taken:9.1f} us{reading:12.1f} us{middle:9.2f}   {low:.2f} to {high:.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", nargs="+", default=["f32", "bf16", "q8", "q4"])
    parser.add_argument("--prompts", type=int, nargs="*", default=[64, 128, 256, 512, 1024], help="tokens")
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[1000, 2000], help="tokens that are attended to"
    )
    parser.add_argument("--rounds", type=int, default=15)
    return options_of(parser)


if __name__ == "__main__":
    main()
