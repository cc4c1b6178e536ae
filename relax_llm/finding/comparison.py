"""What comparing two models comes to: the difference at each site, and that of the logits."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from relax_llm.numerics import bounds
from relax_llm.numerics.difference import Difference
from relax_llm.table import Table, html

Row = tuple[str, ...]

HEADER: Row = (
    "call",
    "site",
    "operator",
    "kernel",
    "local",
    "bound",
    "accumulated",
    "max abs",
    "ulp",
    "cosine",
    "",
)
"""What `Comparison.rows` has."""

KINDS_HEADER: Row = ("sites", "operator", "kernel", "local", "worst at", "bound", "accumulated", "")
"""What `Comparison.kinds` has."""


@dataclass(frozen=True)
class SiteDifference:
    """One launch beside its counterpart.

    Attributes:
        call: Number of the call, 0 for the prefill.
        function: What was called.
        index: The launch's place in the function.
        site: Where in the model.
        operator: What is computed.
        kernel: Which kernel computed it.
        counterpart: What it was compared with.
        sizes: Its sizes.
        result: Which of its results is farthest off: "" for the output, "k_cache", "v_cache".
        local: How far it is off when it is given what the reference computed before it: its own error.
        accumulated: How far it is off in a run of its own: its error and what it inherits.
        bound: How far `local.relative` may be off.
    """

    call: int
    function: str
    index: int
    site: str
    operator: str
    kernel: str
    counterpart: str
    sizes: Mapping[str, int]
    result: str
    local: Difference
    accumulated: Difference
    bound: float

    @property
    def is_over(self) -> bool:
        """Whether its own error is over the bound."""
        return not self.local.relative <= self.bound


@dataclass(frozen=True)
class CallDifference:
    """The logits of one call.

    Attributes:
        function: What was called.
        seq: Tokens that it was given.
        kv_len: Tokens in the cache after it.
        logits: Of the runs of their own.
        divergence: From the reference's distribution of the next token, in nats.
        likeliest: The token that the subject finds likeliest, and that the reference does.
    """

    function: str
    seq: int
    kv_len: int
    logits: Difference
    divergence: float
    likeliest: tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """A model beside a reference, launch by launch.

    Attributes:
        subject: What was examined.
        reference: What it was compared with.
        sites: Every launch that has a counterpart, in the order of the program, call after call.
        calls: The logits of each call.
        alone: Sites of the subject that the reference has no counterpart of.
        drift: How far logits may be off though every site is within its bound.
    """

    subject: str
    reference: str
    sites: tuple[SiteDifference, ...]
    calls: tuple[CallDifference, ...]
    alone: tuple[str, ...]
    drift: float = math.inf

    @property
    def first(self) -> SiteDifference | None:
        """The first site whose own error is over its bound."""
        return next((site for site in self.sites if site.is_over), None)

    @property
    def over(self) -> tuple[str, ...]:
        """The sites whose own error is over its bound in some call, in the order of the program."""
        return tuple(dict.fromkeys(site.site for site in self.sites if site.is_over))

    @property
    def has_drifted(self) -> bool:
        """Whether logits are farther apart than rounding makes them."""
        return any(not call.logits.relative <= self.drift for call in self.calls)

    @property
    def agrees(self) -> bool:
        """Whether no site is over its bound, and the logits are near each other."""
        return self.first is None and not self.has_drifted

    def rows(self) -> Iterator[Row]:
        """Every launch as a row of text, under `HEADER`."""
        first = self.first
        for site in self.sites:
            off = site.accumulated
            yield (
                f"{site.call} {site.function}",
                site.site + (f" {site.result}" if site.result else ""),
                site.operator,
                site.kernel,
                number(site.local.relative),
                number(site.bound),
                number(off.relative),
                number(off.max_abs),
                _count(off.ulp),
                f"{off.cosine:.7f}",
                "<- first" if site is first else "<-" if site.is_over else "",
            )

    def kinds(self) -> Iterator[Row]:
        """Launches that differ by their layer alone as one row, under `KINDS_HEADER`; the worst of all calls."""
        first = self.first
        groups: dict[tuple[str, str], list[SiteDifference]] = {}
        for site in self.sites:
            groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.site), site.operator), []).append(site)
        for (name, operator), group in groups.items():
            worst = max(group, key=lambda site: _ratio(site.local.relative, site.bound))
            count = len({site.site for site in group})
            name = name if count > 1 else group[0].site
            growth = [number(group[at].accumulated.relative) for at in (0, -1)]
            over = any(site.is_over for site in group)
            yield (
                f"{name} ({count})" if count > 1 else name,
                operator,
                ", ".join(dict.fromkeys(site.kernel for site in group)),
                number(worst.local.relative),
                f"{worst.site}, {worst.function}" if worst.local.relative else "",
                number(worst.bound),
                growth[0] if growth[0] == growth[1] else " .. ".join(growth),
                "<- first" if first in group else "<-" if over else "",
            )

    def sentence(self) -> str:
        """What was found, in words."""
        first = self.first
        if first is None and self.has_drifted:
            worst = max(call.logits.relative for call in self.calls)
            return (
                f"Every site is within its bound, but the logits are off by {number(worst)} of their largest: what "
                "no single launch does, as overwriting the cache, or errors that add up."
            )
        if first is None:
            return f"All {len({site.site for site in self.sites})} sites that can be compared are within their bounds."
        others = len(self.over) - 1
        more = (
            f" {others} more {'site is' if others == 1 else 'sites are'} over, each by itself."
            if others
            else ""
        )
        of = f" of {first.result}" if first.result else ""
        sizes = ", ".join(f"{name}={size}" for name, size in first.sizes.items())
        local = first.local
        return (
            f"The first site over its bound is {first.site}: the {first.operator} by {first.kernel} in call "
            f"{first.call} ({first.function}; {sizes}). Given what {first.counterpart} was given, it is off by "
            f"{number(local.relative)} of the scale, where {number(first.bound)} is allowed: element "
            f"{list(local.index)}{of} is {local.value:.8g} and not {local.reference:.8g}.{more}"
        )

    def logits_text(self) -> list[Row]:
        """A row for each call: function, tokens, difference of the logits, divergence, likeliest tokens."""
        return [
            (
                f"{number_} {call.function}",
                str(call.seq),
                str(call.kv_len),
                number(call.logits.relative),
                number(call.logits.max_abs),
                number(call.divergence),
                str(call.likeliest[0])
                if call.likeliest[0] == call.likeliest[1]
                else f"{call.likeliest[0]}, not {call.likeliest[1]}",
            )
            for number_, call in enumerate(self.calls)
        ]

    def to_json(self) -> str:
        """Everything as text; numbers that are not finite as strings."""
        first = self.first
        data = {
            "subject": self.subject,
            "reference": self.reference,
            "agrees": self.agrees,
            "first": None if first is None else self.sites.index(first),
            "over": self.over,
            "sites": [{**asdict(site), "over": site.is_over} for site in self.sites],
            "calls": [asdict(call) for call in self.calls],
            "alone": self.alone,
        }
        return json.dumps(_finite(data), indent=1, allow_nan=False)

    def summary(self) -> tuple[Table, Table]:
        """Kinds of sites, and logits."""
        return (
            Table(KINDS_HEADER, list(self.kinds()), frozenset({3, 5})),
            Table(LOGITS_HEADER, self.logits_text(), frozenset({1, 2, 3, 4, 5})),
        )

    def conclusions(self) -> list[str]:
        """What was found, as sentences."""
        same = sum(call.likeliest[0] == call.likeliest[1] for call in self.calls)
        alone = [f"Without a counterpart: {', '.join(self.alone)}."] if self.alone else []
        return [
            f"The likeliest token is the same in {same} of {len(self.calls)} calls.",
            *alone,
            self.sentence(),
        ]

    def __str__(self) -> str:
        kinds, logits = self.summary()
        return "\n".join([self._title, "", str(kinds), "", str(logits), "", *self.conclusions()])

    def _repr_html_(self) -> str:
        return html(self._title, self.summary(), " ".join(self.conclusions()))

    @property
    def _title(self) -> str:
        return f"{self.subject} beside {self.reference}"

    def __repr__(self) -> str:
        return f"<comparison: {self.sentence()}>"


LOGITS_HEADER: Row = ("call", "tokens", "kv_len", "logits", "max abs", "KL", "likeliest")
"""What `Comparison.logits_text` has."""


def number(value: float) -> str:
    """A difference in a few characters."""
    return "0" if value == 0 else f"{value:.1e}"


def _count(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.0f}" if value < 1e6 else f"{value:.0e}"


def _ratio(value: float, bound: float) -> float:
    return 0.0 if value == 0 else value / bound if bound else math.inf


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else str(data)
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def drift(same_weights: bool) -> float:
    """How far logits may be off though every site is within its bound."""
    return bounds.LOGITS if same_weights else math.inf
