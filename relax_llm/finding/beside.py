"""An artifact as a reference: its launches, matched to another's by site, operator and problem."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import numpy.typing as npt

from relax_llm.artifact.manifest import Launch, Manifest
from relax_llm.errors import InputError
from relax_llm.finding.flow import factors
from relax_llm.finding.walk import Counterpart, Receive
from relax_llm.runtime.results import TOKENS, results
from relax_llm.runtime.runner import Runner
from relax_llm.runtime.state import State

Array = npt.NDArray[Any]

# Fields that say how, and not what is computed; a product gives the same whether it or a launch before it normalizes.
_STORAGE = ("weight_format", "layout", "activations", "norm", "cache")


def pairs(subject: Manifest, other: Manifest, function: str) -> list[int | None]:
    """For each launch of a function the other artifact's launch that computes the same at the same place."""
    ours, theirs = (
        [_key(launch, manifest) for launch in manifest.functions[function]] for manifest in (subject, other)
    )
    found: list[int | None] = [None] * len(ours)
    for block in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        for offset in range(block.size):
            found[block.a + offset] = block.b + offset
    return found


def check_alike(subject: Runner, other: Runner) -> None:
    """Refuse to compare different models.

    Raises:
        InputError: They have another vocabulary, or other attention layers.
    """
    ours, theirs = subject.artifact.manifest, other.artifact.manifest
    sizes = [
        (one.vocab_size, one.hidden_size, [(c.site, c.kv_heads, c.head_dim) for c in one.caches])
        for one in (ours, theirs)
    ]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{subject.artifact.path} and {other.artifact.path} are different models: {_shape(ours)}, and "
            f"{_shape(theirs)}. Compare artifacts of one checkpoint."
        )


@dataclass
class Beside:
    """An artifact as a reference.

    Attributes:
        runner: Of it.
        state: Grows with each call.
    """

    runner: Runner
    state: State

    @property
    def name(self) -> str:
        """Where it lies."""
        return str(self.runner.artifact.path)

    @property
    def weights(self) -> str:
        """How it stores matrices."""
        return self.runner.artifact.manifest.weight_format

    def counterparts(self, subject: Runner, function: str) -> list[Counterpart | None]:
        """The matching launches."""
        manifest = self.runner.artifact.manifest
        launches = manifest.functions[function]
        channels = factors(self.runner, function)
        return [
            None if at is None else replace(_counterpart(at, launches[at], manifest), factors=channels[at])
            for at in pairs(subject.artifact.manifest, manifest, function)
        ]

    def run(self, function: str, token_ids: Sequence[int], receive: Receive) -> Array:
        """Step through it."""
        ids: Any = token_ids[0] if function == "decode" else token_ids
        with self.runner.steps(function, self.state, ids) as steps:
            for launch in steps:
                launch.run()
                for at, result in enumerate(results(launch)):
                    receive((launch.index, at), result.value)
            return steps.logits


def _counterpart(at: int, launch: Launch, manifest: Manifest) -> Counterpart:
    problem = manifest.kernels[launch.kernel].problem
    stored = [argument.dtype for argument in launch.arguments if argument.role == "weight"]
    plain = all(dtype == "float32" for dtype in stored)
    count = sum(argument.role == "output" for argument in launch.arguments)
    if manifest.kernels[launch.kernel].operator == "append":
        count += len(TOKENS)
    return Counterpart(
        f"the reference's {launch.site}",
        tuple((at, index) for index in range(count)),
        list,
        problem.get("weight_format", "f32" if plain else manifest.weight_format),
    )


def _key(launch: Launch, manifest: Manifest) -> tuple[str, ...]:
    kernel = manifest.kernels[launch.kernel]
    problem = {name: value for name, value in kernel.problem.items() if name not in _STORAGE}
    place = "" if launch.site == launch.kernel else launch.site  # symbols are numbered as each artifact needs
    return place, kernel.operator, json.dumps(problem, sort_keys=True), str(launch.arguments[-1].shape)


def _shape(manifest: Manifest) -> str:
    return (
        f"{manifest.architecture} of {len(manifest.caches)} layers, {manifest.hidden_size} wide, with "
        f"{manifest.vocab_size} tokens"
    )
