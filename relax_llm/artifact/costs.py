"""What a launch costs at given sizes: arithmetic and memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from relax_llm.artifact import formulas
from relax_llm.artifact.manifest import Kernel, Launch
from relax_llm.formats.activations import ROUNDINGS
from relax_llm.plan.kernel import AXES


@dataclass(frozen=True)
class Cost:
    """What one launch takes.

    Attributes:
        flops: Operations of arithmetic.
        bytes: Memory that must at least be moved.
    """

    flops: int | float
    bytes: int | float


def own_sizes(operator: str, launch: Launch, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a call as one of its launches has them.

    A kernel's formulas speak of the tokens that it is given: what stands behind the choice of the last token gets one
    for each sequence, whatever the `seq` of the prefill is.

    Args:
        operator: What is computed.
        launch: Where.
        sizes: batch, seq and kv_len of the call.

    Returns:
        These, with M for operators that have rows.

    Raises:
        ArtifactError: A shape of the manifest is not a formula.
        InputError: A size that it names is not given.
    """
    own, shape = dict(sizes), launch.arguments[-1].shape
    has_rows = "M" in AXES.get(operator, ())
    if has_rows or (shape[0] == "batch" and operator != "last_token"):
        own["batch"], own["seq"] = (_value(size, sizes) for size in shape[:2])
    if has_rows:
        own["M"] = prod(_value(size, sizes) for size in shape[:-1])
    return own


def _value(formula: str, sizes: Mapping[str, int]) -> int:
    """What most shapes consist of, without reading it as a formula."""
    if formula in sizes:
        return sizes[formula]
    return int(formula) if formula.isdecimal() else int(formulas.evaluate(formula, sizes))


def products_of(kernel: Kernel) -> str:
    """What the products of a kernel's problem may be computed in: "f32", "bf16" or "int8".

    Over caches in bytes these are pairs of whole numbers of two bytes, as fast as pairs of bf16.
    """
    field = {"matmul": "activations", "attention": "cache"}.get(kernel.operator, "")
    rounded = kernel.problem.get(field) or ""
    return "int8" if rounded in ROUNDINGS else "bf16" if rounded in ("bf16", "q8") else "f32"


def cost(kernel: Kernel, launch: Launch, sizes: Mapping[str, int]) -> Cost:
    """What one launch costs in a call of these sizes; raises as `own_sizes` does."""
    own = own_sizes(kernel.operator, launch, sizes)
    return Cost(formulas.evaluate(kernel.flops, own), formulas.evaluate(kernel.bytes, own))
