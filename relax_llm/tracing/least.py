"""The least time that a call can take on a machine."""

from collections.abc import Mapping

from relax_llm.artifact.costs import cost, products_of
from relax_llm.artifact.manifest import Manifest
from relax_llm.tracing.limits import Limits


def least_seconds(manifest: Manifest, function: str, sizes: Mapping[str, int], limits: Limits) -> float:
    """That of all arithmetic or of all bytes of a call, whichever is longer.

    Args:
        manifest: The artifact's.
        function: What is called.
        sizes: Its batch, seq and kv_len.
        limits: What the machine can do; products that may be computed in bf16 or in integers are counted at the speed
            of the instructions for these, where there are such.
    """
    seconds = moved = 0.0
    for launch in manifest.functions[function]:
        kernel = manifest.kernels[launch.kernel]
        taken = cost(kernel, launch, sizes)
        seconds += taken.flops / limits.rate(products_of(kernel))
        moved += taken.bytes
    return max(seconds, moved / limits.bytes)
