"""Token ids as callers give them, [seq] or [batch, seq], and results in the form in which the ids came."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.manifest import CONTENDERS
from relax_llm.errors import InputError

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
TokenIds = Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]]


def ids_of(token_ids: Any, batch: int, vocab_size: int) -> tuple[Ids, bool]:
    """Token ids as int32 [batch, seq], and whether they came without a batch axis.

    Raises:
        InputError: There are none, they are no token ids, or they are of another batch.
    """
    array = array_of(token_ids)
    if array.ndim not in (1, 2):
        raise InputError(f"Token ids must form [seq] or [batch, seq], not an array of shape {array.shape}.")
    if array.size == 0:
        raise InputError("There are no tokens to evaluate; a prompt needs at least one.")
    if array.dtype.kind not in "iu":
        raise InputError(f"Token ids must be whole numbers, not {array.dtype}.")
    ids = array if array.ndim == 2 else array[None]
    if ids.shape[0] != batch:
        raise InputError(f"The state has {batch} sequences, but the token ids have {ids.shape[0]}.")
    require_id(int(ids.min()), vocab_size)
    require_id(int(ids.max()), vocab_size)
    return np.array(ids, np.int32, order="C"), array.ndim == 1  # a copy: DLPack refuses read-only memory


def require_id(token_id: int, vocab_size: int) -> None:
    """Raise InputError for an id that no token has."""
    if not 0 <= token_id < vocab_size:
        raise InputError(f"Token id {token_id} is outside the vocabulary of {vocab_size}.")


def next_ids_of(token_id: Any, batch: int, vocab_size: int) -> tuple[Ids, bool]:
    """One token id for each sequence as int32 [batch, 1], and whether it came without a batch axis; as `ids_of`."""
    array = array_of(token_id)
    if array.ndim > 1:
        raise InputError(f"decode takes one token for each sequence, not an array of shape {array.shape}.")
    ids, _ = ids_of(array.reshape(-1, 1), batch, vocab_size)
    return ids, array.ndim == 0


def array_of(token_ids: Any) -> npt.NDArray[Any]:
    """Token ids as an array, whatever else they are.

    Raises:
        InputError: The sequences differ in length.
    """
    try:
        return np.asarray(token_ids)
    except ValueError as error:
        raise InputError(
            "Token ids must form [seq] or [batch, seq]; the sequences differ in length."
        ) from error


def shaped(function: str, result: Floats, flat: bool) -> Floats:
    """A function's result [batch, seq, ...] as the caller gets it: `flat` where its ids had no batch axis."""
    if function in ("prefill", CONTENDERS):
        result = result[:, -1]
    elif function == "decode":
        result = result[:, 0]
    return result[0] if flat else result
