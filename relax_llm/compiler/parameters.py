"""Matching a checkpoint's tensors to an architecture's parameters, and reading them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.checkpoint import Checkpoint, Tensor
from relax_llm.errors import CheckpointError
from relax_llm.formats import FORMATS, Blocks
from relax_llm.layers import Decoder

Array = npt.NDArray[Any]

_LISTED = 8
_BLOCKS = [format for format in FORMATS.values() if isinstance(format, Blocks)]


def match(checkpoint: Checkpoint, decoder: Decoder) -> dict[str, Tensor]:
    """The tensor of every parameter.

    A head that a tied model stores all the same is not used.

    Raises:
        CheckpointError: Tensors are missing, unexpected, or of another shape; they are listed.
    """
    wanted = {name: tuple(int(size) for size in value.shape) for name, value in decoder.named_parameters()}
    found: dict[str, Tensor] = {}
    unexpected, twice = [], []
    for name, tensor in checkpoint.tensors.items():
        parameter = decoder.rename(name)
        if parameter is None or (parameter == "lm_head.weight" and parameter not in wanted):
            continue
        if parameter in found:
            twice.append(f"{found[parameter].name} and {name}")
        elif parameter in wanted:
            found[parameter] = tensor
        else:
            unexpected.append(name)
    missing = [name for name in wanted if name not in found]
    problems = []
    if missing:
        problems.append(f"it lacks {_listed(missing)}")
    if unexpected:
        problems.append(f"the architecture has no place for {_listed(unexpected)}")
    wrong = [
        f"{tensor.name} {list(tensor.shape)} instead of {list(wanted[name])}"
        for name, tensor in found.items()
        if tensor.shape != wanted[name]
    ]
    if twice:
        problems.append(f"one parameter has two tensors: {_listed(twice)}")
    if wrong:
        problems.append(f"config.json asks for other shapes: {_listed(wrong)}")
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the architecture {type(decoder).__name__}: {'; '.join(problems)}. "
            "Check config.json, or pass the right architecture."
        )
    return found


class Reader:
    """Reads one parameter at a time, and warns of values that are not finite."""

    def __init__(self, tensors: Mapping[str, Tensor], warn: Callable[[str], None]) -> None:
        """Prepare to read the tensors of parameters."""
        self._tensors = tensors
        self._warn = warn

    def __call__(self, name: str) -> Array:
        """A parameter as float32."""
        tensor = self._tensors[name]
        stored = tensor.read()
        if stored.dtype.kind not in "fV" and stored.dtype.name != "bfloat16":
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} holds {stored.dtype}, not floats.")
        with np.errstate(all="ignore"):
            value = stored.astype(np.float32, copy=False)
            finite = np.isfinite(value.sum(dtype=np.float64))
        if not finite and not np.isfinite(value).all():
            self._not_finite(tensor, "NaN" if np.isnan(value).any() else "infinite values")
        return value

    def blocks(self, name: str, format: Blocks, *, transposed: bool) -> Array | None:
        """The blocks of a matrix where the checkpoint has it in this format, or in one that this holds exactly."""
        tensor = self._tensors[name]
        theirs = next((known for known in _BLOCKS if known.stored_as == tensor.dtype), None)
        if theirs is None or len(tensor.shape) != 2 or tensor.raw_is_transposed != transposed:
            return None
        stored = tensor.raw()
        found = theirs.converted(stored, format)
        if found is None:
            return None
        parts = theirs.split(stored)
        if not all(np.isfinite(half).all() for half in (parts.scales, parts.minimums) if half is not None):
            self._not_finite(tensor, "scales that are not finite")
        return found

    def _not_finite(self, tensor: Tensor, what: str) -> None:
        self._warn(f"Tensor {tensor.name!r} contains {what}; whatever passes through it is lost.")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
