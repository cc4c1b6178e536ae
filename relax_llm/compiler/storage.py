"""In which format each matrix of a model is kept, what was asked for and what the checkpoint has; and the caches."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from relax_llm.checkpoint import Checkpoint, Tensor
from relax_llm.formats import FORMATS, Blocks

AUTO = "auto"
"""The format that holds what a checkpoint has."""

_BLOCKS = {format.stored_as: format.name for format in FORMATS.values() if isinstance(format, Blocks)}
_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f32", **_BLOCKS, "q4_0": "q4"}
_HEAD = "q8"


def kv_cache_for(weights: str, target: str | None = None) -> str:
    """The format that caches have where nobody says: whole beside whole weights and on a GPU, else half of that."""
    return "f32" if weights == "f32" or target == "cuda" else "bf16"


@dataclass(frozen=True)
class Storage:
    """The choice of formats for one model.

    Blocks of a GGUF file stay as they are where they take no more room than what was asked for. A head, whose outputs
    are the vocabulary, and the table of tokens are kept in 8 bits where others have 4, unless the checkpoint has them
    in 4: every error there is an error of a logit or a token, and quantizers at large do the same.

    Attributes:
        weights: What was asked for.
        stored: The type of every parameter in the checkpoint: "float32", "q4_1".
        vocab_size: Rows of a head.
    """

    weights: str
    stored: Mapping[str, str] = field(default_factory=dict)
    vocab_size: int = 0

    @staticmethod
    def of(weights: str, tensors: Mapping[str, Tensor], vocab_size: int) -> "Storage":
        """The choice for a model's parameters and the tensors that they are read from."""
        return Storage(weights, {name: tensor.dtype for name, tensor in tensors.items()}, vocab_size)

    def format(self, parameters: Sequence[str], rows: int) -> str:
        """The format of a matrix.

        Args:
            parameters: What it is made from.
            rows: Its outputs.
        """
        if not isinstance(FORMATS[self.weights], Blocks):
            return self.weights
        there = {_BLOCKS.get(self.stored.get(name, ""), "") for name in parameters}
        carried = there.pop() if len(there) == 1 else ""
        if rows == self.vocab_size:
            smaller = carried and FORMATS[carried].bits < FORMATS[_HEAD].bits
            return carried if smaller and self.weights != _HEAD else _HEAD
        smaller = carried and FORMATS[carried].bits < FORMATS[self.weights].bits
        return carried if smaller and self.weights != "q8" else self.weights


def as_stored(checkpoint: Checkpoint) -> str:
    """The format that holds most of a checkpoint's matrices: of 8 bits for blocks of kinds that no format has."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) == 2:
            sizes[_TYPES.get(tensor.dtype, _HEAD)] += tensor.shape[0] * tensor.shape[1]
    return sizes.most_common(1)[0][0] if sizes else "f32"
