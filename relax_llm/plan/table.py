"""A plan as a table for people: which kernel serves which sizes, and where."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from relax_llm.table import Table

if TYPE_CHECKING:
    from relax_llm.plan.plan import Entry


def plan_table(entries: Iterable["Entry"]) -> Table:
    """One row for each range; an entry's problem, sites and layout stand in its first."""
    rows = []
    for entry in entries:
        about = (entry.problem, sites_text(entry.sites), entry.layout)
        for part in entry.ranges:
            rows.append((*about, str(part), part.kernel))
            about = ("", "", "")
    return Table(("problem", "sites", "weight", "at", "kernel"), rows)


def sites_text(sites: Iterable[str]) -> str:
    """Sites that differ by a layer's number as one: `layers.*.mlp.down_proj (30)`."""
    counted = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", site) for site in sites)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counted.items())
