"""In which format each matrix of a model is kept, what was asked for and what the checkpoint has; and the caches."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from relax_llm.checkpoint import Checkpoint, Tensor
from relax_llm.compiler.recipes import joined_name
from relax_llm.errors import CompileError
from relax_llm.formats import FORMATS, Blocks
from relax_llm.layers.decoder import site_of_weight
from relax_llm.plan.plan import parts_of

AUTO = "auto"
"""The format that holds what a checkpoint has."""

_BLOCKS = {format.stored_as: format.name for format in FORMATS.values() if isinstance(format, Blocks)}
_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f32", **_BLOCKS, "q4_0": "q4"}
_HEAD = "q8"


def kv_cache_for(weights: str, target: str | None = None) -> str:
    """The format that caches have where nobody says: whole beside whole weights and on a GPU, else half of that."""
    return "f32" if weights == "f32" or target == "cuda" else "bf16"


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


@dataclass(frozen=True)
class Storage:
    """The choice of formats for one model.

    Blocks of a GGUF file stay as they are where they take no more room than what was asked for. A head, whose outputs
    are the vocabulary, and the table of tokens are kept in 8 bits where others have 4, unless the checkpoint has them
    in 4: every error there is an error of a logit or a token, and quantizers at large do the same.

    Attributes:
        wanted: What was asked for.
        stored: The type of every parameter in the checkpoint: "float32", "q4_1".
        vocab_size: Rows of a head.
    """

    wanted: Wanted
    stored: Mapping[str, str] = field(default_factory=dict)
    vocab_size: int = 0
    _sites: dict[str, None] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(wanted: Wanted, tensors: Mapping[str, Tensor], vocab_size: int) -> "Storage":
        """The choice for a model's parameters and the tensors that they are read from."""
        return Storage(wanted, {name: tensor.dtype for name, tensor in tensors.items()}, vocab_size)

    def format(self, parameters: Sequence[str], rows: int) -> str:
        """The format of a matrix.

        Args:
            parameters: What it is made from.
            rows: Its outputs.
        """
        site = site_of_weight(joined_name(list(parameters))) if parameters else ""
        self._sites[site] = None
        chosen = list(self.wanted.at(site).values())
        if chosen:
            return chosen[-1]
        weights = self.wanted.everywhere
        if not isinstance(FORMATS[weights], Blocks):
            return weights
        there = {_BLOCKS.get(self.stored.get(name, ""), "") for name in parameters}
        carried = there.pop() if len(there) == 1 else ""
        if rows == self.vocab_size:
            smaller = carried and FORMATS[carried].bits < FORMATS[_HEAD].bits
            return carried if smaller and weights != _HEAD else _HEAD
        smaller = carried and FORMATS[carried].bits < FORMATS[weights].bits
        return carried if smaller and weights != "q8" else weights

    def require_sites(self) -> None:
        """Refuse patterns that fit no matrix that `format` was asked for.

        Raises:
            CompileError: There is one.
        """
        fitting = {pattern for site in self._sites for pattern in self.wanted.at(site)}
        for pattern, _ in self.wanted.sites:
            if pattern not in fitting:
                known = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", site) for site in self._sites)
                raise CompileError(
                    f"No matrix of this model is at {pattern!r}, for which a format of weights was given; they are at "
                    f"{', '.join(known)}."
                )


def as_stored(checkpoint: Checkpoint) -> str:
    """The format that holds most of a checkpoint's matrices: of 8 bits for blocks of kinds that no format has."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) == 2:
            sizes[_TYPES.get(tensor.dtype, _HEAD)] += tensor.shape[0] * tensor.shape[1]
    return sizes.most_common(1)[0][0] if sizes else "f32"
