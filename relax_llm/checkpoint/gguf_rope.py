"""RoPE scaling as GGUF has it, in metadata or as a tensor of factors, in the words of config.json."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from relax_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from relax_llm.checkpoint.gguf_metadata import Metadata

__all__ = ["llama3_scaling", "rope_scaling"]

# Relative error of factors that were computed in float32, stored, and are now computed again in float64.
_TOLERANCE = 1e-5
_ROUNDING = 1e-6


def rope_scaling(
    metadata: Metadata, factors: NDArray[np.float32] | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Translate whatever scaling a llama GGUF file describes.

    Args:
        metadata: Keys under `.rope.scaling`.
        factors: float32 [head_dim / 2], the tensor `rope_freqs.weight`, by which frequencies are divided; or
            None.
        theta: The base of the frequencies.
        head_dim: Size of a head.

    Returns:
        A `rope_scaling` object with `rope_type` linear, yarn or llama3; None when frequencies are not scaled.

    Raises:
        CheckpointError: The scaling is of another kind, or factors do not follow the llama3 rule.
    """
    declared = _declared(metadata)
    if factors is not None and factors.size != head_dim // 2:
        raise CheckpointError(
            f"{metadata.path}: the tensor 'rope_freqs.weight' has {factors.size} elements, where half the "
            f"head dimension, {head_dim // 2}, is expected."
        )
    if factors is None or bool(np.all(factors == 1)):
        return declared
    if declared is not None:
        raise CheckpointError(
            f"{metadata.path}: both {metadata.key('.rope.scaling.type')!r} and the tensor "
            "'rope_freqs.weight' scale the rotary frequencies, which is not supported."
        )
    original = metadata.size(".rope.scaling.original_context_length", 8192)
    found = llama3_scaling(factors.astype(np.float64), theta, original)
    if found is None:
        raise CheckpointError(
            f"{metadata.path}: the tensor 'rope_freqs.weight' does not follow the llama3 rule for scaling "
            "rotary frequencies, the only one that is supported."
        )
    return found


def _declared(metadata: Metadata) -> dict[str, Any] | None:
    factor_key = ".rope.scaling.factor" if metadata.has(".rope.scaling.factor") else ".rope.scale_linear"
    kind = metadata.string(".rope.scaling.type", "linear" if metadata.has(factor_key) else "none")
    if kind == "none":
        return None
    if kind == "linear":
        # llama.cpp reads a factor of zero as no scaling.
        factor = metadata.number(factor_key, 1.0, positive=False)
        return None if factor in (0, 1) else {"rope_type": "linear", "factor": metadata.number(factor_key)}
    if kind == "yarn":
        return _yarn(metadata)
    raise metadata.refuse(".rope.scaling.type", f"is {kind!r}; 'none', 'linear' and 'yarn' are supported")


def _yarn(metadata: Metadata) -> dict[str, Any]:
    for key, neutral in ((".rope.scaling.yarn_log_multiplier", 0), (".rope.scaling.yarn_ext_factor", 1)):
        if metadata.number(key, neutral, positive=False) != neutral:
            raise metadata.refuse(key, f"is {metadata.values[metadata.key(key)]!r}, which is not supported")
    factor = metadata.number(".rope.scaling.factor")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.size(
            ".rope.scaling.original_context_length", metadata.size(".context_length")
        ),
        "beta_fast": metadata.number(".rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number(".rope.scaling.yarn_beta_slow", 1.0),
    }
    # GGUF's factor multiplies the usual one; Hugging Face's replaces it.
    attention = metadata.number(".rope.scaling.attn_factor", 1.0)
    attention *= metadata.number(".rope.scaling.yarn_attn_factor", 1.0)
    if attention != 1:
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return scaling


def llama3_scaling(factors: NDArray[np.float64], theta: float, original: int) -> dict[str, Any] | None:
    """Recover the parameters of llama3 scaling from the factors it gave.

    With x = 1 / wavelength, the rule makes 1 / factor a straight line between two plateaus: 1 for short
    waves and 1 / F for long ones. F, and where the line meets the plateaus, are all there is to find.

    Args:
        factors: float64 [head_dim / 2], what each frequency is divided by.
        theta: The base of the frequencies.
        original: A context length to express the ends of the line in, as the rule does.

    Returns:
        A `rope_scaling` object that gives these factors again, or None if none does.
    """
    if not np.all(np.isfinite(factors)) or np.any(factors < 1 - _TOLERANCE):
        return None
    with np.errstate(all="ignore"):
        x = theta ** (-np.arange(factors.size) / factors.size) / (2 * math.pi)
        factor = float(factors.max())
        factor = round(factor, 3) if math.isclose(round(factor, 3), factor, rel_tol=1e-6) else factor
        ends = [(1.0, 4.0), *_line_ends(x, factors, factor, original)]
        errors = [_error(x * original, factors, factor, low, high) for low, high in ends]
    # Earlier ones are rounder, so they go first as long as they differ by no more than rounding does.
    best = next((error for error in errors if error < _ROUNDING), min(errors))
    low, high = ends[errors.index(best)]
    if not best < _TOLERANCE:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _error(
    waves: NDArray[np.float64], factors: NDArray[np.float64], factor: float, low: float, high: float
) -> float:
    """The largest relative error of the factors that the rule gives; infinite where it gives none."""
    smooth = np.clip((waves - low) / (high - low), 0, 1)
    error = float(np.max(np.abs(((1 - smooth) / factor + smooth) * factors - 1)))
    return error if low < high and math.isfinite(error) else math.inf


def _line_ends(
    x: NDArray[np.float64], factors: NDArray[np.float64], factor: float, original: int
) -> Iterator[tuple[float, float]]:
    """Where a line between the plateaus may end, for each pair of points that could fix it.

    Two points on the line itself fix it best. Where there are fewer, many lines give these factors, and
    the points where the plateaus begin will do.
    """
    at_one = np.flatnonzero(factors <= 1 + _TOLERANCE)
    at_factor = np.flatnonzero(factors >= factor * (1 - _TOLERANCE))
    first = int(at_one[-1]) if at_one.size else -1
    last = int(at_factor[0]) if at_factor.size else factors.size
    inner = [(first + 1, last - 1)] if last - first > 2 else []
    for a, b in inner or pairwise(range(max(first, 0), min(last, factors.size - 1) + 1)):
        slope = float((1 / factors[a] - 1 / factors[b]) / (x[a] - x[b]))
        if not slope > 0:
            continue
        offset = float(1 / factors[a] - slope * x[a])
        low, high = original * (1 / factor - offset) / slope, original * (1 - offset) / slope
        if math.isfinite(low) and math.isfinite(high):
            yield round(low, 3), round(high, 3)  # exact, where the model's makers chose round numbers
            yield low, high
