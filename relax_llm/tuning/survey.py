"""What there is to tune: a model's problems, the plan that no measurement has touched, the kernels that compete."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from relax_llm.artifact.artifact import Artifact
from relax_llm.checkpoint import Checkpoint
from relax_llm.compiler.architectures import find
from relax_llm.compiler.build import construct
from relax_llm.compiler.export import export
from relax_llm.compiler.parameters import match
from relax_llm.compiler.passes.schedule_rest import ScheduleRest
from relax_llm.compiler.pipeline import pipeline, run
from relax_llm.compiler.planner import Choice, Planner
from relax_llm.compiler.storage import Storage
from relax_llm.compiler.wanted import Wanted
from relax_llm.errors import ArtifactError
from relax_llm.kernels.forms import Realized
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.operators import operator_of
from relax_llm.kernels.problem import Problem
from relax_llm.plan.kernel import Kernel
from relax_llm.plan.plan import Entry, Plan, Range
from relax_llm.plan.sizes import Box
from relax_llm.progress import Progress


class Survey(Planner):
    """A planner that remembers the problems it was asked about.

    Attributes:
        problems: By name.
        kernels: The user's.
        check: What tries them at the door.
    """

    def __init__(
        self,
        machine: Machine,
        kernels: Sequence[Kernel],
        check: Callable[[Realized, Machine], str],
        weights: Wanted,
    ) -> None:
        super().__init__(machine, kernels, check=check, weights=weights)
        self.check = check
        self.kernels = tuple(kernels)
        self.problems: dict[str, Problem] = {}

    def choose(self, problem: Problem, site: str, *, spare: bool = False) -> Choice:
        """Choose as ever, but give nothing to install: the module that asks is traced for its problems alone."""
        self.problems[problem.name] = problem
        return replace(super().choose(problem, site, spare=spare), realized={})


@dataclass(frozen=True)
class Subject:
    """An entry of the plan, to be tuned.

    Attributes:
        entry: As planned without measurements.
        problem: Its problem.
        candidates: The kernels that can serve it, of every layout that the weight may be stored in.
    """

    entry: Entry
    problem: Problem
    candidates: tuple[Realized, ...]


def of_checkpoint(checkpoint: Checkpoint, architecture: Any, survey: Survey, progress: Progress) -> None:
    """Trace a model and run the passes until kernels are chosen.

    Raises:
        ArchitectureError: No architecture fits, or it cannot be traced.
        KernelError: A kernel is wrong.
    """
    decoder = construct(find(checkpoint.config, architecture), checkpoint.config)
    survey.storage = Storage.of(survey.weights, match(checkpoint, decoder), decoder.vocab_size)
    with progress.task("Tracing", 1):
        mod = export(decoder, survey.machine, survey.kv_cache)
    standard = pipeline()
    steps = standard[: standard.position(ScheduleRest)].bind(survey)  # behind it nothing is chosen
    with progress.task("Passes", len(steps)) as advance:
        run(mod, steps, lambda *_: advance(1))


def of_artifact(artifact: Artifact, survey: Survey) -> None:
    """Take the problems from an artifact's manifest, and their sites from its plan.

    Raises:
        ArtifactError: The plan names a problem that the manifest does not have.
        KernelError: A kernel is wrong.
    """
    known = {}
    for kernel in artifact.manifest.kernels.values():
        if kernel.operator != "fused":
            problem = Problem.from_json(json.dumps({"operator": kernel.operator, **kernel.problem}))
            known[problem.name] = problem
    for entry in artifact.plan.entries:
        if entry.problem not in known:
            raise ArtifactError(
                f"The plan of {artifact.path} has the problem {entry.problem}, which its manifest does not; compile it "
                "again."
            )
        for site in entry.sites:
            survey.choose(known[entry.problem], site)


def subjects(survey: Survey) -> list[Subject]:
    """Every entry of the untouched plan, with the kernels that compete for it."""
    return [
        Subject(
            entry, survey.problems[entry.problem], _candidates(survey, survey.problems[entry.problem], entry)
        )
        for entry in survey.plan().entries
    ]


def _candidates(survey: Survey, problem: Problem, entry: Entry) -> tuple[Realized, ...]:
    """The candidates in the layout that was planned, and in the one that the built-in kernels would like best."""
    site = entry.sites[0]
    found = {realized.kernel.name: realized for realized in survey.candidates(problem, site)}
    shipped = Planner(survey.machine).candidates(problem, site)[0].layout
    if shipped is not None and shipped.name != entry.layout:
        # A plan that stores the weight in the other layout makes the planner say who can read it so.
        anything = Box().within(entry.axes)
        other = replace(entry, layout=shipped.name, ranges=(Range(anything, "any"),))
        planner = Planner(survey.machine, survey.kernels, plan=Plan((other,)), check=survey.check)
        found |= {realized.kernel.name: realized for realized in planner.candidates(problem, site)}
    return tuple(found.values())


def is_measured(problem: Problem) -> str:
    """Why the kernels of a problem are not measured; empty where they are."""
    operator = operator_of(problem)
    if operator.axes != ("M",):
        return f"not measured: tuning chooses by M, and this is chosen by {', '.join(operator.axes)}"
    if any(operand.dtype.startswith("int") for operand in operator.launched(problem, None)):
        return "not measured: its time depends on the values it is given"
    return ""
