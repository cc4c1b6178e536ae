"""A model in step with a reference: each launch beside its counterpart as soon as the reference has come that far."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from relax_llm.artifact.manifest import Manifest
from relax_llm.finding.comparison import SiteDifference
from relax_llm.numerics import bounds
from relax_llm.numerics.difference import Difference, difference
from relax_llm.runtime.launch import Launch
from relax_llm.runtime.results import Result, overwrite, residual_of, results
from relax_llm.runtime.runner import Runner
from relax_llm.runtime.stepper import Steps

Array = npt.NDArray[Any]
Receive = Callable[[Hashable, Array], None]


@dataclass(frozen=True)
class Counterpart:
    """What of a reference a launch is compared with.

    Attributes:
        label: Its name, for people.
        needs: Names of the reference's tensors that it is made of.
        make: Makes of these what the launch's results should be, in their order; None for one that the reference
            does not have.
        weights: How the reference stores the weight.
        factors: Of channels [..., K]: how many times smaller the reference has them than the checkpoint.
    """

    label: str
    needs: tuple[Hashable, ...]
    make: Callable[[Sequence[Array]], list[Array | None]]
    weights: str = "f32"
    factors: Array | None = None


class Reference(Protocol):
    """What a model is compared with."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def weights(self) -> str:
        """How it stores matrices."""
        ...

    def counterparts(self, subject: Runner, function: str) -> list[Counterpart | None]:
        """For each launch of a function of the subject what it is compared with; None where there is nothing."""
        ...

    def run(self, function: str, token_ids: Sequence[int], receive: Receive) -> Array:
        """Go on by some tokens, handing over each tensor as it comes.

        A tensor may change when `receive` has returned.

        Returns:
            Logits [vocab] after the last token.
        """
        ...


class Walk:
    """One call of the subject, made twice: by itself, and held to what the reference computes.

    The second run is given the reference's results after each launch, so that what it makes of them is its own error
    alone. Of the reference no more is kept than what launches still wait for.

    Attributes:
        sites: What was found.
    """

    def __init__(
        self,
        call: int,
        own: Steps,
        held: Steps,
        counterparts: Sequence[Counterpart | None],
        factors: Sequence[Array | None],
        manifest: Manifest,
        bound: float | None,
    ) -> None:
        """Begin; nothing is launched yet.

        Args:
            call: Number of the call.
            own: The call on a state of its own.
            held: The same call, on a state that is held to the reference's.
            counterparts: For each launch.
            factors: For each launch, of the subject's channels, as a counterpart has the reference's.
            manifest: The subject's.
            bound: For every site, in place of its own.
        """
        self.sites: list[SiteDifference] = []
        self._call = call
        self._own, self._held = own, held
        self._counterparts = counterparts
        self._factors = factors
        self._manifest = manifest
        self._bound = bound
        self._at = 0
        self._wanted = Counter(
            name for counterpart in counterparts if counterpart for name in counterpart.needs
        )
        self._waiting: dict[Hashable, Array] = {}

    def receive(self, name: Hashable, value: Array) -> None:
        """Take a tensor of the reference, and go on as far as it leads."""
        if not self._wanted[name]:
            return
        self._waiting[name] = value
        self._advance()
        if name in self._waiting:
            self._waiting[name] = value.copy()

    def finish(self) -> Array:
        """Make what is left, whatever the reference has not given.

        Returns:
            The logits of the run by itself.
        """
        self._advance(to_the_end=True)
        self._held.finish()
        return self._own.finish()

    def _advance(self, *, to_the_end: bool = False) -> None:
        while self._at < len(self._counterparts):
            counterpart = self._counterparts[self._at]
            missing = counterpart is not None and not all(name in self._waiting for name in counterpart.needs)
            if missing and not to_the_end:
                return
            self._launch(None if missing else counterpart)
            self._at += 1

    def _launch(self, counterpart: Counterpart | None) -> None:
        own, held = next(self._own), next(self._held)
        own.run()
        held.run()
        if counterpart is None:
            return
        expected = counterpart.make([self._waiting[name] for name in counterpart.needs])
        expected = [
            None if value is None else _as_large(value, self._factors[self._at], counterpart.factors)
            for value in expected
        ]
        made = results(held)
        fitting = [
            value if value is not None and _fits(value, result) else None
            for value, result in zip(expected, made, strict=True)
        ]
        if any(value is not None for value in fitting):
            self.sites.append(self._compared(own, held, made, fitting, counterpart))
            overwrite(held, fitting)
        self._wanted.subtract(counterpart.needs)
        for name in counterpart.needs:
            if not self._wanted[name]:
                self._waiting.pop(name, None)

    def _compared(
        self,
        own: Launch,
        held: Launch,
        made: Sequence[Result],
        expected: Sequence[Array | None],
        counterpart: Counterpart,
    ) -> SiteDifference:
        problem = self._manifest.kernels[own.symbol].problem
        worst: tuple[str, Difference, Difference] | None = None
        for mine, its, right in zip(results(own), made, expected, strict=True):
            if right is None:
                continue
            local = _measured(held, its, right, problem)
            accumulated = _measured(own, mine, right, problem)
            if worst is None or (local.relative, accumulated.relative) > (
                worst[1].relative,
                worst[2].relative,
            ):
                worst = its.name, local, accumulated
        assert worst is not None
        allowed = self._bound
        if allowed is None:
            formats = (weight_format(own, self._manifest), counterpart.weights)
            allowed = bounds.share(own.operator, problem, own.sizes["kv_len"], formats)
        return SiteDifference(
            self._call,
            own.function,
            own.index,
            own.site,
            own.operator,
            own.kernel,
            counterpart.label,
            {axis: size for axis, size in own.sizes.items() if axis in ("M", "batch", "seq", "kv_len")},
            *worst,
            allowed,
        )


def weight_format(launch: Launch, manifest: Manifest) -> str:
    """How the weight that a launch reads is stored."""
    said = manifest.kernels[launch.symbol].problem.get("weight_format")
    if said is not None:
        return str(said)
    stored = [operand.value.dtype for operand in launch.arguments if operand.role == "weight"]
    return "f32" if all(dtype == "float32" for dtype in stored) else manifest.weight_format


def _measured(launch: Launch, made: Result, right: Array, problem: Mapping[str, Any]) -> Difference:
    """The difference of a result, of a cache's last tokens where the reference has no more."""
    value = made.value[:, :, made.value.shape[2] - right.shape[2] :] if made.name else made.value
    return difference(value, right, None if made.name else residual_of(launch, problem))


def _as_large(value: Array, subject: Array | None, reference: Array | None) -> Array:
    """What the reference has, with channels as large as the subject's."""
    if subject is not None:
        value = value / subject
    return value if reference is None else value * reference


def _fits(value: Array, result: Result) -> bool:
    if not result.name:
        return value.shape == result.value.shape
    batch, heads, tokens, dim = result.value.shape
    return (
        value.ndim == 4
        and value.shape[:2] + value.shape[3:] == (batch, heads, dim)
        and value.shape[2] <= tokens
    )
