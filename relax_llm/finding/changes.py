"""Two ways to run a model, and every way between them: some sites as in the one, all others as in the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any, Protocol

import numpy.typing as npt

from relax_llm.errors import InputError
from relax_llm.finding.beside import check_alike, pairs
from relax_llm.finding.workload import Workload
from relax_llm.plan.plan import Plan, parts_of
from relax_llm.runtime.control import Planned
from relax_llm.runtime.counts import Count, extent
from relax_llm.runtime.launch import Launch
from relax_llm.runtime.results import overwrite, results
from relax_llm.runtime.runner import Runner
from relax_llm.runtime.stepper import Steps

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Change:
    """A site that is served otherwise.

    Attributes:
        site: Where in the model.
        operator: What is computed there.
        good: The kernels that serve it the good way, with their sizes.
        bad: And the bad way.
    """

    site: str
    operator: str
    good: str
    bad: str

    def __str__(self) -> str:
        return f"{self.operator} at {self.site} by {self.bad}, and not {self.good}"


class Runs(Protocol):
    """Runs of one workload with some of the changes made."""

    @property
    def changes(self) -> tuple[Change, ...]:
        """All that can be made."""
        ...

    @property
    def stores_alike(self) -> bool:
        """Whether both ways read weights of one format."""
        ...

    def logits(self, changes: Sequence[Change]) -> list[Array]:
        """The logits of each call."""
        ...

    def holds(self, changes: Sequence[Change]) -> bool:
        """What the user's check says."""
        ...


@dataclass(frozen=True)
class Replanned:
    """One runner, by a good plan but for some sites, which a bad one serves.

    Attributes:
        runner: Of both.
        good: None: the artifact's own.
        bad: The other.
        work: What is run; every call is given the same tokens, those that the good plan finds likeliest.
        check: The user's.
    """

    runner: Runner
    good: Planned | None
    bad: Planned
    work: Workload
    check: Callable[[Runner], bool] | None
    stores_alike: bool = True

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """The sites where the plans launch different kernels in this workload."""
        with self._by(self.good):
            tokens = self._tokens
            good = _served(self.runner, lambda: self._work(tokens))
        with self._by(self.good), self._by(self.bad):
            bad = _served(self.runner, lambda: self._work(tokens))
        return tuple(
            Change(*place, _listed(counts), _listed(bad[place]))
            for place, counts in good.items()
            if place in bad and _which(counts) != _which(bad[place])
        )

    def logits(self, changes: Sequence[Change]) -> list[Array]:
        """See `Runs`."""
        with self._with(changes):
            return _logits(self.runner, self._tokens)

    def holds(self, changes: Sequence[Change]) -> bool:
        """See `Runs`."""
        assert self.check is not None
        with self._with(changes):
            return bool(self.check(self.runner))

    @cached_property
    def _tokens(self) -> tuple[tuple[int, ...], ...]:
        with self._by(self.good):
            return likeliest(self.runner, self.work)

    def _work(self, tokens: Sequence[tuple[int, ...]]) -> None:
        if self.check is not None:
            self.check(self.runner)
        else:
            _logits(self.runner, tokens)

    @contextmanager
    def _by(self, plan: Planned | None) -> Iterator[None]:
        if plan is None:
            yield
        else:
            with self.runner.plan(plan):
                yield

    @contextmanager
    def _with(self, changes: Sequence[Change]) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._by(self.good))
            for plan in self._parts({(change.site, change.operator) for change in changes}):
                stack.enter_context(self.runner.plan(plan))
            yield

    def _parts(self, places: set[tuple[str, str]]) -> Iterator[Planned]:
        """What the bad plan says of some sites, as plans."""
        if not places:
            return
        if isinstance(self.bad, Mapping):
            for pattern, kernel in self.bad.items():
                for site in sorted({site for site, _ in places}):
                    if any(fnmatchcase(part, pattern) for part in parts_of(site)) and self._has(site, kernel):
                        yield {site: kernel}
            return
        plan = self.bad if isinstance(self.bad, Plan) else Plan.read(self.bad)
        entries = [
            replace(entry, sites=tuple(site for site in entry.sites if (site, entry.operator) in places))
            for entry in plan.entries
        ]
        yield Plan(tuple(entry for entry in entries if entry.sites), plan.machine)

    def _has(self, site: str, kernel: str) -> bool:
        """Whether a kernel is one of a site's: a pattern may name many sites that do not have it."""
        try:
            with self.runner.plan({site: kernel}):
                return True
        except InputError:
            return False


class Exchanged:
    """Two artifacts: the right one runs, and at some sites the wrong one computes on its tensors."""

    def __init__(self, wrong: Runner, right: Runner, work: Workload) -> None:
        """Match their launches.

        Raises:
            InputError: They are different models, or have no launch in common.
        """
        check_alike(wrong, right)
        self._wrong, self._right = wrong, right
        self._tokens = likeliest(right, work)
        functions = ("prefill", "decode") if work.decodes else ("prefill",)
        ours, theirs = wrong.artifact.manifest, right.artifact.manifest
        self._pairs = {function: pairs(ours, theirs, function) for function in functions}
        good, bad = (_served(model, partial(_logits, model, self._tokens)) for model in (right, wrong))
        known: dict[Change, None] = {}
        for function, matched in self._pairs.items():
            for launch, at in zip(ours.functions[function], matched, strict=True):
                if at is not None:
                    operator = ours.kernels[launch.kernel].operator
                    place = launch.site, operator
                    known[Change(*place, _listed(good[place]), _listed(bad[place]))] = None
        self._changes = tuple(known)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every site that both have."""
        return self._changes

    @property
    def stores_alike(self) -> bool:
        """See `Runs`."""
        return self._wrong.artifact.manifest.weight_format == self._right.artifact.manifest.weight_format

    def holds(self, changes: Sequence[Change]) -> bool:
        """There is no check of the user's."""
        raise NotImplementedError

    def logits(self, changes: Sequence[Change]) -> list[Array]:
        """See `Runs`."""
        if not changes:
            return _logits(self._right, self._tokens)
        places = {(change.site, change.operator) for change in changes}
        ours, theirs = self._wrong.start(), self._right.start()
        found = []
        for number, tokens in enumerate(self._tokens):
            function, ids = ("decode", tokens[0]) if number else ("prefill", list(tokens))
            with (
                self._wrong.steps(function, ours, ids) as wrong,
                self._right.steps(function, theirs, ids) as right,
            ):
                found.append(self._exchanged(function, wrong, right, places))
        return found

    def _exchanged(self, function: str, wrong: Steps, right: Steps, places: set[tuple[str, str]]) -> Array:
        """One call; after each pair of launches both models hold the same tensors."""
        for launch, at in zip(wrong, self._pairs[function], strict=True):
            if at is None:
                continue  # it is run when the next one is asked for
            partner = _reach(right, at)
            source, target = (
                (launch, partner) if (launch.site, launch.operator) in places else (partner, launch)
            )
            source.run()
            target.skip()
            overwrite(target, [result.value for result in results(source)])
        wrong.finish()
        return right.finish()


def likeliest(runner: Runner, work: Workload) -> tuple[tuple[int, ...], ...]:
    """Run a workload, where each decode is given the token that is likeliest; the tokens of each call."""
    state, calls = runner.start(), [work.prompt]
    logits = runner.prefill(state, work.prompt)
    for _ in range(work.decodes):
        calls.append((int(logits.argmax()),))
        logits = runner.decode(state, calls[-1][0])
    return tuple(calls)


def _logits(runner: Runner, calls: Sequence[tuple[int, ...]]) -> list[Array]:
    state = runner.start()
    return [
        runner.decode(state, tokens[0]) if number else runner.prefill(state, tokens)
        for number, tokens in enumerate(calls)
    ]


def _reach(steps: Steps, index: int) -> Launch:
    for launch in steps:
        if launch.index == index:
            return launch
    raise AssertionError(f"{steps.function} has no launch {index}")


def _served(runner: Runner, work: Callable[[], Any]) -> dict[tuple[str, str], list[Count]]:
    """For each site and operator which kernels served it, and at which sizes."""
    with runner.counting() as counts:
        work()
    found: dict[tuple[str, str], list[Count]] = {}
    for row in counts.rows:
        found.setdefault((row.site, row.operator), []).append(row)
    return found


def _which(counts: Sequence[Count]) -> set[tuple[str, tuple[tuple[str, int], ...]]]:
    """Kernels and sizes, however often: a check may run the model more often where it likes what it sees."""
    return {(row.kernel, tuple(row.sizes.items())) for row in counts}


def _listed(counts: Sequence[Count]) -> str:
    """Kernels with the sizes they served: "tiled (M = 1), blocked (M = 20)"."""
    kernels: dict[str, list[Count]] = {}
    for row in counts:
        kernels.setdefault(row.kernel, []).append(row)
    return ", ".join(f"{name} ({extent(rows)})" for name, rows in kernels.items())
