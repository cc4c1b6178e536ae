"""Kernels say which weight or cache they read, so that threads which wait can ask for the next: see ahead.hpp."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import IRModule, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.artifact.kv_cache import TILE
from relax_llm.formats import FORMATS, Blocks
from relax_llm.kernels.attention import Attention
from relax_llm.kernels.inner import INTERNAL
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.problem import problem_of
from relax_llm.kernels.threads import ANNOUNCE

_Span = tuple[Any, Any, Any, Any]  # address, bytes of a part, parts, bytes from one to the next


def announcing(mod: IRModule, machine: Machine) -> IRModule:
    """The module, in which what the model launches calls `ANNOUNCE` first, with each span of memory that it reads.

    Products have their weight, and attention its keys and then its values, of each sequence and head a part.
    """
    changed = mod.clone()
    for var, func in mod.functions_items():
        if not isinstance(func, PrimFunc) or INTERNAL in (func.attrs or {}):
            continue
        problem = problem_of(func)
        paced = T.int64(_paced(problem, machine))
        spans = _spans(func, problem)
        calls = [tirx.Evaluate(tirx.call_extern("void", ANNOUNCE, *span, paced)) for span in spans]
        if calls:
            changed[var] = func.with_body(tirx.SeqStmt([*calls, func.body]))
    return changed


def _paced(problem: object, machine: Machine) -> bool:
    """Whether all lines are to come that were asked for: a kernel of one row leaves it to the core to read ahead.

    Codes of less than a byte and caches are asked for by their kernels, line by line.
    """
    if machine.streams_into == 1 or not isinstance(problem, Matmul):
        return False
    format = FORMATS[problem.weight_format]
    return not isinstance(format, Blocks) or format.code_bits == 8


def _spans(func: PrimFunc, problem: object) -> Sequence[_Span]:
    if isinstance(problem, Matmul):
        weight = func.params[1]
        return [(weight.data, T.int64(_bytes(weight.ty.shape, weight.dtype)), T.int64(1), T.int64(0))]
    if isinstance(problem, Attention):
        queries, keys, values, *_, kv_len, _ = func.params
        first = T.int64(0)
        if problem.window is not None:
            before = kv_len - queries.ty.shape[1]
            first = tirx.floordiv(tirx.max(before - (problem.window - 1), T.int64(0)), TILE)
        tiles = tirx.floordiv(kv_len + (TILE - 1), TILE) - first
        return [_seen(cache, first, tiles) for cache in (keys, values)]
    return []


def _seen(cache: Any, first: tirx.Expr, tiles: tirx.Expr) -> _Span:
    """Some tiles of keys or values, of each sequence and head."""
    batch, heads, capacity, *tile = cache.ty.shape
    size = _bytes(tile, cache.dtype)
    origin = (0, 0, first, *(0 for _ in tile))
    start = T.address_of(cache[origin])
    return start, tiles * size, batch * heads, capacity * size


def _bytes(shape: Sequence[Any], dtype: Any) -> int:
    return math.prod(map(int, shape)) * np.dtype(str(dtype)).itemsize
