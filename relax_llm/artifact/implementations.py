"""Every kernel of an artifact that can be called, and finding one by its name, its site or its sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relax_llm.artifact.manifest import Launch, Manifest
from relax_llm.errors import InputError
from relax_llm.plan.plan import Plan, parts_of
from relax_llm.plan.sizes import Box

_LISTED = 6


@dataclass(frozen=True)
class Implementation:
    """One way in which the library computes something.

    Attributes:
        kernel: The kernel's name in the plan; for a dispatcher, which takes the plan's kernel at each size, its symbol.
        operator: What it computes.
        symbol: What the model calls.
        code: The symbol of the kernel's own code in the listings.
        index: Its index among the dispatcher's kernels; None where the model calls it itself.
        sizes: What it is valid for.
        launches: Where the model launches it.
    """

    kernel: str
    operator: str
    symbol: str
    code: str
    index: int | None
    sizes: Box
    launches: tuple[Launch, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """The places in the model."""
        return tuple(dict.fromkeys(launch.site for launch in self.launches))

    @property
    def example(self) -> Launch:
        """A launch with as many symbolic sizes as any has."""
        return max(self.launches, key=_symbols)

    def is_at(self, site: str) -> bool:
        """Whether it serves a site, named as a whole or by a part."""
        return any(site in parts_of(known) for known in self.sites)

    def __str__(self) -> str:
        more = f" and {len(self.sites) - 1} more" if len(self.sites) > 1 else ""
        name = self.kernel if self.kernel == self.symbol else f"{self.kernel} of {self.symbol}"
        return f"{name} ({self.sizes}) at {self.sites[0]}{more}"


def implementations(
    manifest: Manifest, plan: Plan, codes: Mapping[str, Mapping[str, str]]
) -> list[Implementation]:
    """All that can be called, dispatchers included, in the order of the launches.

    Args:
        manifest: The artifact's.
        plan: Likewise.
        codes: For each dispatcher the symbols of its kernels' code, as the listings have them.
    """
    launches: dict[str, list[Launch]] = {}
    for function in manifest.functions.values():
        for launch in function:
            launches.setdefault(launch.kernel, []).append(launch)
    found = []
    for symbol, there in launches.items():
        operator = manifest.kernels[symbol].operator
        dispatcher = manifest.dispatchers.get(symbol)
        name = _single(plan, there[0].site, operator) if dispatcher is None else None
        found.append(Implementation(name or symbol, operator, symbol, symbol, None, Box(), tuple(there)))
        for index, served in enumerate(dispatcher.kernels if dispatcher else ()):
            code = codes.get(symbol, {}).get(served.kernel, symbol)
            sizes = Box.from_json(served.sizes)
            found.append(Implementation(served.kernel, operator, symbol, code, index, sizes, tuple(there)))
    return found


def find(
    known: Sequence[Implementation],
    manifest: Manifest,
    name: str | None,
    site: str | None,
    operator: str | None,
    sizes: Mapping[str, int],
) -> Implementation:
    """The one kernel that is meant.

    Args:
        known: All there are.
        manifest: The artifact's.
        name: A kernel's name in the plan, or a symbol; None: the plan's kernel.
        site: A place in the model.
        operator: What is computed there, where that is not one thing.
        sizes: At which sizes; without a name they decide by the plan.

    Raises:
        InputError: There is none, or several; they are listed.
    """
    at = [one for one in known if site is None or one.is_at(site)]
    if not at:
        last = (site or "").rpartition(".")[2]
        sites = list(dict.fromkeys(place for one in known for place in one.sites))
        near = [place for place in sites if any(part.rpartition(".")[2] == last for part in parts_of(place))]
        raise InputError(f"There is no site {site!r}; sites are named like {', '.join((near or sites)[:5])}.")
    where = f" at {site}" if site else ""
    named = [one for one in at if operator in (None, one.operator)]
    if name is None:
        chosen = [one for one in named if _is_planned(one, manifest, sizes)]
    else:
        chosen = [one for one in named if name in (one.kernel, one.symbol, one.code)]
        exact = [
            one
            for one in chosen
            if name in (one.symbol, one.code) and (one.index is None or name == one.code)
        ]
        chosen = exact or chosen
    valid = [one for one in chosen if not sizes.keys() >= dict(one.sizes.bounds).keys() or sizes in one.sizes]
    if len(valid) == 1:
        return valid[0]
    said = repr(name) if name else "kernel"
    if len(valid) > 1:
        what = f"{said} is not one kernel{where}" if name else f"More than one kernel is meant{where}"
        ways = "a site, an operator" if site is None else "an operator"
        raise InputError(f"{what}; say {ways} or another name. There are: {_listed(valid)}.")
    if chosen:
        asked = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
        raise InputError(f"{said} does not serve {asked}{where}; there are: {_listed(chosen)}.")
    raise InputError(f"There is no kernel {said}{where}; there are: {_listed(named or at)}.")


def _is_planned(one: Implementation, manifest: Manifest, sizes: Mapping[str, int]) -> bool:
    """Whether the plan has a kernel for some sizes; without sizes, whether it is what the model calls."""
    dispatcher = manifest.dispatchers.get(one.symbol)
    if dispatcher is None or not sizes.keys() >= set(dispatcher.axes):
        return one.index is None
    ranges = (part for part in dispatcher.ranges if part.kernel == one.kernel)
    return one.index is not None and any(sizes in Box.from_json(part.sizes) for part in ranges)


def _listed(found: Sequence[Implementation]) -> str:
    alone = len({one.symbol for one in found}) == 1
    lines = list(dict.fromkeys(f"{one.kernel} ({one.sizes})" if alone else str(one) for one in found))
    rest = f"{', ' if alone else '; '}and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return (", " if alone else "; ").join(lines[:_LISTED]) + rest


def _single(plan: Plan, site: str, operator: str) -> str | None:
    """The plan's name for the only kernel of an operator at a site."""
    for entry in plan.entries:
        names = {part.kernel for part in entry.ranges}
        if site in entry.sites and entry.operator == operator and len(names) == 1:
            return names.pop()
    return None


def _symbols(launch: Launch) -> int:
    sizes = {size for argument in launch.arguments for size in argument.shape}
    return sum(not size.isdecimal() for size in sizes)
