"""Which kernel served how many launches: true counts, told by the compiled code while it ran."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from relax_llm.plan.plan import parts_of
from relax_llm.table import Table

Key = tuple[str, str, str, tuple[tuple[str, int], ...]]
"""Site, operator, kernel, and the sizes by name."""


@dataclass(frozen=True)
class Count:
    """Launches of one kernel at one site and size.

    Attributes:
        site: The place in the model.
        operator: What the kernel computes.
        kernel: Its name in the plan; where the plan does not know it, its symbol in the library.
        sizes: The sizes of each of these launches.
        launches: How many there were.
    """

    site: str
    operator: str
    kernel: str
    sizes: Mapping[str, int]
    launches: int


class Counts:
    """The launches of a runner since `counting()` began; `print` shows them as a table."""

    def __init__(self) -> None:
        """Nothing has been launched."""
        self._counter: Counter[Key] = Counter()

    def add(self, keys: Iterable[Key]) -> None:
        """Count a launch for each key."""
        self._counter.update(keys)

    @property
    def rows(self) -> tuple[Count, ...]:
        """Every site, kernel and size with its number of launches, in the order of the first launch."""
        return tuple(
            Count(site, operator, kernel, dict(sizes), launches)
            for (site, operator, kernel, sizes), launches in self._counter.items()
        )

    def launches(self, *, site: str = "*", kernel: str = "*", operator: str = "*", **sizes: int) -> int:
        """The number of launches, of all or of some.

        Args:
            site: Pattern of sites; one that was fused answers to its parts.
            kernel: Pattern of kernels.
            operator: Pattern of operators.
            sizes: Sizes that the launches must have, such as M=1.
        """
        return sum(row.launches for row in self._some(site, kernel, operator, sizes))

    def kernel(self, name: str, **sizes: int) -> int:
        """The number of launches that a kernel served, at all sizes or at some."""
        return sum(row.launches for row in self._some("*", name, "*", sizes))

    def site(self, name: str, **sizes: int) -> dict[str, int]:
        """The launches at a site, by kernel."""
        found: dict[str, int] = {}
        for row in self._some(name, "*", "*", sizes):
            found[row.kernel] = found.get(row.kernel, 0) + row.launches
        return found

    def _some(self, site: str, kernel: str, operator: str, sizes: Mapping[str, int]) -> list[Count]:
        return [
            row
            for row in self.rows
            if any(fnmatchcase(part, site) for part in parts_of(row.site))
            and fnmatchcase(row.kernel, kernel)
            and fnmatchcase(row.operator, operator)
            and all(row.sizes.get(axis) == size for axis, size in sizes.items())
        ]

    def to_json(self) -> str:
        """The rows, as a list of objects."""
        return json.dumps([asdict(row) for row in self.rows], indent=1)

    @property
    def table(self) -> Table:
        """One row for each operator and kernel: the sizes from the smallest to the largest, sites and launches."""
        groups: dict[tuple[str, str], list[Count]] = {}
        for row in self.rows:
            groups.setdefault((row.operator, row.kernel), []).append(row)
        rows = [
            (
                operator,
                kernel,
                extent(rows),
                str(len({row.site for row in rows})),
                str(sum(row.launches for row in rows)),
            )
            for (operator, kernel), rows in sorted(groups.items())
        ]
        return Table(("operator", "kernel", "sizes", "sites", "launches"), rows, frozenset({3, 4}))

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def __repr__(self) -> str:
        return str(self)


def extent(rows: list[Count]) -> str:
    """The smallest and largest of each size: "M = 1..8, kv_len = 17"."""
    shown = []
    for axis in dict.fromkeys(axis for row in rows for axis in row.sizes):
        values = [row.sizes[axis] for row in rows if axis in row.sizes]
        low, high = min(values), max(values)
        shown.append(f"{axis} = {low}" if low == high else f"{axis} = {low}..{high}")
    return ", ".join(shown)
