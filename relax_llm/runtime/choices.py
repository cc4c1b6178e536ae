"""Which kernel where: rules that say it, made from the plan, from a kernel that is forced, and from other plans."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.manifest import Dispatcher, Served
from relax_llm.errors import ArtifactError, InputError, PlanError
from relax_llm.plan.plan import Entry, Plan, parts_of
from relax_llm.plan.sizes import Bounds, Box, cells, corner

Key = tuple[str, str]
"""A site and the symbol of its dispatcher."""

Part = tuple[tuple[Bounds, ...], int]
"""Bounds of each axis, and the index of the kernel that serves what is inside."""

Layer = dict[Key, tuple[Part, ...]]
"""What serves some sizes at some places; where it says nothing, the layers under it do."""


@dataclass(frozen=True)
class Place:
    """A site where a kernel is chosen among several.

    Attributes:
        site: Where in the model.
        symbol: The dispatcher's name in the library.
        operator: What is computed there.
        axes: Names of the sizes that the choice depends on.
        kernels: All kernels, in the order of their indices, with the sizes each is valid for.
        planned: What the artifact's own plan does; total.
        pinned: Index of the kernel that serves every size where results must not depend on sizes; None: there is none.
    """

    site: str
    symbol: str
    operator: str
    axes: tuple[str, ...]
    kernels: tuple[tuple[str, Box], ...]
    planned: tuple[Part, ...]
    pinned: int | None

    @property
    def key(self) -> Key:
        """What tells it from other places."""
        return self.site, self.symbol

    def index(self, kernel: str) -> int | None:
        """The index of a kernel, if it is one of those here."""
        return next((index for index, (name, _) in enumerate(self.kernels) if name == kernel), None)

    def part(self, sizes: Box, index: int) -> Part:
        """A kernel for some sizes."""
        return tuple(bounds for _, bounds in sizes.within(self.axes).bounds), index

    def listed(self) -> str:
        """Its kernels, for messages: "my_gemv (M = 1..8), tiled (every size)"."""
        return ", ".join(f"{name} ({sizes})" for name, sizes in self.kernels)


@dataclass(frozen=True)
class Fixed:
    """A launch that always runs the same kernel.

    Attributes:
        site: Where in the model.
        operator: What is computed.
        kernel: The kernel's name in the plan; where the plan does not know it, its symbol.
    """

    site: str
    operator: str
    kernel: str


class Rule:
    """The kernel for each size at a place: the first part that holds the sizes says it."""

    def __init__(self, symbol: str, parts: Sequence[Part]) -> None:
        """Make a rule of parts that are total together."""
        self.symbol = symbol
        self._parts = tuple(parts)
        self._known: dict[tuple[int, ...], int] = {}

    def __call__(self, sizes: tuple[int, ...]) -> int:
        """The index of the kernel for some sizes, in the order of the axes.

        Raises:
            ArtifactError: The parts are not total.
        """
        known = self._known.get(sizes)
        if known is not None:
            return known
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        for bounds, index in self._parts:
            if all(
                first <= size and (last is None or size <= last)
                for size, (first, last) in zip(sizes, bounds, strict=True)
            ):
                self._known[sizes] = index
                return index
        raise ArtifactError(
            f"No kernel of {self.symbol} serves the sizes {sizes}; compile the artifact again."
        )


_REMEMBERED = 1024
_TOKENS = ("M", "seq")  # axes that count the tokens of a sequence


def tokens_alike(place: Place, parts: Sequence[Part]) -> int | None:
    """How many tokens of one sequence, at most, the kernel serves that serves one alone; None: any number.

    Args:
        place: Where.
        parts: What serves each size there; total, and the first that holds a size counts.
    """
    rule, axes = Rule(place.symbol, parts), place.axes
    boxes = [Box(tuple(zip(axes, bounds, strict=True))) for bounds, _ in parts]
    counts = []
    for sizes in map(corner, cells(axes, boxes)):
        alone = {axis: 1 if axis in _TOKENS else size for axis, size in sizes.items()}
        if sizes.get("batch", 1) == 1 and rule(tuple(sizes.values())) != rule(tuple(alone.values())):
            counts.append(max(size for axis, size in sizes.items() if axis in _TOKENS) - 1)
    return min(counts, default=None)


def places(artifact: Artifact) -> dict[Key, Place]:
    """Every place of a model where there is a choice.

    Raises:
        ArtifactError: The manifest contradicts itself.
    """
    manifest = artifact.manifest
    found: dict[Key, Place] = {}
    for launch in (launch for launches in manifest.functions.values() for launch in launches):
        dispatcher = manifest.dispatchers.get(launch.kernel)
        key = launch.site, launch.kernel
        if dispatcher is None or key in found:
            continue
        try:
            operator = manifest.kernels[launch.kernel].operator
            found[key] = _place(launch.site, launch.kernel, operator, dispatcher)
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise ArtifactError(
                f"{artifact.path}: the manifest's dispatcher {launch.kernel} is not usable ({error}); compile again."
            ) from error
    return found


def _place(site: str, symbol: str, operator: str, dispatcher: Dispatcher) -> Place:
    kernels = tuple((served.kernel, Box.from_json(served.sizes)) for served in dispatcher.kernels)
    place = Place(site, symbol, operator, dispatcher.axes, kernels, (), None)

    def index(name: str) -> int:
        found = place.index(name)
        if found is None:
            raise ValueError(f"there is no kernel {name!r}")
        return found

    def part(served: Served) -> Part:
        return place.part(Box.from_json(served.sizes), index(served.kernel))

    planned = tuple(part(served) for served in dispatcher.ranges)
    pinned = index(dispatcher.pinned) if dispatcher.pinned else None
    return Place(site, symbol, operator, dispatcher.axes, kernels, planned, pinned)


def matching(
    pattern: str, known: Mapping[Key, Place], fixed: Iterable[Fixed]
) -> tuple[list[Place], list[Fixed]]:
    """The places, and the launches without a choice, whose site or a part of it matches a pattern.

    Raises:
        InputError: There are none.
    """

    def matches(site: str) -> bool:
        return any(fnmatchcase(part, pattern) for part in parts_of(site))

    chosen = [place for place in known.values() if matches(place.site)]
    others = [launch for launch in fixed if matches(launch.site)]
    if chosen or others:
        return chosen, others
    sites = list(dict.fromkeys([*(place.site for place in known.values()), *(one.site for one in fixed)]))
    last = pattern.rpartition(".")[2]
    near = [site for site in sites if any(part.rpartition(".")[2] == last for part in parts_of(site))]
    raise InputError(f"No site matches {pattern!r}; sites are named like {', '.join((near or sites)[:5])}.")


def forced(pattern: str, kernel: str, known: Mapping[Key, Place], fixed: Sequence[Fixed]) -> Layer:
    """A layer in which a kernel serves all it is valid for, at every site that a pattern matches and that has it.

    Raises:
        InputError: No site matches, or none of them has such a kernel; those there are are listed.
    """
    chosen, others = matching(pattern, known, fixed)
    layer: Layer = {}
    for place in chosen:
        index = place.index(kernel)
        if index is not None:
            layer[place.key] = (place.part(place.kernels[index][1], index),)
    if layer:
        return layer
    lines = dict.fromkeys(place.listed() for place in chosen)
    lines |= dict.fromkeys(f"{one.kernel} (the only one for its {one.operator})" for one in others)
    listed = "; ".join(list(lines)[:_LISTED])
    raise InputError(f"No kernel {kernel!r} can be forced at {pattern!r}; there are: {listed}.")


_LISTED = 8


def planned(plan: Plan, own: Plan, known: Mapping[Key, Place], fixed: Sequence[Fixed]) -> Layer:
    """A layer in which another plan's entries serve the sites they name.

    Raises:
        PlanError: The plan names no site of the artifact, or asks at one for what its library cannot do.
    """
    layer: Layer = {}
    at: dict[tuple[str, str], list[Place]] = {}
    for place in known.values():
        at.setdefault((place.site, place.operator), []).append(place)
    layouts = {
        (site, entry.operator, entry.problem): entry.layout for entry in own.entries for site in entry.sites
    }
    for entry in plan.entries:
        for site in entry.sites:
            there = at.get((site, entry.operator), [])
            if len(there) > 1:
                there = [place for place in there if place.symbol.startswith(entry.problem)]
            for place in there:
                stored = layouts.get((site, entry.operator, entry.problem), entry.layout)
                if stored != entry.layout:
                    raise PlanError(
                        f"The plan reads the weight of {site} {entry.layout}, but the artifact stores it {stored}; "
                        "compile with this plan."
                    )
                layer[place.key] = _parts(entry, place)
            if not there:
                _check_fixed(entry, site, fixed)
    return layer


def _parts(entry: Entry, place: Place) -> tuple[Part, ...]:
    if set(entry.axes) != set(place.axes):
        raise PlanError(
            f"The plan chooses at {place.site} by {', '.join(entry.axes)}, but the artifact by {', '.join(place.axes)}."
        )
    parts = []
    for part in entry.ranges:
        index = place.index(part.kernel)
        if index is None:
            raise PlanError(
                f"The plan gives {place.site} the kernel {part.kernel!r}, which is not in the artifact; there are: "
                f"{place.listed()}. Compile with this plan."
            )
        valid = place.kernels[index][1]
        if not all(_within(part.sizes[axis], valid[axis]) for axis in place.axes):
            raise PlanError(
                f"The plan gives {place.site} the kernel {part.kernel!r} for {part.sizes}; it is valid for {valid}."
            )
        parts.append(place.part(part.sizes, index))
    return tuple(parts)


def _within(inner: Bounds, outer: Bounds) -> bool:
    return inner[0] >= outer[0] and (outer[1] is None or (inner[1] is not None and inner[1] <= outer[1]))


def _check_fixed(entry: Entry, site: str, fixed: Sequence[Fixed]) -> None:
    there = [one.kernel for one in fixed if (one.site, one.operator) == (site, entry.operator)]
    if not there:
        raise PlanError(f"The plan has the {entry.operator} of {site!r}, but the artifact has no such site.")
    for part in entry.ranges:
        if part.kernel not in there:
            raise PlanError(
                f"The plan gives {site} the kernel {part.kernel!r}, but the artifact has only {there[0]!r} there. "
                "Compile with this plan."
            )
