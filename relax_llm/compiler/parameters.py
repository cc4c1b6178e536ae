"""Matching a checkpoint's tensors to an architecture's parameters, and reading them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.checkpoint import Checkpoint, Tensor
from relax_llm.errors import CheckpointError
from relax_llm.layers import Decoder

Array = npt.NDArray[Any]

_LISTED = 8


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


def reader(tensors: Mapping[str, Tensor], warn: Callable[[str], None]) -> Callable[[str], Array]:
    """A function that reads one parameter as float32, and warns of values that are not finite."""

    def read(name: str) -> Array:
        stored = tensors[name].read()
        if stored.dtype.kind not in "fV" and stored.dtype.name != "bfloat16":
            raise CheckpointError(
                f"{tensors[name].file}: tensor {tensors[name].name!r} holds {stored.dtype}, not floats."
            )
        with np.errstate(all="ignore"):
            value = stored.astype(np.float32, copy=False)
            finite = np.isfinite(value.sum(dtype=np.float64))
        if not finite and not np.isfinite(value).all():
            kind = "NaN" if np.isnan(value).any() else "infinite values"
            warn(f"Tensor {tensors[name].name!r} contains {kind}; whatever passes through it is lost.")
        return value

    return read


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
