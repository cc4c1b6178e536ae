"""In which format each matrix of a model is kept: what was asked for, and what the checkpoint has."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from relax_llm.checkpoint import Tensor
from relax_llm.compiler.recipes import joined_name
from relax_llm.compiler.wanted import BLOCKS, HEAD, Wanted
from relax_llm.errors import CompileError
from relax_llm.formats import FORMATS, Blocks, Format
from relax_llm.kernels.matmul import Matmul
from relax_llm.layers.decoder import site_of_weight

_ROUNDED = {"bf16": "bf16"}
"""What activations of products with floats may be rounded to."""


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
        return self._format(parameters, site, rows)

    def product(self, problem: Matmul, weights: Sequence[str]) -> Matmul:
        """A product over its matrix as it is kept, with activations as coarse as that allows.

        Those of a head, whose outputs are the vocabulary, have two bytes: of a prompt it reads the last token alone,
        and what it misses is missed by a logit.

        Args:
            problem: The product.
            weights: Names of what its matrix is made of.
        """
        name = self.format(weights, problem.n)
        format, rounded = FORMATS[name], _ROUNDED.get(name)
        if isinstance(format, Blocks):
            rounded = "int7" if format.code_bits == 4 else "int8"
            if problem.n == self.vocab_size:
                rounded = "int16"
        return replace(problem, weight_format=name, activations=rounded)

    def in_groups(self, parameter: str) -> bool:
        """Whether a matrix other than the head is kept in groups of few bits, which share a scale."""
        return isinstance(self._format_of(parameter), Blocks)

    def is_carried(self, parameter: str) -> bool:
        """Whether the checkpoint has a matrix other than the head in blocks that hold what was chosen for it."""
        theirs, chosen = FORMATS.get(BLOCKS.get(self.stored[parameter], "")), self._format_of(parameter)
        return isinstance(theirs, Blocks) and isinstance(chosen, Blocks) and theirs.fits(chosen)

    def _format_of(self, parameter: str) -> Format:
        return FORMATS[self._format([parameter], site_of_weight(parameter), 0)]

    def _format(self, parameters: Sequence[str], site: str, rows: int) -> str:
        chosen = list(self.wanted.at(site).values())
        if chosen:
            return chosen[-1]
        weights = self.wanted.everywhere
        if not isinstance(FORMATS[weights], Blocks):
            return weights
        there = {BLOCKS.get(self.stored.get(name, ""), "") for name in parameters}
        carried = there.pop() if len(there) == 1 else ""
        if rows == self.vocab_size:
            smaller = carried and FORMATS[carried].bits < FORMATS[HEAD].bits
            return carried if smaller and weights != HEAD else HEAD
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
