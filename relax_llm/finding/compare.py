"""`compare`: a model beside a reference, launch by launch, in a prefill and some decodes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from relax_llm.artifact.artifact import Artifact, load
from relax_llm.errors import InputError
from relax_llm.finding.beside import Beside, check_alike
from relax_llm.finding.comparison import CallDifference, Comparison, SiteDifference, drift
from relax_llm.finding.flow import factors
from relax_llm.finding.walk import Reference, Walk
from relax_llm.finding.workload import DECODES, Workload, workload
from relax_llm.numerics.difference import difference, divergence
from relax_llm.progress import Progress, Silent
from relax_llm.runtime.control import Planned
from relax_llm.runtime.runner import Runner

if TYPE_CHECKING:
    from relax_llm.checkpoint import Checkpoint

Model = Runner | Artifact | str | os.PathLike[str]


def compare(
    subject: Model,
    other: Model | None = None,
    *,
    reference: "str | os.PathLike[str] | Checkpoint | None" = None,
    plan: Planned | None = None,
    prompt: str | Sequence[int] | None = None,
    length: int | None = None,
    decodes: int = DECODES,
    bound: float | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a model with a reference at every site, and name the first that is wrong by itself.

    ::

        rl.compare("mine", "good")                                # two artifacts of one checkpoint
        rl.compare("mine", reference="path/to/checkpoint")        # run by transformers
        rl.compare("mine", plan="other.json")                     # one artifact, by another plan and by its own

    The subject runs twice: by itself, and held to the reference, whose results take the place of its own after each
    launch. The error of a launch in the second run is its own: what it makes of the very inputs that the reference
    had. All go launch by launch beside each other, so that little more than one launch's tensors are in memory.

    Args:
        subject: A runner, an artifact or the directory of one.
        other: Likewise: the reference.
        reference: A checkpoint as the reference, run by `transformers` in float32.
        plan: By which the subject runs: a plan, the path of one, or kernels by site. Without another artifact or a
            checkpoint the reference is the subject without it.
        prompt: Text or token ids; by default a sentence, or random tokens where there is no tokenizer.
        length: Instead of a prompt: so many random tokens.
        decodes: How many tokens are decoded after it, each the one that the reference finds likeliest.
        bound: How far each launch may be off by itself, as a share of its row's largest value; by default by what it
            computes, how long its sum is and how its weight is stored.
        progress: Where to report to.

    Raises:
        InputError: There is no reference or more than one, the models differ, or the prompt is not usable.
        ArtifactError: An artifact cannot be loaded or stepped through.
        CheckpointError: The reference cannot be read, or `transformers` cannot run it.
    """
    if bound is not None and not bound >= 0:
        raise InputError(f"bound must be a share from 0 on, not {bound!r}.")
    if (other is not None) + (reference is not None) > 1 or (
        other is None and reference is None and plan is None
    ):
        raise InputError("Name one thing to compare with: another artifact, a reference, or a plan.")
    runner = runner_of(subject)
    work = workload(runner, prompt, decodes, length)
    with nullcontext() if plan is None else runner.plan(plan):
        if reference is not None:
            from relax_llm.finding.transformer import Transformer

            right: Reference = Transformer.open(reference, runner)
        else:
            beside = runner_of(other) if other is not None else Runner(runner.artifact)
            check_alike(runner, beside)
            right = Beside(beside, beside.start())
        name = str(runner.artifact.path) + ("" if plan is None else f" by {_named(plan)}")
        return _compared(name, runner, right, work, bound, progress or Silent())


def runner_of(model: Model) -> Runner:
    """A runner of what was named."""
    if isinstance(model, Runner):
        return model
    return Runner(model if isinstance(model, Artifact) else load(Path(model).expanduser()))


def _named(plan: Planned) -> str:
    return os.fspath(plan) if isinstance(plan, str | os.PathLike) else "another plan"


def _compared(
    name: str,
    runner: Runner,
    reference: Reference,
    work: Workload,
    bound: float | None,
    progress: Progress,
) -> Comparison:
    manifest = runner.artifact.manifest
    own, held = runner.start(), runner.start()
    sites: list[SiteDifference] = []
    calls: list[CallDifference] = []
    alone: dict[tuple[str, str], dict[str, None]] = {}
    tokens: tuple[int, ...] = work.prompt
    with progress.task("Comparing", 1 + work.decodes) as advance:
        for call in range(1 + work.decodes):
            function = "decode" if call else "prefill"
            ids = tokens[0] if call else list(tokens)
            counterparts = reference.counterparts(runner, function)
            with runner.steps(function, own, ids) as mine, runner.steps(function, held, ids) as its:
                walk = Walk(call, mine, its, counterparts, factors(runner, function), manifest, bound)
                theirs = reference.run(function, tokens, walk.receive)
                ours = walk.finish()
            sites += walk.sites
            seen = {site.index for site in walk.sites}
            for index, launch in enumerate(manifest.functions[function]):
                if index not in seen:
                    place = launch.site, manifest.kernels[launch.kernel].operator
                    alone.setdefault(place, {})[function] = None
            calls.append(
                CallDifference(
                    function,
                    len(tokens),
                    own.length,
                    difference(ours, theirs),
                    divergence(ours, theirs),
                    (int(ours.argmax()), int(theirs.argmax())),
                )
            )
            tokens = (int(theirs.argmax()),)
            advance(1)
    same = manifest.weight_format == reference.weights
    return Comparison(
        name,
        reference.name,
        tuple(sites),
        tuple(calls),
        tuple(_alone(sites, alone)),
        drift(same) if bound is None else float("inf"),
    )


def _alone(
    sites: Sequence[SiteDifference], alone: Mapping[tuple[str, str], Mapping[str, None]]
) -> Iterator[str]:
    """What was not compared, by site; with the operator and the functions where others of the site were."""
    compared = {site.site for site in sites}
    for (site, operator), functions in alone.items():
        yield f"{operator} at {site} in {' and '.join(functions)}" if site in compared else site
