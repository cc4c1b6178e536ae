"""Where stepped runs stop: before launches by place, kernel, operator and size, or behind them by what they did."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from relax_llm.errors import InputError
from relax_llm.plan.kernel import AXES
from relax_llm.plan.plan import parts_of
from relax_llm.runtime.choices import Place
from relax_llm.runtime.conditions import SizeCondition
from relax_llm.runtime.control import Line
from relax_llm.runtime.difference import difference, not_finite
from relax_llm.runtime.watching import Watched, watchable

if TYPE_CHECKING:
    from relax_llm.runtime.launch import Launch

Array = npt.NDArray[Any]
Where = str | Callable[["Launch"], bool]
Reference = Callable[..., Any] | Array | tuple[Array, ...] | Mapping[str, Any]


@dataclass(eq=False)
class Breakpoint:
    """One condition on which stepped runs stop. All that is said must hold.

    Attributes:
        number: What it is called in tables; 0 for one that is not kept.
        function: Pattern of the functions in which it stops.
        site: Pattern of sites; one that was fused answers to its parts.
        kernel: Pattern of kernels.
        operator: Pattern of operators.
        where: Asked before the launch: about its sizes, or about all of it.
        after: Asked behind it.
        nan: Stop behind a launch with a NaN or an infinity in its outputs.
        differs: Stop behind a launch whose outputs differ from this: a function of the inputs, the outputs themselves,
            or outputs by site.
        bound: The largest difference that is none, as a share of the largest number expected; 0 is every bit.
        watched: Stop behind a launch that changes this.
        hits: How often it has stopped a run.
    """

    number: int = 0
    function: str = "*"
    site: str = "*"
    kernel: str = "*"
    operator: str = "*"
    where: SizeCondition | Callable[["Launch"], bool] | None = None
    after: Callable[["Launch"], bool] | None = None
    nan: bool = False
    differs: Reference | None = None
    bound: float = 0.0
    watched: Watched | None = None
    hits: int = field(default=0, init=False)
    _places: dict[str, frozenset[int]] = field(default_factory=dict, init=False)

    @property
    def behind(self) -> bool:
        """Whether it stops behind launches, and not before them."""
        return bool(self.after or self.nan or self.differs is not None or self.watched)

    def reaches(self, function: str, line: Line) -> frozenset[int]:
        """The launches of a runner's function that it may stop at, worked out once."""
        if function not in self._places:
            self._places[function] = self.places(line) if self.is_in(function) else frozenset()
        return self._places[function]

    def is_in(self, function: str) -> bool:
        """Whether it stops in a function of this name."""
        return fnmatchcase(function, self.function)

    def places(self, line: Line) -> frozenset[int]:
        """The launches of a function, by index, that it may stop at."""
        return frozenset(
            index
            for index, (_, at) in enumerate(line.launches)
            if any(fnmatchcase(part, self.site) for part in parts_of(at.site))
            and fnmatchcase(at.operator, self.operator)
            and any(fnmatchcase(kernel, self.kernel) for kernel in kernels_of(at))
            and self._has_sizes(at.operator)
        )

    def _has_sizes(self, operator: str) -> bool:
        if not isinstance(self.where, SizeCondition) or "M" not in self.where.names:
            return True
        return "M" in AXES.get(operator, ())

    def asks(self, launch: "Launch") -> bool:
        """Whether a launch at one of its places is one that it means."""
        if self.kernel != "*" and not fnmatchcase(launch.kernel, self.kernel):
            return False
        if isinstance(self.where, SizeCondition):
            return self.where(launch.sizes)
        return self.where is None or bool(self.where(launch))

    def before(self, launch: "Launch") -> Any:
        """What must be kept of a launch until `verdict`: the reference's outputs on the inputs as they are now."""
        if self.differs is None:
            return None
        if callable(self.differs):
            inputs = [
                o.value if o.role == "weight" else o.value.copy()
                for o in launch.arguments
                if o.role not in ("size", "output")
            ]
            return launch.fitting(self.differs(*inputs), "reference")
        if isinstance(self.differs, Mapping):
            recorded = next(
                (self.differs[part] for part in parts_of(launch.site) if part in self.differs), None
            )
            return None if recorded is None else launch.fitting(recorded, "recorded value")
        return launch.fitting(self.differs, "recorded value")

    def verdict(self, launch: "Launch", kept: Any) -> str | None:
        """Why to stop behind a launch, as a sentence without its end; None: go on."""
        if self.after is not None and not self.after(launch):
            return None
        reasons: list[str | None] = [] if self.after is None else ["what is asked behind it holds"]
        if self.nan:
            reasons.append(not_finite(launch.outputs))
        if self.differs is not None:
            reasons.append(None if kept is None else difference(launch.outputs, kept, self.bound))
        return None if None in reasons else ", and ".join(filter(None, reasons))

    def __str__(self) -> str:
        said = [
            f"{name} {value}"
            for name, value in (
                ("function", self.function),
                ("site", self.site),
                ("kernel", self.kernel),
                ("operator", self.operator),
            )
            if value != "*"
        ]
        if self.where is not None:
            said.append(self.where.text if isinstance(self.where, SizeCondition) else "a question before it")
        if self.after is not None:
            said.append("a question behind it")
        if self.nan:
            said.append("a NaN or an infinity in an output")
        if self.differs is not None:
            said.append(
                f"an output that differs by more than {self.bound:g}" if self.bound else "another output"
            )
        if self.watched is not None:
            said.append(f"{self.watched} changes")
        return ", ".join(said) or "every launch"

    def __repr__(self) -> str:
        return f"<breakpoint {self.number}: {self}, {self.hits} hits>"


@dataclass(frozen=True)
class Stop:
    """Why a run stopped.

    Attributes:
        launch: Where.
        breakpoint: What stopped it.
        reason: A sentence without its end.
    """

    launch: "Launch"
    breakpoint: Breakpoint
    reason: str

    def __str__(self) -> str:
        number = f"breakpoint {self.breakpoint.number}, " if self.breakpoint.number else ""
        return f"{number}{'behind' if self.launch.done else 'before'} {self.launch}: {self.reason}"


class Breakpoints:
    """A runner's breakpoints. They hold in every function and every call until they are removed.

    `Steps.run`, `run_until` and `step` stop at them; plain runs, `finish`, `detach` and iterating do not.
    """

    def __init__(self, lines: Mapping[str, Line], tensors: frozenset[str]) -> None:
        """There are none.

        Args:
            lines: The launches of each function.
            tensors: Names of weights and caches.
        """
        self._lines = lines
        self._tensors = tensors
        self._all: list[Breakpoint] = []
        self._numbers = 0

    def add(
        self,
        *,
        site: str = "*",
        kernel: str = "*",
        operator: str = "*",
        function: str = "*",
        where: Where | None = None,
        after: Callable[["Launch"], bool] | None = None,
        nan: bool = False,
        differs: Reference | None = None,
        bound: float = 0.0,
    ) -> Breakpoint:
        """Stop at launches that all of this is true of.

        ::

            runner.breakpoints.add(site="layers.3.self_attn")
            runner.breakpoints.add(operator="matmul", where="M=17")
            runner.breakpoints.add(nan=True)
            runner.breakpoints.add(site="norm", differs=norm_in_numpy, bound=1e-5)

        Args:
            site: Pattern of sites; one that was fused answers to its parts.
            kernel: Pattern of kernels.
            operator: Pattern of operators.
            function: Pattern of functions.
            where: Sizes, as in "M=17", "kv_len>300", "seq=1, M=1..8"; or a function that is asked before the launch.
            after: Asked behind it; the run stops there.
            nan: Stop behind a launch that leaves a NaN or an infinity in an output.
            differs: Stop behind a launch whose outputs are not these: a function of the inputs that returns the
                outputs; the outputs, an array or several in a tuple; or such by site.
            bound: For `differs`: the largest difference that is none, as a share of the largest number expected; 0:
                every bit.

        Raises:
            InputError: No launch of the model can be meant, or the condition cannot be read.
        """
        made = breakpoint_of(
            site=site,
            kernel=kernel,
            operator=operator,
            function=function,
            where=where,
            after=after,
            nan=nan,
            differs=differs,
            bound=bound,
        )
        self.check(made)
        return self._keep(made)

    def watch(self, tensor: str | Array, part: Any = ...) -> Breakpoint:
        """Stop behind every launch that changes a tensor.

        Args:
            tensor: A weight by name ("layers.3.mlp.down_proj.weight"), a cache ("layers.3.self_attn.k_cache"), the
                outputs of a site ("layers.3.mlp.down_proj") from when they are computed to when they are used no more;
                or an array over any memory. Names may be patterns.
            part: The part of it to watch, as NumPy indexes it: `numpy.s_[:, 0]`.

        Raises:
            InputError: The model has nothing of this name.
        """
        return self._keep(Breakpoint(watched=watchable(tensor, part, self._tensors, self._lines)))

    def remove(self, which: Breakpoint | int) -> None:
        """Take one back, named by its number or itself.

        Raises:
            InputError: There is no such breakpoint.
        """
        kept = [one for one in self._all if one is not which and one.number != which]
        if len(kept) == len(self._all):
            numbers = ", ".join(str(one.number) for one in self._all)
            raise InputError(
                f"There is no breakpoint {getattr(which, 'number', which)}; "
                + (f"there are: {numbers}." if numbers else "there are none.")
            )
        self._all = kept

    def clear(self) -> None:
        """Take all back."""
        self._all = []

    def check(self, made: Breakpoint) -> None:
        """Refuse a breakpoint that no launch can reach.

        Raises:
            InputError: With what there is.
        """
        lines = {name: line for name, line in self._lines.items() if made.is_in(name)}
        if not lines:
            raise InputError(f"There is no function {made.function!r}; there are: {', '.join(self._lines)}.")
        if not any(made.places(line) for line in lines.values()):
            raise InputError(_nothing(made, lines))

    def _keep(self, made: Breakpoint) -> Breakpoint:
        self._numbers += 1
        made.number = self._numbers
        self._all = [*self._all, made]
        return made

    def __iter__(self) -> Iterator[Breakpoint]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __str__(self) -> str:
        """One line for each, with how often it has stopped a run."""
        return "\n".join(
            f"{one.number}  {one}  ({one.hits} {'hit' if one.hits == 1 else 'hits'})" for one in self._all
        )

    def __repr__(self) -> str:
        return str(self) or "no breakpoints"


def breakpoint_of(*, where: Where | None = None, **said: Any) -> Breakpoint:
    """A breakpoint that is not kept, from the arguments of `Breakpoints.add`.

    Raises:
        InputError: The condition on sizes cannot be read, or the bound is none.
    """
    bound = said.get("bound", 0.0)
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound >= 0:
        raise InputError(f"bound must be a number of 0 or above, not {bound!r}.")
    condition = SizeCondition.parse(where) if isinstance(where, str) else where
    return Breakpoint(where=condition, **said)


def kernels_of(at: Any) -> tuple[str, ...]:
    """The kernels that can be launched at a place, at some sizes or at all."""
    return tuple(name for name, _ in at.kernels) if isinstance(at, Place) else (at.kernel,)


def _nothing(made: Breakpoint, lines: Mapping[str, Line]) -> str:
    """Why nothing matches, with the nearest that there is."""
    launches = list(dict.fromkeys(at for line in lines.values() for _, at in line.launches))
    of = "The model" if made.function == "*" else " and ".join(lines)
    sites = list(dict.fromkeys(at.site for at in launches))
    here = [at for at in launches if any(fnmatchcase(part, made.site) for part in parts_of(at.site))]
    if not here:
        last = made.site.rpartition(".")[2]
        near = [site for site in sites if any(part.rpartition(".")[2] == last for part in parts_of(site))]
        return (
            f"{of} launches nothing at {made.site!r}; sites are named like {', '.join((near or sites)[:5])}."
        )
    at = "" if made.site == "*" else f" at {made.site!r}"
    operators = sorted({place.operator for place in here})
    of_operator = [place for place in here if fnmatchcase(place.operator, made.operator)]
    if not of_operator:
        return f"{of} launches no {made.operator!r}{at}; operators there are {', '.join(operators)}."
    kernels = sorted({kernel for place in of_operator for kernel in kernels_of(place)})
    if not any(fnmatchcase(kernel, made.kernel) for kernel in kernels):
        return f"{of} has no kernel {made.kernel!r}{at}; kernels there are {', '.join(kernels)}."
    return f"What {of[0].lower()}{of[1:]} launches{at} has no size M; ask for batch, seq or kv_len."
