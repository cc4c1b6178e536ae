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


def own_sizes(kernel: Kernel, launch: Launch, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a call as one of its launches has them.

    A kernel's formulas speak of the rows that it is given: the matmul behind `last_token` gets one for each sequence,
    whatever the `seq` of the prefill is.

    Args:
        kernel: What is launched.
        launch: Where.
        sizes: batch, seq and kv_len of the call.

    Returns:
        These, with M for operators that have rows.

    Raises:
        ArtifactError: A shape of the manifest is not a formula.
        InputError: A size that it names is not given.
    """
    if "M" not in AXES.get(kernel.operator, ()):
        return dict(sizes)
    rows = int(prod(formulas.evaluate(size, sizes) for size in launch.arguments[-1].shape[:-1]))
    return {**sizes, "seq": rows // sizes["batch"], "M": rows}


def products_of(kernel: Kernel) -> str:
    """What the products of a kernel's problem may be computed in: "f32", "bf16" or "int8".

    Over caches in bytes these are pairs of whole numbers of two bytes, as fast as pairs of bf16.
    """
    field = {"matmul": "activations", "attention": "cache"}.get(kernel.operator, "")
    rounded = kernel.problem.get(field) or ""
    return "int8" if rounded in ROUNDINGS else "bf16" if rounded in ("bf16", "q8") else "f32"


def cost(kernel: Kernel, launch: Launch, sizes: Mapping[str, int]) -> Cost:
    """What one launch costs in a call of these sizes; raises as `own_sizes` does."""
    own = own_sizes(kernel, launch, sizes)
    return Cost(formulas.evaluate(kernel.flops, own), formulas.evaluate(kernel.bytes, own))
