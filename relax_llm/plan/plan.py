"""The plan: for every problem, which kernel serves which range of M. Plain data, kept in the artifact as plan.json."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from relax_llm.errors import PlanError


def parts_of(site: str) -> list[str]:
    """The names a site goes by: its own, and that of each part where several were fused.

    "layers.3.mlp.gate_proj+up_proj" is also "layers.3.mlp.gate_proj" and "layers.3.mlp.up_proj".
    """
    head, _, last = site.rpartition(".")
    parts = last.split("+")
    return [site] if len(parts) == 1 else [site, *(f"{head}.{part}" if head else part for part in parts)]


@dataclass(frozen=True)
class Range:
    """Rows from `first` to `last`, both included, and the kernel that serves them; `last` None is without end."""

    first: int
    last: int | None
    kernel: str

    def __contains__(self, rows: object) -> bool:
        return isinstance(rows, int) and self.first <= rows and (self.last is None or rows <= self.last)

    def __str__(self) -> str:
        if self.last is None:
            return f"M >= {self.first}"
        return f"M = {self.first}" if self.first == self.last else f"M = {self.first}..{self.last}"


@dataclass(frozen=True)
class Candidate:
    """A kernel that was considered for a problem.

    Attributes:
        kernel: Its name.
        first: The fewest rows it is valid for.
        last: The most, or None.
        reason: Why it serves what it serves, or why it serves nothing.
    """

    kernel: str
    first: int
    last: int | None
    reason: str


@dataclass(frozen=True)
class Entry:
    """One problem's choice.

    Attributes:
        problem: The problem's name.
        sites: Where in the model it is solved.
        layout: How the weight is packed; all kernels of an entry read the same.
        ranges: Ascending, without gap or overlap, from 1 to infinity.
        candidates: Every kernel that was considered.
    """

    problem: str
    sites: tuple[str, ...]
    layout: str
    ranges: tuple[Range, ...]
    candidates: tuple[Candidate, ...] = ()

    def __post_init__(self) -> None:
        expected: int | None = 1
        for part in self.ranges:
            if (
                expected is None
                or part.first != expected
                or (part.last is not None and part.last < part.first)
            ):
                raise PlanError(
                    f"The plan for {self.problem} is not total: {part} ({part.kernel}) follows where "
                    f"M = {expected} is next."
                )
            expected = None if part.last is None else part.last + 1
        if expected is not None:
            raise PlanError(
                f"The plan for {self.problem} serves nothing from M = {expected} on; the last range must be open."
            )

    def serving(self, rows: int) -> Range:
        """The range that these rows fall into."""
        return next(part for part in self.ranges if rows in part)


@dataclass(frozen=True)
class Plan:
    """The choices of a whole model."""

    entries: tuple[Entry, ...]

    def at(self, site: str) -> Entry:
        """The entry that serves a site.

        Raises:
            PlanError: No site has this name; similar ones are listed.
        """
        for entry in self.entries:
            if any(site in parts_of(known) for known in entry.sites):
                return entry
        sites = [known for entry in self.entries for known in entry.sites]
        near = [
            known for known in sites if site in known or known.rpartition(".")[2] == site.rpartition(".")[2]
        ]
        raise PlanError(
            f"The plan has no site {site!r}; sites are named like {', '.join((near or sites)[:5])}."
        )

    def explain(self, site: str, M: int | None = None) -> str:
        """Say which kernel serves a site, and why; at one size, or at all.

        Args:
            site: A place in the model, such as "layers.3.mlp.down_proj".
            M: Rows of activations: batch * seq.

        Raises:
            PlanError: No site has this name, or M is not positive.
        """
        entry = self.at(site)
        if M is not None and M < 1:
            raise PlanError(f"M must be at least 1, not {M}.")
        lines = [f"{site}: {entry.problem}, weight layout {entry.layout}"]
        shown: Iterable[Range] = entry.ranges if M is None else (entry.serving(M),)
        lines += [f"  {part}: {part.kernel}" for part in shown]
        for candidate in entry.candidates:
            valid = Range(candidate.first, candidate.last, candidate.kernel)
            lines.append(f"  {candidate.kernel} (valid for {valid}): {candidate.reason}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The text of plan.json."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str, origin: str = "plan.json") -> "Plan":
        """Read what `to_json` wrote, or what a person made of it.

        Raises:
            PlanError: It is not JSON, lacks a field, or a problem's ranges are not total.
        """
        try:
            return Plan(tuple(_entry(entry) for entry in json.loads(text)["entries"]))
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError(f"{origin} is not a plan ({type(error).__name__}: {error}).") from error


def _entry(data: Mapping[str, Any]) -> Entry:
    return Entry(
        data["problem"],
        tuple(data["sites"]),
        data["layout"],
        tuple(Range(**part) for part in data["ranges"]),
        tuple(Candidate(**candidate) for candidate in data["candidates"]),
    )
