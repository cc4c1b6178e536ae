"""`bisect`: of two ways to run a model, of which one is wrong, the kernels that make the difference, by halving."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from relax_llm.errors import InputError
from relax_llm.finding.changes import Change, Exchanged, Replanned, Runs
from relax_llm.finding.compare import Model, runner_of
from relax_llm.finding.ddmin import minimal
from relax_llm.finding.workload import DECODES, workload
from relax_llm.numerics import bounds
from relax_llm.numerics.difference import difference
from relax_llm.progress import Progress, Silent
from relax_llm.runtime.control import Planned
from relax_llm.runtime.runner import Runner

Array = npt.NDArray[Any]

MOST_RUNS = 200


@dataclass(frozen=True)
class Bisection:
    """Which kernels make a model wrong.

    Attributes:
        culprits: Groups of changes: each makes the result wrong by itself, and no change can be left out of it. A group
            of several is wrong only together.
        changes: How many sites are served otherwise.
        runs: How often the model was run.
        is_complete: Whether, with all culprits left out, the result was right.
        is_steady: Whether each culprit was wrong again when it was run again.
        off: How far the logits are from the good ones with all changes, as a share of the largest; NaN where a check of
            yours decides.
    """

    culprits: tuple[tuple[Change, ...], ...]
    changes: int
    runs: int
    is_complete: bool
    is_steady: bool
    off: float

    def __str__(self) -> str:
        lines = []
        for group in self.culprits:
            if len(group) == 1:
                lines.append(f"{group[0]}: it alone makes the result wrong.")
            else:
                lines.append(
                    f"{len(group)} changes make the result wrong together, and none can be left out:"
                )
                lines += [f"  {change}" for change in group]
        if not self.is_steady:
            lines.append(
                "What was found did not show again when it was run again: the difference does not reproduce, so do not "
                "trust it."
            )
        if not self.is_complete:
            lines.append("The result is still wrong without them: there are more that were not looked for.")
        lines.append(f"Found in {self.runs} runs, among {self.changes} sites that are served otherwise.")
        return "\n".join(lines)


class _Spent(Exception):  # noqa: N818 - no error: the runs are used up
    pass


class _Trial:
    """Runs with some of the changes made, each set once, and counts them."""

    def __init__(
        self, runs: Runs, judge: Callable[[Sequence[Change]], bool], most: int, advance: Any
    ) -> None:
        self.count = 0
        self._runs, self._judge, self._most, self._advance = runs, judge, most, advance
        self._known: dict[frozenset[Change], bool] = {}

    def fails(self, changes: Sequence[Change]) -> bool:
        """Whether the result is wrong with these changes; remembered."""
        key = frozenset(changes)
        if key not in self._known:
            self._known[key] = self.fails_now(changes)
        return self._known[key]

    def fails_now(self, changes: Sequence[Change]) -> bool:
        """The same, by a new run."""
        if self.count >= self._most:
            raise _Spent
        self.count += 1
        self._advance(1)
        return not self._judge(changes)


def bisect(
    subject: Model,
    other: Model | None = None,
    *,
    good: Planned | None = None,
    bad: Planned | None = None,
    check: Callable[[Runner], bool] | None = None,
    prompt: str | Sequence[int] | None = None,
    length: int | None = None,
    decodes: int = DECODES,
    bound: float | None = None,
    most_runs: int = MOST_RUNS,
    progress: Progress | None = None,
) -> Bisection:
    """Find the kernels that make a result wrong.

    ::

        rl.bisect("model", bad="bad.json")                       # one artifact, two plans; good: its own
        rl.bisect("model", good="a.json", bad="b.json", check=lambda runner: runner.generate("1, 2,").text == " 3")
        rl.bisect("wrong", "right")                              # two artifacts of one checkpoint

    With two plans, some sites are served by the bad one and all others by the good one; nothing is compiled. With two
    artifacts, the right one runs launch by launch, and at some sites the wrong one's kernel computes on its tensors.
    One guilty site among n is found in about 2 log2(n) runs.

    Args:
        subject: A runner, an artifact or the directory of one.
        other: Another one, which is right where the subject is wrong.
        good: A plan by which the subject is right: a plan, the path of one, or kernels by site. None: its own.
        bad: A plan by which it is wrong.
        check: Whether a runner's results are right. By default logits are compared with the good ones. Two plans only.
        prompt: Text or token ids; by default a sentence, or random tokens where there is no tokenizer.
        length: Instead of a prompt: so many random tokens.
        decodes: How many tokens are decoded after it.
        bound: How far logits may be off, as a share of the largest.
        most_runs: When to stop, with what has been found.
        progress: Where to report to.

    Raises:
        InputError: There are not two ways to run the model, or they do the same; the good one is wrong or the bad one
            right; or neither is the same twice.
        PlanError: A plan cannot be read, or wants what the library does not have.
    """
    runner = runner_of(subject)
    if (other is None) == (bad is None) or (other is not None and good is not None):
        raise InputError(
            "Name two ways to run the model: a bad plan and perhaps a good one, or another artifact."
        )
    if check is not None and other is not None:
        raise InputError("A check of your own asks one runner; with two artifacts logits are compared.")
    work = workload(runner, prompt, decodes, length)
    if other is not None:
        runs: Runs = Exchanged(runner, runner_of(other), work)
        if bound is None and not runs.stores_alike:
            raise InputError(
                "The two artifacts store weights in different formats, so each site differs a little; say with bound "
                "how far the logits may be off."
            )
    else:
        assert bad is not None
        runs = Replanned(runner, good, bad, work, check)
    with (progress or Silent()).task("Bisecting", _expected_runs(len(runs.changes))) as advance:
        return _bisected(
            runs, check is not None, bounds.LOGITS if bound is None else bound, most_runs, advance
        )


def _bisected(runs: Runs, has_check: bool, bound: float, most: int, advance: Any) -> Bisection:
    if not runs.changes:
        raise InputError(
            "Both ways launch the same kernels for this prompt, so neither can be to blame. Try another length."
        )
    right = [] if has_check else runs.logits(())

    def distance(logits: Sequence[Array]) -> float:
        return max(difference(ours, good).relative for ours, good in zip(logits, right, strict=True))

    off = [float("nan")]

    def judge(changes: Sequence[Change]) -> bool:
        if has_check:
            return runs.holds(changes)
        off.append(distance(runs.logits(changes)))
        return off[-1] <= bound

    trial = _Trial(runs, judge, most, advance)
    _check_ends(trial, runs.changes, bound, off)
    total = off[-1]
    left: tuple[Change, ...] = runs.changes
    groups: list[tuple[Change, ...]] = []
    steady, complete = True, False
    try:
        while left and trial.fails(left):
            group = minimal(left, trial.fails)
            groups.append(group)
            left = tuple(change for change in left if change not in group)
            steady = trial.fails_now(group) and steady
        complete = True
    except _Spent:
        if not groups:
            raise InputError(
                f"{trial.count} runs were not enough to tell one change from another: many contribute. Allow more "
                "runs, or raise the bound."
            ) from None
    return Bisection(tuple(groups), len(runs.changes), trial.count, complete, steady, total)


def _check_ends(trial: _Trial, changes: tuple[Change, ...], bound: float, off: list[float]) -> None:
    """Refuse what cannot be halved: a good end that is wrong, a bad one that is right, or either now this, now that."""
    good = [trial.fails_now(()) for _ in range(2)]
    bad = [trial.fails_now(changes) for _ in range(2)]
    trial.fails(changes)
    for name, ends in (("good", good), ("bad", bad)):
        if ends[0] != ends[1]:
            raise InputError(
                f"The {name} way is right in one run and wrong in the next: the difference does not reproduce, and "
                "halving would blame whatever was run at the time. Make it the same in each run first."
            )
    if good[0]:
        raise InputError(
            "The good way gives a wrong result itself, so there is nothing to tell them apart by."
        )
    if not bad[0]:
        far = "" if len(off) < 2 else f": its logits are off by {off[-1]:.1e}, where {bound:.1e} is allowed"
        raise InputError(f"The bad way gives a right result{far}. Lower the bound, or try another prompt.")


def _expected_runs(changes: int) -> int:
    return 7 + 2 * max(changes, 1).bit_length()
