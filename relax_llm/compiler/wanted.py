"""What was asked for of weights and caches, before anything is compiled: a hit in the cache needs no more than this."""

from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from relax_llm.checkpoint import Checkpoint
from relax_llm.errors import CompileError
from relax_llm.formats import FORMATS, Blocks
from relax_llm.plan.plan import parts_of

AUTO = "auto"
"""The format that holds what a checkpoint has."""

HEAD = "q8"
"""The format of heads and of tables of tokens beside matrices in 4 bits, and of what no format has."""

BLOCKS = {
    format.stored_as: format.name
    for format in FORMATS.values()
    if isinstance(format, Blocks) and format.stored_as
}
"""The formats of a GGUF file's blocks, by their types."""

_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f32", **BLOCKS, "q4_0": "q4"}

_CACHES = {"f32": "f32", "q4": "q8", "q4s": "q8"}
"""The formats of caches beside weights: what they cost is to be little beside what the weights have cost."""


def kv_cache_for(weights: str, target: str | None = None) -> str:
    """The format that caches have where nobody says: that of a GPU is f32."""
    return "f32" if target == "cuda" else _CACHES.get(weights, "bf16")


@dataclass(frozen=True)
class Wanted:
    """The formats that were asked for.

    Attributes:
        everywhere: That of all matrices, which may be `AUTO`.
        sites: Patterns of sites, and the format there; the last that fits counts.
    """

    everywhere: str
    sites: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(text: str) -> "Wanted":
        """What "q4" or "q4,embed_tokens=q4s,layers.*.mlp.down_proj=q8" asks for.

        Raises:
            CompileError: A format is not known, or a part is no pair of a pattern and a format.
        """
        everywhere, *parts = (part.strip() for part in text.split(","))
        sites = []
        for part in parts:
            pattern, equals, format = (word.strip() for word in part.partition("="))
            if not (pattern and equals):
                raise CompileError(
                    f"The weights are {text!r}, where {part!r} should name sites and a format: q4,embed_tokens=q4s."
                )
            sites.append((pattern, format))
        for format, known in (
            (everywhere, (*FORMATS, AUTO)),
            *((format, tuple(FORMATS)) for _, format in sites),
        ):
            if format not in known:
                raise CompileError(f"The weight format {format!r} is not known; known: {', '.join(known)}.")
        return Wanted(everywhere, tuple(sites))

    def of(self, checkpoint: Checkpoint) -> "Wanted":
        """The same with the format that holds what a checkpoint has, where that was asked for."""
        return replace(self, everywhere=as_stored(checkpoint)) if self.everywhere == AUTO else self

    def at(self, site: str) -> dict[str, str]:
        """The patterns that fit a site or a part of what was fused there, and their formats."""
        return {
            pattern: format
            for pattern, format in self.sites
            if any(fnmatchcase(part, pattern) for part in parts_of(site))
        }

    def __str__(self) -> str:
        return ",".join([self.everywhere, *(f"{pattern}={format}" for pattern, format in self.sites)])


WHOLE = Wanted("f32")
"""All matrices as f32."""


def as_stored(checkpoint: Checkpoint) -> str:
    """The format that holds most of a checkpoint's matrices: of 8 bits for blocks of kinds that no format has."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) == 2:
            sizes[_TYPES.get(tensor.dtype, HEAD)] += tensor.shape[0] * tensor.shape[1]
    return sizes.most_common(1)[0][0] if sizes else "f32"
