"""Choosing kernels: for each problem of a model, which kernels serve which sizes, and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from relax_llm.compiler.storage import Storage
from relax_llm.compiler.wanted import WHOLE, Wanted
from relax_llm.errors import KernelError, PlanError
from relax_llm.kernels.checking import check
from relax_llm.kernels.forms import Realized, realize
from relax_llm.kernels.gpu_forms import try_for_gpu
from relax_llm.kernels.layout import Layout, parse
from relax_llm.kernels.library import build, built_in
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.operators import operator_of
from relax_llm.kernels.problem import Problem
from relax_llm.plan.choosing import cover
from relax_llm.plan.kernel import Declined, Kernel, Selection
from relax_llm.plan.plan import Candidate, Entry, Measurement, Plan, Range
from relax_llm.plan.python_kernel import PythonKernel
from relax_llm.plan.sizes import Box, cells, corner


@dataclass(frozen=True)
class Choice:
    """What serves one problem.

    Attributes:
        name: Symbol of the function that the model calls.
        layout: How the weight is packed; None for operators without a layout.
        ranges: Sizes and kernels, total.
        realized: The kernels that are compiled, by name; empty where the model calls the one built-in kernel itself.
        candidates: What was considered, with reasons.
        measurements: What the choice rests on, where a plan was given.
    """

    name: str
    layout: Layout | None
    ranges: tuple[Range, ...]
    realized: Mapping[str, Realized]
    candidates: tuple[Candidate, ...]
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True)
class _Able:
    """The kernels that can serve a problem at a site, all of one weight layout, and why others cannot."""

    kernels: tuple[Kernel, ...]
    realized: Mapping[str, Realized]
    layout: Layout | None
    reasons: Mapping[str, str]


class Planner:
    """Chooses kernels for the problems of one model.

    A user's kernels come first, in the order given; the built-in ones serve what they leave over. All kernels of a
    matrix read one layout, because its weight is stored once. A plan given decides for the problems it names.

    Attributes:
        machine: What is generated for.
        weights: The formats that were asked for.
        kv_cache: Format of the caches.
        storage: In which format each matrix is kept; set when the checkpoint's tensors are known.
    """

    def __init__(
        self,
        machine: Machine,
        kernels: Sequence[Kernel] = (),
        *,
        plan: Plan | None = None,
        selection: Selection = "dynamic",
        weights: Wanted = WHOLE,
        kv_cache: str = "f32",
        check: Callable[[Realized, Machine], str] = check,
    ) -> None:
        """Prepare.

        Args:
            machine: What to generate for.
            kernels: The user's.
            plan: Choices made before, by measurement or by hand.
            selection: "dynamic": by size; "pinned": one kernel for all sizes, so that rounding does not depend on them.
            weights: How matrices are stored.
            kv_cache: How keys and values are.
            check: Tries a kernel before it enters the plan; raises KernelError where it is wrong.
        """
        names = [kernel.name for kernel in kernels]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise _clash(twice[0])
        self.machine = machine
        self.weights = weights
        self.kv_cache = kv_cache
        self.storage = Storage(weights)
        self._given = tuple(kernels)
        self._plan = plan
        self._selection = selection
        self._check = check
        self._choices: dict[tuple[Problem, frozenset[str], Entry | None], Choice] = {}
        self._sites: dict[tuple[Problem, frozenset[str], Entry | None], list[str]] = {}

    def choose(self, problem: Problem, site: str, *, spare: bool = False) -> Choice:
        """The kernels for a problem at a site.

        Args:
            problem: What they solve.
            site: Where.
            spare: Whether kernels that serve no size are left out, and cannot be forced later.

        Raises:
            KernelError: A kernel is wrong, or two kernels want the weight in different layouts.
            PlanError: The plan given names a kernel that cannot serve.
        """
        entry = self._planned(problem, site)
        serving = frozenset(
            kernel.name
            for kernel in self._given
            if kernel.operator == problem.operator and kernel.serves(site)
        )
        key = (problem, serving, entry)
        if key not in self._choices:
            self._choices[key] = self._decide(problem, site, entry, spare)
        sites = self._sites.setdefault(key, [])
        if site not in sites:
            sites.append(site)
        return self._choices[key]

    def takes_norm(self, problem: Matmul, site: str, norm: str) -> bool:
        """Whether a product is to take in the norm before it, whose site is `norm`.

        Where activations are packed for the product, what packs them can normalize them as well. A head does not take
        a norm in: what else reads the last hidden states is found there. Neither does a product whose norm has a kernel
        of yours, and none on a GPU. A plan given has decided.
        """
        if self.machine.is_gpu or problem.activations is None or problem.n == self.storage.vocab_size:
            return False
        if self._planned(problem, site) is not None:
            return False
        return not any(kernel.operator == "norm" and kernel.serves(norm) for kernel in self._given)

    def candidates(self, problem: Problem, site: str) -> list[Realized]:
        """Every kernel that can serve a problem at a site, checked; all read the weight in one layout."""
        able = self._able(problem, site, self._planned(problem, site))
        for realized in able.realized.values():
            if realized.kernel in self._given:
                self._check(realized, self.machine)
        return list(able.realized.values())

    def plan(self) -> Plan:
        """All choices so far."""
        entries = [
            Entry(
                key[0].name,
                key[0].operator,
                tuple(self._sites[key]),
                choice.layout.name if choice.layout else "",
                operator_of(key[0]).axes,
                choice.ranges,
                choice.candidates,
                choice.measurements,
            )
            for key, choice in self._choices.items()
        ]
        return Plan(tuple(entries), self._plan.machine if self._plan else {})

    def unused(self) -> list[str]:
        """The problems of the plan given that the model does not have, one sentence each.

        Raises:
            PlanError: It has none of those with a weight matrix: the plan is for another model, or for other weights.
        """
        if self._plan is None:
            return []
        met = {id(entry) for _, _, entry in self._choices if entry is not None}
        left = [entry for entry in self._plan.entries if id(entry) not in met]
        # What has no matrix, such as an argmax, many models have in common.
        own = [entry for entry in self._plan.entries if entry.layout] or self._plan.entries
        if own and not any(id(entry) in met for entry in own):
            raise PlanError(
                f"The plan given names no problem of this model: it is for {own[0].problem} at {own[0].sites[0]} and "
                "others. Is it for another model, or for another format of weights?"
            )
        return [
            f"The plan given has an entry for {entry.problem} at {', '.join(entry.sites[:3])}, which is not there."
            for entry in left
        ]

    def compiled(self) -> list[Realized]:
        """The kernels of all choices so far, each once."""
        found = {r.symbol: r for choice in self._choices.values() for r in choice.realized.values()}
        return list(found.values())

    def objects(self) -> list[bytes]:
        """Object files of the chosen kernels."""
        return [data for realized in self.compiled() for data in realized.objects]

    def python_kernels(self) -> list[PythonKernel]:
        """What must be registered before the model runs."""
        return [realized.python for realized in self.compiled() if realized.python]

    def layout(self, name: str) -> Layout:
        """The weight layout of a name: a kernel's own, or one that ships."""
        used = {choice.layout.name: choice.layout for choice in self._choices.values() if choice.layout}
        return used.get(name) or parse(name)

    def choices(self) -> dict[str, tuple[Problem, Choice]]:
        """What was chosen, by the symbol of the function that the model calls."""
        return {choice.name: (key[0], choice) for key, choice in self._choices.items()}

    def _planned(self, problem: Problem, site: str) -> Entry | None:
        """The entry of the given plan for a problem at a site."""
        for entry in self._plan.entries if self._plan else ():
            if entry.problem == problem.name and site in entry.sites:
                return entry
        return None

    def _decide(self, problem: Problem, site: str, entry: Entry | None, spare: bool) -> Choice:
        able = self._able(problem, site, entry)
        reasons = dict(able.reasons)
        axes = operator_of(problem).axes
        _require_total(able.kernels, axes, site, able.layout)
        if entry is not None:
            ranges = entry.ranges
            self._check_entry(entry, able)
        elif self._selection == "pinned" or self.machine.is_gpu:
            ranges = (Range(Box().within(axes), able.kernels[0].name),)
        else:
            ranges = cover(able.kernels, problem, axes)
        said = {candidate.kernel: candidate.reason for candidate in entry.candidates} if entry else {}
        for kernel in able.kernels:
            served = [str(part) for part in ranges if part.kernel == kernel.name]
            if served:
                reasons[kernel.name] = f"serves {' and '.join(served)}"
            elif self.machine.is_gpu and entry is None:
                reasons[kernel.name] = (
                    "a kernel before it serves the problem, and on a GPU one serves all sizes"
                )
            elif self._selection == "pinned" and entry is None:
                reasons[kernel.name] = "selection is pinned to one kernel for all sizes"
            elif entry:
                reasons[kernel.name] = said.get(kernel.name, "the plan given does not use it")
            elif kernel.cost is not None:
                reasons[kernel.name] = "predicted to be slower than others at every size"
            else:
                reasons[kernel.name] = "kernels before it serve every size that it is valid for"
            if kernel in self._given:
                reasons[kernel.name] += f"; {self._check(able.realized[kernel.name], self.machine)}"
        kernels = [*self._given, *built_in(problem, self.machine)]
        considered = [kernel for kernel in kernels if kernel.operator == problem.operator]
        used = dict.fromkeys(part.kernel for part in ranges)
        alone = len(able.kernels) == 1 and able.kernels[0] not in self._given and _is_direct(problem, able)
        if self.machine.is_gpu:
            alone = not any(kernel.name in used for kernel in self._given)
        named = [kernel.name for kernel in self._given if kernel.name in used]
        return Choice(
            self._symbol("__".join([problem.name, "_".join(sorted(named))]) if named else problem.name),
            able.layout,
            ranges,
            {}
            if alone
            else {k: r for k, r in able.realized.items() if k in used or not (spare or self.machine.is_gpu)},
            tuple(Candidate(k.name, k.sizes, reasons[k.name]) for k in considered),
            entry.measurements if entry else (),
        )

    def _symbol(self, wanted: str) -> str:
        taken = {choice.name for choice in self._choices.values()}
        names = [wanted, *(f"{wanted}__{number}" for number in range(2, len(taken) + 3))]
        return next(name for name in names if name not in taken)

    def _check_entry(self, entry: Entry, able: _Able) -> None:
        if self.machine.is_gpu and len({part.kernel for part in entry.ranges}) > 1:
            raise PlanError(
                f"The plan given wants several kernels for {entry.problem}, but on a GPU one kernel serves all sizes."
            )
        for part in entry.ranges:
            if part.kernel not in able.realized:
                reason = able.reasons.get(part.kernel, "no kernel has this name")
                raise PlanError(
                    f"The plan given wants {part.kernel!r} for {entry.problem} at {part}, which cannot "
                    f"serve it: {reason}."
                )
            valid = able.realized[part.kernel].kernel.sizes
            for axis in entry.axes:
                (first, last), (low, high) = part.sizes[axis], valid[axis]
                if first < low or (high is not None and (last is None or last > high)):
                    raise PlanError(
                        f"The plan given wants {part.kernel!r} for {entry.problem} at {part}, but it is "
                        f"valid for {valid}."
                    )

    def _able(self, problem: Problem, site: str, entry: Entry | None) -> _Able:
        """Try every kernel of the operator, and keep those that read the weight in one layout."""
        kernels = [k for k in self._given if k.operator == problem.operator]
        shipped = built_in(problem, self.machine)
        for kernel in kernels:
            if kernel.name in {k.name for k in shipped}:
                raise _clash(kernel.name)
        reasons: dict[str, str] = {}
        able: list[tuple[Kernel, Realized]] = []
        for kernel in [*kernels, *shipped]:
            outcome = self._try(kernel, problem, site)
            if isinstance(outcome, str):
                reasons[kernel.name] = outcome
            elif self._selection == "pinned" and entry is None and not kernel.sizes.everything:
                reasons[kernel.name] = (
                    "selection is pinned to one kernel for all sizes, and it is not valid for all"
                )
            else:
                able.append((kernel, outcome))
        wanted = entry.layout if entry is not None else _layout_name(able[0][1])
        for kernel, realized in able:
            name = _layout_name(realized)
            if name == wanted:
                continue
            if kernel in self._given and entry is None:
                raise KernelError(
                    f"At {site}, kernel {able[0][0].name!r} reads the weight {wanted} and {kernel.name!r} reads it "
                    f"{name}; a weight is stored once, so give both one layout, or separate their sites."
                )
            reasons[kernel.name] = f"reads the weight {name}, which is stored {wanted} here"
        kept = [(kernel, realized) for kernel, realized in able if _layout_name(realized) == wanted]
        if not kept:
            raise PlanError(
                f"The plan given stores the weight of {problem.name} as {wanted!r}, which no kernel reads."
            )
        return _Able(
            tuple(kernel for kernel, _ in kept),
            {kernel.name: realized for kernel, realized in kept},
            kept[0][1].layout,
            reasons,
        )

    def _try(self, kernel: Kernel, problem: Problem, site: str) -> Realized | str:
        """A kernel for this problem, or why there is none."""
        if not kernel.serves(site):
            return f"is for the sites {', '.join(kernel.sites)}"
        missing = sorted(kernel.features - self.machine.features)
        if missing:
            return f"needs {', '.join(missing)}, which {self.machine.name} lacks"
        if self.machine.is_gpu:
            return try_for_gpu(kernel, problem, self.machine, given=kernel in self._given)
        if isinstance(problem, Matmul):
            if problem.weight_format not in kernel.weights:
                return f"reads weights as {', '.join(sorted(kernel.weights))}, not {problem.weight_format}"
            if kernel.layout == "tiled" and problem.gated and not {"activation", "gate"} <= kernel.absorbs:
                return "reads the tiled layout, in which gate and up alternate, but does not absorb activation and gate"
        cache = getattr(problem, "cache", None)
        if cache is not None and cache not in kernel.weights:
            return f"reads caches as {', '.join(sorted(kernel.weights))}, not {cache}"
        if not isinstance(problem, Matmul) and kernel not in self._given:
            symbol = f"{kernel.name}__{problem.name}"
            operands = operator_of(problem).launched(problem, None)
            return Realized(kernel, problem, symbol, build(problem, self.machine), operands)
        try:
            return realize(kernel, problem, self.machine)
        except Declined as reason:
            return f"declined: {reason}"


def _clash(name: str) -> KernelError:
    return KernelError(f"Two kernels have the name {name!r}; give one of them another with name=.")


def _require_total(kernels: Sequence[Kernel], axes: Sequence[str], site: str, layout: Layout | None) -> None:
    boxes = [kernel.sizes for kernel in kernels]
    for cell in cells(axes, boxes):
        if not any(corner(cell) in box for box in boxes):
            which = f" that reads the weight {layout.name}" if layout else ""
            raise KernelError(
                f"At {site}, no kernel{which} serves {cell}: {', '.join(kernel.name for kernel in kernels)} leave it "
                "over, and the built-in kernels read other layouts. Give a kernel for the rest."
            )


def _layout_name(realized: Realized) -> str:
    return realized.layout.name if realized.layout else ""


def _is_direct(problem: Problem, able: _Able) -> bool:
    """Whether the one kernel is the one that the model can call itself."""
    return not isinstance(problem, Matmul) or able.kernels[0].name == "tiled"
