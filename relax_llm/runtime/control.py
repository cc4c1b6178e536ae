"""Choosing kernels while a model runs, and counting what was launched. Off, nothing of this is in the way.

A controlled run is that of a second virtual machine over the same library and tensors, in whose program each
dispatcher has given way to its open form. That form asks a function of this process which kernel to run: this one.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, get_args, overload

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.costs import own_sizes
from relax_llm.artifact.manifest import Launch
from relax_llm.errors import ArtifactError, InputError
from relax_llm.plan.kernel import AXES, Selection
from relax_llm.plan.plan import Plan
from relax_llm.plan.sizes import Box
from relax_llm.runtime import choices, counts
from relax_llm.runtime.choices import Fixed, Key, Layer, Part, Place, Rule
from relax_llm.runtime.counts import Counts
from relax_llm.runtime.dispatch import OPEN, Run, answer, asking
from relax_llm.runtime.vm import VirtualMachine

Planned = Plan | str | os.PathLike[str] | Mapping[str, str]

_SIZES = ("batch", "seq", "kv_len")


class Forced:
    """A kernel that serves some sites until this is taken back: by `runner.force(site, None)`, or as a context.

    Its text says where and for which sizes; other sizes are served as before.
    """

    def __init__(self, text: str, take_back: Callable[[], None]) -> None:
        """Remember how to end it."""
        self._text, self._take_back = text, take_back

    def __enter__(self) -> "Forced":
        return self

    def __exit__(self, *_: object) -> None:
        self._take_back()

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return self._text


@dataclass(frozen=True)
class Line:
    """A function's launches in program order.

    Attributes:
        launches: What the manifest says of each, and where it is: a place with a choice, or one without.
    """

    launches: tuple[tuple[Launch, Place | Fixed], ...]

    @cached_property
    def chosen(self) -> tuple[Place, ...]:
        """The launches that have a choice."""
        return tuple(where for _, where in self.launches if isinstance(where, Place))

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """The functions of the library that they call."""
        return tuple(launch.kernel for launch, _ in self.launches)

    @cached_property
    def sized(self) -> tuple[list[bool], ...]:
        """Which arguments of each launch are sizes."""
        return tuple([one.role == "size" for one in launch.arguments] for launch, _ in self.launches)

    @cached_property
    def fixed(self) -> tuple[tuple[Launch, Fixed], ...]:
        """The launches that have none."""
        return tuple((launch, where) for launch, where in self.launches if isinstance(where, Fixed))


class Control:
    """What a runner was asked to do otherwise than its plan says."""

    def __init__(self, artifact: Artifact, machine: VirtualMachine, selection: Selection, lock: Lock) -> None:
        """Nothing is asked for but the selection.

        Args:
            artifact: What is run.
            machine: That of plain runs.
            selection: "dynamic": the plan chooses by size; "pinned": one kernel at each site, whatever the size.
            lock: Held while a function runs.

        Raises:
            InputError: The selection is unknown.
            ArtifactError: Pinned: a site has no kernel that is valid for every size.
        """
        if not isinstance(selection, str) or selection not in get_args(Selection):
            raise InputError(f'selection must be "dynamic" or "pinned", not {selection!r}.')
        self.selection = selection
        self._artifact = artifact
        self._machine = machine
        self._lock = lock
        self._places = choices.places(artifact)
        self._plans: list[Layer] = []
        self._forces: list[Layer] = []
        self._counting: list[Counts] = []
        self._functions: dict[str, Callable[..., Any]] = {}
        self._lines: dict[str, Line] = {}
        self._rules: dict[str, list[Rule]] = {}
        if selection == "pinned":
            without = [place.site for place in self._places.values() if place.pinned is None]
            if without:
                raise ArtifactError(
                    f"No kernel at {without[0]} is valid for every size, which pinned selection needs; compile with a "
                    "kernel that is."
                )
            self._prepare()

    @property
    def artifact(self) -> Artifact:
        """What is run."""
        return self._artifact

    @property
    def active(self) -> bool:
        """Whether a call must go by here."""
        return self.chooses or bool(self._counting)

    @property
    def is_counting(self) -> bool:
        """Whether anybody counts launches."""
        return bool(self._counting)

    @property
    def chooses(self) -> bool:
        """Whether kernels may be others than the artifact's plan has."""
        return bool(self._forces or self._plans or (self.selection == "pinned" and self._places))

    @overload
    def force(self, site: str, kernel: str) -> Forced: ...
    @overload
    def force(self, site: str, kernel: None) -> None: ...
    def force(self, site: str, kernel: str | None) -> Forced | None:
        """See `Runner.force`."""
        if kernel is None:
            there, _ = choices.matching(site, self._places, self._fixed())
            with self._lock:
                for layer in self._forces:
                    for place in there:
                        layer.pop(place.key, None)
                self._changed()
            return None
        layer = choices.forced(site, kernel, self._places, self._fixed())
        text = _forced_text(kernel, [self._places[key] for key in layer])
        with self._lock:
            self._prepare()
            self._forces.append(layer)
            self._changed()
        return Forced(text, lambda: self._take_back(layer))

    @contextmanager
    def plan(self, plan: Planned) -> Iterator[None]:
        """See `Runner.plan`."""
        layer = self._layer(plan)
        with self._lock:
            self._prepare()
            self._plans.append(layer)
            self._changed()
        try:
            yield
        finally:
            self._take_back(layer)

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """See `Runner.counting`."""
        counted = Counts()
        with self._lock:
            self._prepare()
            self._counting.append(counted)
        try:
            yield counted
        finally:
            with self._lock:
                self._counting = [other for other in self._counting if other is not counted]

    def call(self, function: str, sizes: Mapping[str, int], *arguments: Any) -> Any:
        """Call a function under control; the lock is the caller's to hold.

        Args:
            function: Its name.
            sizes: Its batch, seq and kv_len, for the counts.
            arguments: As the function takes them.
        """
        return self.told(
            self.line(function), self.rules(function), sizes, lambda: self._functions[function](*arguments)
        )

    def told(
        self, line: Line, rules: Sequence[Rule], sizes: Mapping[str, int], work: Callable[[], Any]
    ) -> Any:
        """Do what calls open dispatchers, tell them which kernels to run, and count; the lock is the caller's to hold.

        Args:
            line: What it launches.
            rules: What chooses the kernels of those launches that have a choice.
            sizes: The call's batch, seq and kv_len, for the counts.
            work: What is done.
        """
        ended = False
        with asking(rules) as run:
            try:
                result = work()
                ended = True
                return result
            finally:
                self.count(lambda: _keys(line, run, sizes if ended else None))

    def count(self, keys: Callable[[], Iterable[counts.Key]]) -> None:
        """Count launches, where anybody does."""
        if self._counting:
            made = list(keys())
            for counted in self._counting:
                counted.add(made)

    def _layer(self, plan: Planned) -> Layer:
        if isinstance(plan, Mapping):
            layer: Layer = {}
            for site, kernel in plan.items():
                layer |= choices.forced(site, kernel, self._places, self._fixed())
            return layer
        if not isinstance(plan, Plan):
            plan = Plan.read(plan)
        return choices.planned(plan, self._artifact.plan, self._places, self._fixed())

    def _take_back(self, layer: Layer) -> None:
        with self._lock:
            self._forces = [other for other in self._forces if other is not layer]
            self._plans = [other for other in self._plans if other is not layer]
            self._changed()

    def _changed(self) -> None:
        self._forces = [layer for layer in self._forces if layer]
        self._rules.clear()

    def _prepare(self) -> None:
        """Make the second machine, once."""
        if self._functions:
            return
        program = self._machine.program
        for function in self._artifact.manifest.functions:
            called = [
                name for _, name in program.calls(function) if name in self._artifact.manifest.dispatchers
            ]
            if called != [place.symbol for place in self.line(function).chosen]:
                raise ArtifactError(
                    f"{self._artifact.path}: {function} calls other dispatchers than the manifest says; compile again."
                )
        answer()
        machine = self._machine.executing(
            program.renamed({symbol: symbol + OPEN for _, symbol in self._places})
        )
        self._functions = {name: machine[name] for name in self._artifact.manifest.functions}

    @property
    def lines(self) -> dict[str, Line]:
        """The launches of every function, by its name."""
        return {name: self.line(name) for name in self._artifact.manifest.functions}

    def line(self, function: str) -> Line:
        """The launches of a function.

        Raises:
            ArtifactError: The manifest launches a kernel that it does not describe.
        """
        if function not in self._lines:
            manifest = self._artifact.manifest
            names = _single_kernels(self._artifact.plan)
            launches: list[tuple[Launch, Place | Fixed]] = []
            for launch in manifest.functions[function]:
                place = self._places.get((launch.site, launch.kernel))
                if place is not None:
                    launches.append((launch, place))
                    continue
                if launch.kernel not in manifest.kernels:
                    raise ArtifactError(
                        f"{self._artifact.path}: the manifest launches {launch.kernel}, but does not describe it; "
                        "compile the artifact again."
                    )
                operator = manifest.kernels[launch.kernel].operator
                kernel = names.get((launch.site, operator), launch.kernel)
                launches.append((launch, Fixed(launch.site, operator, kernel)))
            self._lines[function] = Line(tuple(launches))
        return self._lines[function]

    def rules(self, function: str) -> list[Rule]:
        """What now chooses the kernel of each launch of a function that has a choice; the lock is the caller's."""
        if function not in self._rules:
            self._rules[function] = self._made_rules(function)
        return self._rules[function]

    def _fixed(self) -> list[Fixed]:
        """Every launch without a choice, once."""
        return list(dict.fromkeys(one for line in self.lines.values() for _, one in line.fixed))

    def tokens_alike(self) -> int | None:
        """See `Runner.tokens_alike`."""
        with self._lock:
            kinds = {(place.symbol, self._parts(place)): place for place in self._places.values()}
        found = [choices.tokens_alike(place, parts) for (_, parts), place in kinds.items()]
        return min((most for most in found if most is not None), default=None)

    def _made_rules(self, function: str) -> list[Rule]:
        """The rule of each launch of a function that has a choice; launches that choose alike share theirs."""
        shared: dict[tuple[str, tuple[Part, ...]], Rule] = {}
        rules = []
        for place in self.line(function).chosen:
            key = place.symbol, self._parts(place)
            rules.append(shared.setdefault(key, Rule(*key)))
        return rules

    def _parts(self, place: Place) -> tuple[Part, ...]:
        """What serves each size at a place: the first that holds it counts."""
        parts = [part for layer in self._above() for part in layer.get(place.key, ())]
        if self.selection == "pinned" and place.pinned is not None:
            parts.append(place.part(Box(), place.pinned))
        return (*parts, *place.planned)

    def _above(self) -> Iterator[Layer]:
        """The layers from the top: what is forced, then other plans, the latest first."""
        yield from reversed(self._forces)
        yield from reversed(self._plans)


def _keys(line: Line, run: Run, sizes: Mapping[str, int] | None) -> list[counts.Key]:
    """What a run launched. A function is one straight line: when it ended, so did all without a choice."""
    keys = [
        (place.site, place.operator, place.kernels[index][0], tuple(zip(place.axes, given, strict=True)))
        for place, (index, given) in zip(line.chosen, run.served, strict=False)
    ]
    if sizes is not None:
        keys += [
            (one.site, one.operator, one.kernel, sizes_of(one.operator, launch, sizes))
            for launch, one in line.fixed
        ]
    return keys


def _single_kernels(plan: Plan) -> dict[Key, str]:
    """The kernels of entries that have only one, by site and operator."""
    return {
        (site, entry.operator): entry.ranges[0].kernel
        for entry in plan.entries
        for site in entry.sites
        if len({part.kernel for part in entry.ranges}) == 1
    }


def sizes_of(operator: str, launch: Launch, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The sizes by which kernels of an operator are told apart, as a launch has them in a call."""
    own = own_sizes(operator, launch, sizes)
    return tuple((axis, own[axis]) for axis in AXES.get(operator, _SIZES))


def _forced_text(kernel: str, places: Sequence[Place]) -> str:
    """What `Runner.force` did, as a sentence."""
    sites = list(dict.fromkeys(place.site for place in places))
    where = sites[0] if len(sites) == 1 else f"{len(sites)} sites, {sites[0]} to {sites[-1]}"
    valid = dict.fromkeys(str(sizes) for place in places for name, sizes in place.kernels if name == kernel)
    rest = "" if list(valid) == ["every size"] else "; other sizes as planned"
    return f"{kernel} serves {' or '.join(valid)} at {where}{rest}"
