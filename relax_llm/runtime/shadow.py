"""A second computation beside launches of a running model: both results are compared, the first difference kept.

The model goes on with what its own kernels give; of the shadow nothing stays but what it found.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.manifest import Manifest
from relax_llm.errors import InputError
from relax_llm.numerics import bounds
from relax_llm.numerics.difference import difference
from relax_llm.plan.plan import parts_of
from relax_llm.runtime.choices import Place
from relax_llm.runtime.control import Line
from relax_llm.runtime.launch import Launch
from relax_llm.runtime.results import residual_of, results
from relax_llm.runtime.stepper import Steps

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Expected:
    """What a launch should give for one of its results.

    Attributes:
        right: The result.
        bound: How far from it an honest kernel may be, element by element.
    """

    right: Array
    bound: Array


class Standard(Protocol):
    """What says of any launch what is right."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def expected(self, launch: Launch, artifact: Manifest) -> Sequence[Expected] | None:
        """What a launch that is about to be made should give, in the order of `results`; None: it cannot say."""
        ...


Beside = str | Callable[..., Any] | Standard
"""A kernel's name, a function of the inputs that returns the outputs, or what says what is right."""


@dataclass(frozen=True)
class Disagreement:
    """A launch whose kernel and shadow give different results.

    Attributes:
        call: Number of the call since the shadow began, from 0.
        function: What was called.
        index: The launch's place in it.
        site: Where in the model.
        operator: What is computed.
        kernel: What computed it.
        shadow: What was beside it.
        sizes: The launch's sizes.
        result: Which of its results: "" for the output, "k_cache", "v_cache".
        element: Where in the result; of a cache as [batch, head, token, channel].
        value: What the kernel gave there.
        expected: What the shadow gave.
        off: The difference, as a share of the largest in its row; beside a standard, in bounds.
        bound: How far it may be off.
    """

    call: int
    function: str
    index: int
    site: str
    operator: str
    kernel: str
    shadow: str
    sizes: Mapping[str, int]
    result: str
    element: tuple[int, ...]
    value: float
    expected: float
    off: float
    bound: float

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        of = f" of {self.result}" if self.result else ""
        return (
            f"{self.site}, {self.operator} by {self.kernel} (call {self.call}, {self.function}[{self.index}]; "
            f"{sizes}): element {list(self.element)}{of} is {self.value:.8g}, and by {self.shadow} "
            f"{self.expected:.8g}: off by {self.off:.1e}, where {self.bound:.1e} is allowed"
        )


class Shadow:
    """What a shadow has found so far.

    Attributes:
        launches: How many launches it was beside.
        passed: How many launches of these sites it could not be beside: the kernel serves there already, or is not
            valid for these sizes; or the standard cannot say.
        disagreements: How many were over the bound.
        first: The first of them.
        sites: All sites where one was, in the order in which they were found.
        worst: The largest difference, in bounds.
    """

    def __init__(
        self,
        site: str,
        beside: Beside,
        operator: str,
        bound: float | None,
        lines: Iterable[Line],
        manifest: Manifest,
    ) -> None:
        """Begin; made by `Runner.shadow`.

        Raises:
            InputError: No launch matches, or none has such a kernel.
        """
        self.launches = self.passed = self.disagreements = 0
        self.first: Disagreement | None = None
        self.sites: tuple[str, ...] = ()
        self.worst = 0.0
        self._site, self._operator = site, operator
        self._beside = beside
        self._bound = bound
        self._manifest = manifest
        self._calls = 0
        self._check(lines)

    @property
    def name(self) -> str:
        """What stands beside."""
        if isinstance(self._beside, str):
            return self._beside
        return str(getattr(self._beside, "name", getattr(self._beside, "__name__", "a function")))

    def matches(self, site: str, operator: str) -> bool:
        """Whether a launch is one that it stands beside."""
        return fnmatchcase(operator, self._operator) and any(
            fnmatchcase(part, self._site) for part in parts_of(site)
        )

    def begin(self, launch: Launch) -> Callable[[], None]:
        """Compute beside a launch that is about to be made; what is returned judges it when it has been made."""
        if isinstance(self._beside, str) and (
            self._beside == launch.kernel or self._beside not in launch.kernels
        ):
            self.passed += 1
            return lambda: None
        if isinstance(self._beside, str) or callable(self._beside):
            with launch.trying(self._beside):
                computed = [result.value.copy() for result in results(launch)]
            return lambda: self._compare(launch, computed)
        expected = self._beside.expected(launch, self._manifest)
        return lambda: self._judge(launch, expected)

    def ended(self) -> None:
        """Count a call."""
        self._calls += 1

    def to_json(self) -> str:
        """What was found, as text; numbers that are not finite as strings."""
        first = None if self.first is None else asdict(self.first)
        numbers = {"worst": self.worst, **(first or {})}
        odd = {
            name: str(value)
            for name, value in numbers.items()
            if isinstance(value, float) and not isfinite(value)
        }
        data = {
            "shadow": self.name,
            "launches": self.launches,
            "passed": self.passed,
            "disagreements": self.disagreements,
            "sites": self.sites,
            "worst": odd.pop("worst", self.worst),
            "first": first and {**first, **odd},
        }
        return json.dumps(data, indent=1, allow_nan=False)

    def __str__(self) -> str:
        if not self.launches:
            return f"{self.name} stood beside no launch; {self.passed} matched."
        if self.first is None:
            return f"{self.name} agrees at {self.launches} launches; the largest difference is {self.worst:.2g} bounds."
        count, word = len(self.sites), "site" if len(self.sites) == 1 else "sites"
        return (
            f"{self.name} disagrees at {self.disagreements} of {self.launches} launches, at {count} {word}; "
            f"first at {self.first}."
        )

    def _check(self, lines: Iterable[Line]) -> None:
        places = {at for line in lines for _, at in line.launches}
        there = [at for at in places if self.matches(at.site, at.operator)]
        if not there:
            sites = ", ".join(sorted({at.site for at in places})[:5])
            raise InputError(f"No launch matches {self._site!r}; sites are named like {sites}.")
        if isinstance(self._beside, str):
            known = {
                name
                for at in there
                for name in ([kernel for kernel, _ in at.kernels] if isinstance(at, Place) else [at.kernel])
            }
            if self._beside not in known:
                raise InputError(
                    f"No kernel {self._beside!r} can stand beside those at {self._site!r}; there are: "
                    f"{', '.join(sorted(known))}."
                )

    def _compare(self, launch: Launch, expected: Sequence[Array]) -> None:
        self.launches += 1
        problem = self._manifest.kernels[launch.symbol].problem
        bound = self._bound
        if bound is None:
            bound = bounds.share(launch.operator, problem, launch.sizes["kv_len"], ("f32", "f32"))
        worst: Disagreement | None = None
        for result, right in zip(results(launch), expected, strict=True):
            found = difference(result.value, right, None if result.name else residual_of(launch, problem))
            if worst is None or found.relative > worst.off:
                worst = self._said(
                    launch, result.name, found.index, found.value, found.reference, found.relative, bound
                )
        if worst is not None:
            self._note(worst)

    def _judge(self, launch: Launch, expected: Sequence[Expected] | None) -> None:
        if expected is None:
            self.passed += 1
            return
        self.launches += 1
        allowed = 1.0 if self._bound is None else self._bound
        worst: Disagreement | None = None
        for result, said in zip(results(launch), expected, strict=True):
            value = result.value.astype(np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                off = np.abs(value - said.right)
                off = np.where((off == 0) | (np.isnan(value) & np.isnan(said.right)), 0.0, off / said.bound)
            off[np.isnan(off)] = np.inf
            at = np.unravel_index(int(off.argmax()), off.shape)
            if worst is None or off[at] > worst.off:
                index = tuple(int(i) for i in at)
                worst = self._said(
                    launch,
                    result.name,
                    index,
                    float(value[at]),
                    float(said.right[at]),
                    float(off[at]),
                    allowed,
                )
        if worst is not None:
            self._note(worst)

    def _said(
        self,
        launch: Launch,
        result: str,
        element: tuple[int, ...],
        value: float,
        expected: float,
        off: float,
        bound: float,
    ) -> Disagreement:
        return Disagreement(
            self._calls,
            launch.function,
            launch.index,
            launch.site,
            launch.operator,
            launch.kernel,
            self.name,
            dict(launch.sizes),
            result,
            element,
            value,
            expected,
            off,
            bound,
        )

    def _note(self, found: Disagreement) -> None:
        if found.off:
            self.worst = max(self.worst, found.off / found.bound if found.bound else np.inf)
        if not found.off <= found.bound:
            self.disagreements += 1
            self.first = self.first or found
            if found.site not in self.sites:
                self.sites = (*self.sites, found.site)


def through(steps: Steps, shadows: Sequence[Shadow]) -> Array:
    """Make all launches of a call, each with the shadows that it has; the result of the call."""
    with steps:
        for launch in steps:
            begun = [
                shadow.begin(launch) for shadow in shadows if shadow.matches(launch.site, launch.operator)
            ]
            launch.run()
            for judge in begun:
                judge()
        for shadow in shadows:
            shadow.ended()
        return steps.logits
