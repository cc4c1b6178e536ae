"""`tune`: measure the kernels that compete for a model's problems on this machine, and plan by that."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relax_llm import cpu
from relax_llm.artifact.artifact import Artifact, load, versions
from relax_llm.checkpoint import Checkpoint, open_checkpoint
from relax_llm.compiler.loading import load_tvm
from relax_llm.compiler.user_kernels import gather
from relax_llm.compiler.wanted import Wanted, kv_cache_for
from relax_llm.errors import InputError
from relax_llm.plan.kernel import Kernel
from relax_llm.plan.plan import Entry, Plan
from relax_llm.progress import Progress, Silent
from relax_llm.runtime.vm import set_threads
from relax_llm.tuning.contest import Findings
from relax_llm.tuning.decide import decided, unmeasured
from relax_llm.tuning.distribution import Distribution, Given, distribution
from relax_llm.tuning.explore import explore
from relax_llm.tuning.rounds import Care, Deadline
from relax_llm.tuning.store import Store, store_path

if TYPE_CHECKING:
    from relax_llm.kernels.machine import Machine
    from relax_llm.layers import Decoder
    from relax_llm.tuning.survey import Subject

MAX_KERNELS = 12
"""The most kernels that a plan uses for one problem, where the user does not say."""

_ACTIVATIONS = 2**28
"""Bytes that arguments other than the weight may take; larger M are predicted, not measured."""


def tune(
    checkpoint: str | os.PathLike[str] | Checkpoint | Artifact,
    *,
    weights: str = "f32",
    kernels: Sequence[Kernel | str | os.PathLike[str]] = (),
    budget: float = 30.0,
    histogram: Given = None,
    max_kernels: int = MAX_KERNELS,
    architecture: "type[Decoder] | str | os.PathLike[str] | None" = None,
    threads: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Measure the kernels that can serve a model's problems, and make the plan of least expected time.

    Args:
        checkpoint: What `compile` takes, or an artifact or its directory.
        weights: How matrices are stored, as for `compile`; an artifact knows it by itself.
        kernels: Kernels of yours, or Python files with some, as for `compile`; they compete by measurement.
        budget: Seconds that tuning may take in all, beside the first check of a kernel of yours. With 0 nothing is
            measured, and the plan is the one that `compile` makes by itself.
        histogram: How often each M occurs: launches by M as a mapping, as text such as "1:0.9,64:0.1", or as the path
            of a JSON file; by default half of the time at M=1, the other half spread evenly over the logarithm of M.
        max_kernels: The most kernels for one problem.
        architecture: As for `compile`.
        threads: Threads that kernels use; by default all cores. The plan is for this number.
        resume: Whether measurements made earlier, on this machine and of the same code, are used.
        progress: Where to report to.

    Returns:
        A plan for `compile(plan=...)`, with the measurements and the reason behind every choice. Interrupted, it
        keeps what was measured: the next call goes on from there.

    Raises:
        InputError: An option is not usable, or so few kernels do not serve every M.
        CheckpointError: The checkpoint cannot be read.
        ArchitectureError: No architecture fits.
        KernelError: A kernel of yours is wrong.
        ArtifactError: The artifact cannot be loaded, or was compiled for another machine.
        CompileError: Code generation failed.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 <= budget < math.inf:
        raise InputError(f"The budget must be seconds, 0 or above, not {budget!r}.")
    if isinstance(max_kernels, bool) or not isinstance(max_kernels, int) or max_kernels < 1:
        raise InputError(f"max_kernels must be a whole number, 1 or above, not {max_kernels!r}.")
    formats = Wanted.parse(weights)
    deadline = Deadline(budget)
    chosen = distribution(histogram)
    if threads is not None:
        set_threads(threads)
    load_tvm()
    reports = progress or Silent()
    tuning = survey_of(checkpoint, formats, gather(kernels), architecture, deadline, reports)
    settings = {
        "budget_seconds": budget,
        "distribution": chosen.text,
        "max_kernels": max_kernels,
    }
    if budget == 0:
        entries = tuple(
            unmeasured(subject.entry, "not measured: the budget is 0 s") for subject in tuning.subjects
        )
        return Plan(entries, {**tuning.fingerprint, **settings})
    findings = _measure(tuning, chosen, max_kernels, deadline, resume, reports)
    entries = tuple(
        _entry(subject, findings.get(index), chosen, max_kernels, budget)
        for index, subject in enumerate(tuning.subjects)
    )
    misses = [abs(miss) for found in findings.values() for miss in found.misses]
    if misses:
        settings["predictions_missed_by"] = {
            "median": round(float(np.median(misses)), 4),
            "worst": round(max(misses), 4),
            "tested": len(misses),
        }
    return Plan(entries, {**tuning.fingerprint, **settings})


@dataclass(frozen=True)
class Tuning:
    """What is tuned, and where.

    Attributes:
        machine: What kernels are generated for: this machine.
        subjects: The entries of the plan.
        fingerprint: What measurements depend on beside the code.
    """

    machine: "Machine"
    subjects: tuple["Subject", ...]
    fingerprint: Mapping[str, Any]

    def competing(self) -> dict[int, "Subject"]:
        """The subjects that have something to choose, by their index."""
        from relax_llm.tuning.survey import is_measured

        return {
            index: subject
            for index, subject in enumerate(self.subjects)
            if len(subject.candidates) > 1 and not is_measured(subject.problem)
        }


def survey_of(
    checkpoint: str | os.PathLike[str] | Checkpoint | Artifact,
    weights: Wanted,
    kernels: Sequence[Kernel],
    architecture: Any,
    deadline: Deadline,
    progress: Progress,
) -> Tuning:
    """The entries of the plan that `compile` would make here, and the kernels that compete for each."""
    with progress.task("Loading the compiler", 1):
        from relax_llm.kernels.checking import check
        from relax_llm.kernels.forms import Realized
        from relax_llm.kernels.machine import Machine, machine
        from relax_llm.tuning.survey import Survey, of_artifact, of_checkpoint, subjects

    here = machine()

    def checked(realized: Realized, machine: Machine) -> str:
        with deadline.paused():  # once for a kernel, and not tuning's to hurry
            return check(realized, machine)

    survey = Survey(here, kernels, checked, weights)
    artifact = _artifact(checkpoint)
    if artifact is not None:
        if artifact.manifest.target != here.name:
            raise InputError(
                f"{artifact.path} is compiled for {artifact.manifest.target}, and this machine is {here.name}: tuning "
                "measures where the model runs. Tune its checkpoint instead."
            )
        of_artifact(artifact, survey)
    else:
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)  # type: ignore[arg-type]
        survey.weights = weights.of(opened)
        survey.kv_cache = kv_cache_for(survey.weights.everywhere)
        of_checkpoint(opened, architecture, survey, progress)
    fingerprint = {
        "processor": cpu.name(),
        "target": here.name,
        "features": sorted(here.features),
        "cores": cpu.cores(),
        "threads": int(os.environ["TVM_NUM_THREADS"]),
        "versions": dict(versions()),
    }
    return Tuning(here, tuple(subjects(survey)), fingerprint)


def _artifact(given: Any) -> Artifact | None:
    if isinstance(given, Artifact):
        return given
    if isinstance(given, Checkpoint) or not Path(given).expanduser().joinpath("manifest.json").is_file():
        return None
    return load(Path(given).expanduser())


def _entry(
    subject: "Subject", found: Findings | None, chosen: Distribution, limit: int, budget: float
) -> Entry:
    from relax_llm.tuning.survey import is_measured

    if len(subject.candidates) == 1:
        return unmeasured(subject.entry, "the only kernel that can")
    reason = is_measured(subject.problem)
    if reason:
        return unmeasured(subject.entry, reason)
    late = f"not measured: the budget of {budget:g} s was over before enough was known"
    measured = decided(subject.entry, found, chosen, limit) if found else None
    return measured or unmeasured(subject.entry, late)


def _measure(
    tuning: Tuning, chosen: Distribution, limit: int, deadline: Deadline, resume: bool, progress: Progress
) -> dict[int, Findings]:
    """What was found out about each entry that has something to choose, by its index."""
    competing = tuning.competing()
    if not competing:
        return {}
    with progress.task("Compiling kernels", len(competing)) as advance:
        findings = contests(tuning, competing, deadline, lambda: advance(1), resume=resume)
    steps = max(1, round(10 * max(0.0, deadline.left())))
    with progress.task("Measuring", steps) as advance:
        done = 0

        def told() -> None:
            nonlocal done
            now = steps - min(steps, max(0, round(10 * deadline.left())))
            advance(now - done)
            done = now

        explore(list(findings.values()), chosen, limit, Care(), deadline, told)
        advance(steps - done)
    return findings


def contests(
    tuning: Tuning,
    competing: Mapping[int, "Subject"],
    deadline: Deadline,
    compiled: Callable[[], None] = lambda: None,
    *,
    resume: bool = True,
) -> dict[int, Findings]:
    """Compile the candidates of some subjects, as far as the time allows, ready to be measured."""
    from relax_llm.tuning.arena import Arena

    arena = Arena(tuning.machine, tuple(competing.values()), _ACTIVATIONS, deadline, compiled)
    found = {}
    for index, subject in competing.items():
        contest = arena.contest(subject)
        if contest is None:
            continue
        path = store_path(tuning.fingerprint, contest.name)
        if not resume:
            path.unlink(missing_ok=True)
        found[index] = Findings(contest, Store(path))
    return found
