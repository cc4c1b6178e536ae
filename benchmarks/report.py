"""What was measured of everybody: as a table, and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from statistics import median
from typing import Any

from benchmarks.limits import Limits
from benchmarks.turns import Case

MEGABYTE = 1e6


@dataclass
class Figures:
    """What was measured of one engine.

    Attributes:
        load_seconds: From the import of the engine to where it takes a prompt.
        rates: Tokens per second in each round; None where it was not measured.
        peak_bytes: The most memory that its process had in use.
        others: Which share of the processors others had during its turns.
        says: The beginning of its answer to a prompt of text.
    """

    load_seconds: float
    rates: dict[Case, list[float | None]] = field(default_factory=dict)
    peak_bytes: int = 0
    others: float = 0
    says: str = ""

    def rate(self, case: Case) -> float | None:
        """The median over the rounds; None where it was not measured in all of them."""
        rates = [rate for rate in self.rates.get(case, ()) if rate is not None]
        return median(rates) if rates and len(rates) == len(self.rates[case]) else None


@dataclass(frozen=True)
class Report:
    """All rounds with one weight format.

    Attributes:
        title: Which model, machine and number of threads.
        weights: The format.
        cases: What was measured.
        limits: Of the machine, in each round.
        least: For each case, the seconds that a token takes at least, at the limits around our turn in each round.
        figures: Of everybody who was measured, by name.
        ours: The names of this project; the first is compared with.
        missing: Who was not measured, or not to the end, and why.
    """

    title: str
    weights: str
    cases: Sequence[Case]
    limits: Sequence[Limits]
    least: Mapping[Case, Sequence[float]]
    figures: Mapping[str, Figures]
    ours: Sequence[str]
    missing: Mapping[str, str]

    @cached_property
    def best(self) -> dict[Case, str]:
        """The fastest of the others at each case, where there is one."""
        others = {
            case: {
                name: rate
                for name, figures in self.figures.items()
                if name not in self.ours and (rate := figures.rate(case)) is not None
            }
            for case in self.cases
        }
        return {case: max(rates, key=lambda name: rates[name]) for case, rates in others.items() if rates}

    def ratio(self, case: Case, name: str | None = None) -> float | None:
        """How many times as fast as another this project is: the median of the ratios within a round.

        Args:
            case: At what.
            name: Which other one; by default the fastest.
        """
        name = name or self.best.get(case)
        ours = self.figures.get(self.ours[0]) if self.ours else None
        if name is None or ours is None or ours.rate(case) is None or self.figures[name].rate(case) is None:
            return None
        pairs = zip(ours.rates[case], self.figures[name].rates[case], strict=True)
        return median(own / other for own, other in pairs if own and other)

    def of_limit(self, case: Case) -> float | None:
        """Our share of what the machine's limits allow: the median over the rounds."""
        ours = self.figures.get(self.ours[0]) if self.ours else None
        if ours is None or ours.rate(case) is None:
            return None
        return median(
            rate * least for rate, least in zip(ours.rates[case], self.least[case], strict=True) if rate
        )

    @property
    def prefill(self) -> float | None:
        """The geometric mean of the ratios of all prompts."""
        ratios = [self.ratio(case) for case in self.cases if case.function == "prefill"]
        known = [ratio for ratio in ratios if ratio is not None]
        return prod(known) ** (1 / len(known)) if known and len(known) == len(ratios) else None

    def text(self) -> str:
        """The table, with what is missing under it."""
        header = [self.weights, *map(str, self.cases), "load s", "peak MB", "others"]
        rows = [header]
        for name, figures in self.figures.items():
            rates = [_number(figures.rate(case)) for case in self.cases]
            memory = f"{figures.peak_bytes / MEGABYTE:.0f}"
            rows.append([name, *rates, f"{figures.load_seconds:.2f}", memory, f"{figures.others:.0%}"])
        if self.ours:
            rows.append([])
            ratios = [_number(self.ratio(case), ".2f", "x") for case in self.cases]
            rows.append([f"{self.ours[0]} : best peer", *ratios, "", "", ""])
            shares = [_number(self.of_limit(case), ".0%") for case in self.cases]
            rows.append([f"{self.ours[0]} of limit", *shares, "", "", ""])
        lines = [self.title, self._limits(), "", *_aligned(rows)]
        if self.prefill is not None:
            lines.append(f"prefill, geometric mean: {self.prefill:.2f}x of the best peer of each length")
        if self.missing:
            lines += ["", "not measured:", *(f"  {name}: {why}" for name, why in self.missing.items())]
        says = {name: figures.says for name, figures in self.figures.items() if figures.says}
        if says:
            lines += ["", "said:", *(f"  {name}: {text!r}" for name, text in says.items())]
        return "\n".join([*lines, ""])

    def data(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "title": self.title,
            "weights": self.weights,
            "limits": [asdict(limits) for limits in self.limits],
            "engines": {
                name: {
                    "load_seconds": figures.load_seconds,
                    "peak_bytes": figures.peak_bytes,
                    "others": figures.others,
                    "tokens_per_second": {str(case): figures.rate(case) for case in self.cases},
                    "rounds": {str(case): rates for case, rates in figures.rates.items()},
                    "says": figures.says,
                }
                for name, figures in self.figures.items()
            },
            "ours": list(self.ours),
            "best_peer": {str(case): name for case, name in self.best.items()},
            "least_seconds": {str(case): list(seconds) for case, seconds in self.least.items()},
            "ratio": {str(case): self.ratio(case) for case in self.cases},
            "prefill_ratio": self.prefill,
            "of_limit": {str(case): self.of_limit(case) for case in self.cases},
            "missing": dict(self.missing),
        }

    def _limits(self) -> str:
        def middle(name: str) -> float:
            return float(median(getattr(limits, name) for limits in self.limits))

        parts = [f"f32 {middle('flops') / 1e9:.0f} GFLOP/s"]
        parts += [f"{name} {middle(name) / 1e9:.0f}" for name in ("bf16", "int8") if middle(name)]
        if middle("bf16_tiles"):
            tiles = f"bf16 {middle('bf16_tiles') / 1e9:.0f}, int8 {middle('int8_tiles') / 1e9:.0f}"
            parts.append(f"in tiles (AMX) {tiles}")
        trips = [limits.apart * 1e9 for limits in self.limits if limits.apart]
        apart = f"; {min(trips):.0f} to {max(trips):.0f} ns from core to core and back" if trips else ""
        return f"limits: {', '.join(parts)}; {middle('bytes') / 1e9:.1f} GB/s read{apart}"


def to_json(reports: Sequence[Report]) -> str:
    """One document of several reports."""
    return json.dumps([report.data() for report in reports], indent=1) + "\n"


def _number(value: float | None, form: str = ".1f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _aligned(rows: list[list[str]]) -> list[str]:
    full = [row for row in rows if row]
    widths = [max(len(row[column]) for row in full) for column in range(len(full[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        if row
        else ""
        for row in rows
    ]
