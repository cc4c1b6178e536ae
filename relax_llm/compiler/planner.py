"""Choosing kernels: for each matmul of a model, which kernels serve which rows, and why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from relax_llm.errors import KernelError
from relax_llm.kernels.checking import check
from relax_llm.kernels.forms import Realized, realize
from relax_llm.kernels.layout import Layout
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.matmul.family import matmul_kernels
from relax_llm.kernels.matmul.tiled import layout_named
from relax_llm.plan.kernel import Declined, Kernel
from relax_llm.plan.plan import Candidate, Entry, Plan, Range


@dataclass(frozen=True)
class Choice:
    """What serves one problem.

    Attributes:
        name: Symbol of the function that the model calls.
        layout: How the weight is packed.
        ranges: Rows and kernels, ascending and total.
        realized: The kernels by name; empty where the built-in kernel serves all sizes.
        candidates: What was considered, with reasons.
    """

    name: str
    layout: Layout
    ranges: tuple[Range, ...]
    realized: dict[str, Realized]
    candidates: tuple[Candidate, ...]


class Planner:
    """Chooses kernels for the matmuls of one model.

    A user's kernels come first, in the order given; the built-in ones serve what they leave over. All kernels of a
    matrix read one layout, because its weight is stored once.
    """

    def __init__(
        self,
        machine: Machine,
        kernels: Sequence[Kernel] = (),
        check: Callable[[Realized, Machine], str] = check,
    ) -> None:
        """Prepare.

        Args:
            machine: What to generate for.
            kernels: The user's.
            check: Tries a kernel before it enters the plan; raises KernelError where it is wrong.
        """
        names = [kernel.name for kernel in kernels]
        built_in = matmul_kernels(machine)
        twice = sorted(
            {name for name in names if names.count(name) > 1 or name in {k.name for k in built_in}}
        )
        if twice:
            raise KernelError(f"Two kernels have the name {twice[0]!r}; give one of them another with name=.")
        self.machine = machine
        self._kernels = [*kernels, *built_in]
        self._user = set(names)
        self._check = check
        self._choices: dict[tuple[Matmul, frozenset[str]], Choice] = {}
        self._sites: dict[tuple[Matmul, frozenset[str]], list[str]] = {}

    def choose(self, problem: Matmul, site: str) -> Choice:
        """The kernels for a problem at a site.

        Raises:
            KernelError: A kernel is wrong, or two kernels want the weight in different layouts.
        """
        key = (problem, frozenset(kernel.name for kernel in self._kernels if kernel.serves(site)))
        if key not in self._choices:
            self._choices[key] = self._decide(problem, site)
        sites = self._sites.setdefault(key, [])
        if site not in sites:
            sites.append(site)
        return self._choices[key]

    def plan(self) -> Plan:
        """All choices so far."""
        return Plan(
            tuple(
                Entry(
                    key[0].name, tuple(self._sites[key]), choice.layout.name, choice.ranges, choice.candidates
                )
                for key, choice in self._choices.items()
            )
        )

    def objects(self) -> list[bytes]:
        """Object files of the chosen kernels."""
        chosen = {id(r): r for choice in self._choices.values() for r in choice.realized.values()}
        return [data for realized in chosen.values() for data in realized.objects]

    def _decide(self, problem: Matmul, site: str) -> Choice:
        reasons: dict[str, str] = {}
        able: list[Realized] = []
        for kernel in self._kernels:
            outcome = self._try(kernel, problem, site)
            if isinstance(outcome, str):
                reasons[kernel.name] = outcome
            else:
                able.append(outcome)
        layout = able[0].kernel.layout
        for realized in able[1:]:
            if realized.kernel.layout == layout:
                continue
            if realized.kernel.name in self._user:
                raise KernelError(
                    f"At {site}, kernel {able[0].kernel.name!r} reads the weight {layout} and {realized.kernel.name!r} "
                    f"reads it {realized.kernel.layout}; a weight is stored once, so give both one layout, or "
                    "separate their sites."
                )
            reasons[realized.kernel.name] = (
                f"reads the weight {realized.kernel.layout}, which is stored {layout} here"
            )
        able = [realized for realized in able if realized.kernel.layout == layout]
        ranges = _cover([realized.kernel for realized in able])
        used = {part.kernel for part in ranges}
        for realized in able:
            name = realized.kernel.name
            if name in used:
                reasons[name] = f"serves {' and '.join(str(part) for part in ranges if part.kernel == name)}"
                if name in self._user:
                    reasons[name] += f"; {self._check(realized, self.machine)}"
            else:
                reasons[name] = "kernels before it serve every size that it is valid for"
        alone = used == {"tiled"}
        suffix = "" if alone else "__" + "_".join(sorted(name for name in used if name in self._user))
        return Choice(
            problem.name + suffix,
            layout_named(layout, problem, self.machine),
            ranges,
            {} if alone else {r.kernel.name: r for r in able if r.kernel.name in used},
            tuple(Candidate(k.name, k.first, k.last, reasons[k.name]) for k in self._kernels),
        )

    def _try(self, kernel: Kernel, problem: Matmul, site: str) -> Realized | str:
        """A kernel for this problem, or why there is none."""
        if not kernel.serves(site):
            return f"is for the sites {', '.join(kernel.sites)}"
        missing = sorted(kernel.features - self.machine.features)
        if missing:
            return f"needs {', '.join(missing)}, which {self.machine.name} lacks"
        if kernel.layout == "tiled" and problem.gated and not {"activation", "gate"} <= kernel.absorbs:
            return "reads the tiled layout, in which gate and up alternate, but does not absorb activation and gate"
        try:
            return realize(kernel, problem, self.machine)
        except Declined as reason:
            return f"declined: {reason}"


def _cover(kernels: Sequence[Kernel]) -> tuple[Range, ...]:
    """Give every number of rows to the first kernel that is valid for it."""
    starts = {1, *(kernel.first for kernel in kernels), *(k.last + 1 for k in kernels if k.last is not None)}
    ranges: list[Range] = []
    for first in sorted(starts):
        name = next(k.name for k in kernels if k.first <= first and (k.last is None or first <= k.last))
        if ranges and ranges[-1].kernel == name:
            continue
        if ranges:
            ranges[-1] = replace(ranges[-1], last=first - 1)
        ranges.append(Range(first, None, name))
    return tuple(ranges)
