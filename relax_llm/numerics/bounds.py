"""How far a launch may be from the same launch elsewhere: a share of its row's scale, from what it computes.

A float32 sum of n terms is, for random rounding errors, within (4 sqrt(n) + 4) u of the magnitude of its partial
sums (Higham and Mary 2019; `relax_llm.kernels.operators.operator.summed` has the reasoning), and two kernels may each
be that far off. Partial sums are of the order of the row's largest result. Where they are not, because large terms
cancel in every output of a row, an honest kernel can be outside: `float64` judges each element by its own terms.
"""

import math
from collections.abc import Mapping
from typing import Any

UNIT = 2.0**-24
"""Unit roundoff of float32."""

FORMATS: Mapping[str, float] = {
    "f32": 0.0,
    "f16": 2.0**-10,
    "bf16": 2.0**-7,
    "q8": 2.0**-5,
    "q6": 2.0**-3,
    "q4": 0.5,
    "q4s": 0.5,
}
"""What another weight format may change in a product, as a share of its row.

Rounding errors of the weights are independent, so they count as one of them does against one weight: about half a
step of the format against a typical weight, six standard deviations of it, whatever the length of the sum.
"""

LOGITS = 1e-2
"""How far logits may have drifted at the end, where weights are the same, without any site being out of its bound."""

_ACTIVATIONS = {"int7": 2.0**-5, "int8": 2.0**-6, "int16": 2.0**-14, "bf16": 2.0**-8}
"""What rounded activations may change, likewise: a typical step against a typical activation."""

_GATED = 4.0  # A product's largest result is smaller than the product of its factors' largest.
_SCORE = 16.0  # Magnitude of the terms of an attention score: what is missed of it is missed in the exponent.
_POWER = 64.0  # Magnitude of an exponent that still counts in a sum of exponentials.
_TABLE = 6e-7  # Twice the error of a float32 cosine.


def share(operator: str, problem: Mapping[str, Any], kv_len: int, formats: tuple[str, str]) -> float:
    """The bound of a launch.

    Args:
        operator: What it computes.
        problem: The fields of its problem.
        kv_len: Tokens in the cache.
        formats: How its weight is stored on either side.
    """
    return _computing(operator, problem, kv_len) + _storing(operator, problem, formats)


def _computing(operator: str, problem: Mapping[str, Any], kv_len: int) -> float:
    if operator == "matmul":
        rounded = _ACTIVATIONS.get(problem.get("activations") or "", 0.0)
        if problem.get("norm"):
            rounded += _computing("norm", problem["norm"], kv_len)
        return (2 * UNIT * _summed(problem["k"]) + rounded) * (_GATED if problem.get("gated") else 1.0)
    if operator == "norm":
        return 2 * UNIT * (_summed(problem["hidden"]) + 8)
    if operator == "attention":
        return 2 * UNIT * (_summed(problem["head_dim"]) * _SCORE + _summed(kv_len)) + _attended(problem)
    if operator == "append":
        return 8 * UNIT + (_TABLE if problem.get("rope") else 0.0) + _cached(problem)
    if operator == "rope_table":
        return _TABLE + 2 * UNIT * kv_len  # the angle is a product with the position, rounded
    if operator == "softmax":
        return 2 * UNIT * (_summed(problem["width"]) + _POWER)
    return 8 * UNIT if operator in ("fused", "elementwise") else 0.0


def _cached(problem: Mapping[str, Any]) -> float:
    """What rounding to a cache's format changes; a code of q8 is rounded as a share of its head's largest channel."""
    return {"f32": 0.0, "bf16": 2.0**-8, "q8": 2.0**-6}[problem.get("cache", "f32")]


def _attended(problem: Mapping[str, Any]) -> float:
    """What rounding keys, values, queries and weights changes, most of it in the exponents."""
    return 4 * _cached(problem)


def _storing(operator: str, problem: Mapping[str, Any], formats: tuple[str, str]) -> float:
    if formats[0] == formats[1]:
        return 0.0
    widest = max(FORMATS.get(name, 1.0) for name in formats)
    return widest * (_GATED if operator == "matmul" and problem.get("gated") else 1.0)


def _summed(length: int) -> float:
    return 4 * math.sqrt(length) + 4
