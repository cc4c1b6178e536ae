"""The plan: for every problem, which kernel serves which sizes. Plain data, kept in the artifact as plan.json."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relax_llm.errors import PlanError
from relax_llm.plan.sizes import Box, check_total
from relax_llm.plan.table import plan_table


def parts_of(site: str) -> list[str]:
    """The names a site goes by: its own, and that of each part where several were fused.

    "layers.3.mlp.gate_proj+up_proj" is also "layers.3.mlp.gate_proj" and "layers.3.mlp.up_proj".
    """
    head, _, last = site.rpartition(".")
    parts = last.split("+")
    return [site] if len(parts) == 1 else [site, *(f"{head}.{part}" if head else part for part in parts)]


@dataclass(frozen=True)
class Range:
    """Some sizes, and the kernel that serves them."""

    sizes: Box
    kernel: str

    def __str__(self) -> str:
        return str(self.sizes)


@dataclass(frozen=True)
class Candidate:
    """A kernel that was considered for a problem.

    Attributes:
        kernel: Its name.
        sizes: What it is valid for.
        reason: Why it serves what it serves, or why it serves nothing.
    """

    kernel: str
    sizes: Box
    reason: str


@dataclass(frozen=True)
class Measurement:
    """How long a kernel took.

    Attributes:
        kernel: Its name.
        sizes: At which sizes.
        seconds: The median of a launch.
        cold: Whether the weight had to come from memory.
    """

    kernel: str
    sizes: Mapping[str, int]
    seconds: float
    cold: bool = False


@dataclass(frozen=True)
class Entry:
    """One problem's choice.

    Attributes:
        problem: The problem's name.
        operator: What it computes.
        sites: Where in the model it is solved.
        layout: How the weight is packed, "" where there is none; all kernels of an entry read the same.
        axes: Names of the sizes that the choice depends on.
        ranges: Total: every size is in exactly one.
        candidates: Every kernel that was considered.
        measurements: What the choice rests on, if it was measured.
    """

    problem: str
    operator: str
    sites: tuple[str, ...]
    layout: str
    axes: tuple[str, ...]
    ranges: tuple[Range, ...]
    candidates: tuple[Candidate, ...] = ()
    measurements: tuple[Measurement, ...] = field(default=(), hash=False)  # their sizes are mappings

    def __post_init__(self) -> None:
        check_total(self.problem, self.axes, ((part.sizes, part.kernel) for part in self.ranges))

    def serving(self, sizes: Mapping[str, int]) -> Range:
        """The range that these sizes fall into."""
        return next(part for part in self.ranges if sizes in part.sizes)

    def is_at(self, site: str) -> bool:
        """Whether it serves a site, named as a whole or by a part."""
        return any(site in parts_of(known) for known in self.sites)


@dataclass(frozen=True)
class Plan:
    """The choices of a whole model; `print` shows them as a table, and so does a notebook.

    Attributes:
        entries: One for each problem, or for each group of sites where the user's kernels tell sites apart.
        machine: What it was measured on, if it was measured.
    """

    entries: tuple[Entry, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)

    def all_at(self, site: str) -> list[Entry]:
        """The entries that serve a site: several where more than one operator has it.

        Raises:
            PlanError: No site has this name; similar ones are listed.
        """
        found = [entry for entry in self.entries if entry.is_at(site)]
        if found:
            return found
        sites = [known for entry in self.entries for known in entry.sites]
        near = [
            known for known in sites if site in known or known.rpartition(".")[2] == site.rpartition(".")[2]
        ]
        raise PlanError(
            f"The plan has no site {site!r}; sites are named like {', '.join((near or sites)[:5])}."
        )

    def at(self, site: str, operator: str | None = None) -> Entry:
        """The entry that serves a site.

        Args:
            site: A place in the model.
            operator: Which of the operators there, where there are several.

        Raises:
            PlanError: No site has this name, or not this operator, or several and none is named.
        """
        found = self.all_at(site)
        chosen = [entry for entry in found if operator in (None, entry.operator)]
        if len(chosen) != 1:
            known = ", ".join(entry.operator for entry in found)
            raise PlanError(f"The site {site!r} has the operators {known}; name one of them.")
        return chosen[0]

    def explain(self, site: str, *, operator: str | None = None, **sizes: int) -> str:
        """Say which kernel serves a site, and why; at one size, or at all.

        Args:
            site: A place in the model, such as "layers.3.mlp.down_proj".
            operator: Which of the operators there; by default all.
            sizes: Sizes to ask for: M (rows of activations, batch * seq) for a matmul; seq and kv_len for attention.

        Raises:
            PlanError: No site has this name or operator, or a size is not positive or not one of the site's.
        """
        entries = self.all_at(site) if operator is None else [self.at(site, operator)]
        for name, value in sizes.items():
            if value < 1:
                raise PlanError(f"{name} must be at least 1, not {value}.")
        asked = [entry for entry in entries if sizes.keys() <= set(entry.axes)]
        if not asked:
            axes = ", ".join(dict.fromkeys(axis for entry in entries for axis in entry.axes))
            raise PlanError(f"The kernels at {site!r} are not chosen by {', '.join(sizes)}, but by {axes}.")
        return "\n".join(line for entry in asked for line in _explained(entry, site, sizes))

    def __str__(self) -> str:
        return str(plan_table(self.entries))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return plan_table(self.entries)._repr_html_()

    def to_json(self) -> str:
        """The text of plan.json."""
        entries = [entry_json(entry) for entry in self.entries]
        return json.dumps(
            {**({"machine": dict(self.machine)} if self.machine else {}), "entries": entries}, indent=1
        )

    @staticmethod
    def from_json(text: str, origin: str = "plan.json") -> "Plan":
        """Read what `to_json` wrote, or what a person made of it.

        Raises:
            PlanError: It is not JSON, lacks a field, or a problem's ranges are not total.
        """
        try:
            data = json.loads(text)
            return Plan(tuple(_entry(entry) for entry in data["entries"]), data.get("machine", {}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"{origin} is not a plan ({type(error).__name__}: {error}).") from error

    @staticmethod
    def read(path: str | os.PathLike[str]) -> "Plan":
        """Read a file that `to_json` wrote, or that a person edited.

        Raises:
            PlanError: It cannot be read, or is not a plan.
        """
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8", errors="replace"), str(path))
        except OSError as error:
            raise PlanError(f"The plan {os.fspath(path)} cannot be read: {error.strerror}.") from error


def _explained(entry: Entry, site: str, sizes: Mapping[str, int]) -> Iterable[str]:
    yield f"{site}: {entry.problem}" + (f", weight layout {entry.layout}" if entry.layout else "")
    for part in entry.ranges:
        known = Box(tuple((axis, part.sizes[axis]) for axis in entry.axes if axis in sizes))
        if sizes in known:
            yield f"  {part}: {part.kernel}"
    for candidate in entry.candidates:
        yield f"  {candidate.kernel} (valid for {candidate.sizes}): {candidate.reason}"


def entry_json(entry: Entry) -> dict[str, Any]:
    """An entry as plan.json has it."""

    def sized(item: Range | Candidate) -> dict[str, Any]:
        return {**vars(item), "sizes": item.sizes.to_json()}

    return {
        **vars(entry),
        "ranges": [sized(part) for part in entry.ranges],
        "candidates": [sized(candidate) for candidate in entry.candidates],
        "measurements": [vars(measurement) for measurement in entry.measurements],
    }


def _entry(data: Mapping[str, Any]) -> Entry:
    return Entry(
        data["problem"],
        data["operator"],
        tuple(data["sites"]),
        data["layout"],
        tuple(data["axes"]),
        tuple(Range(Box.from_json(part["sizes"]), part["kernel"]) for part in data["ranges"]),
        tuple(
            Candidate(item["kernel"], Box.from_json(item["sizes"]), item["reason"])
            for item in data.get("candidates", ())
        ),
        tuple(Measurement(**item) for item in data.get("measurements", ())),
    )
