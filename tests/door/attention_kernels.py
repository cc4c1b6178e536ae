# mypy: disable-error-code="no-untyped-def, untyped-decorator, valid-type"
"""Attention as a user would write it: TVMScript, a schedule, C, Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tvm.script import tirx as T

if TYPE_CHECKING:
    from relax_llm.kernels.attention import Attention

TILE = 16

C_SOURCE = """
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
void in_c(const float *q, const float *k_cache, const float *v_cache, int64_t kv_len, float *out,
          int64_t batch, int64_t seq, int64_t tiles) {
  float *weight = malloc(sizeof(float) * kv_len);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t s = 0; s < seq; s++)
      for (int64_t h = 0; h < HEADS; h++) {
        int64_t g = h / (HEADS / KV_HEADS), last = kv_len - seq + s;
        int64_t first = WINDOW && last >= WINDOW ? last - WINDOW + 1 : 0;
        const float *query = q + ((b * seq + s) * HEADS + h) * HEAD_DIM;
        const float *keys = k_cache + (b * KV_HEADS + g) * tiles * HEAD_DIM * 16;
        const float *values = v_cache + (b * KV_HEADS + g) * tiles * 16 * HEAD_DIM;
        float largest = -1e30f, total = 0;
        for (int64_t t = first; t <= last; t++) {
          float score = 0;
          for (int64_t d = 0; d < HEAD_DIM; d++)
            score += query[d] * keys[(t / 16 * HEAD_DIM + d) * 16 + t % 16];
          weight[t] = score * (float)SCALE;
          if (weight[t] > largest) largest = weight[t];
        }
        for (int64_t t = first; t <= last; t++) total += weight[t] = expf(weight[t] - largest);
        float *result = out + ((b * seq + s) * HEADS + h) * HEAD_DIM;
        for (int64_t d = 0; d < HEAD_DIM; d++) {
          float sum = 0;
          for (int64_t t = first; t <= last; t++) sum += weight[t] * values[t * HEAD_DIM + d];
          result[d] = sum / total;
        }
      }
  free(weight);
}
"""


def script(problem: Attention) -> Any:
    """One query head to a task: two sweeps over the keys, for the largest score and for the weighted sum."""
    heads, kv_heads, dim = problem.heads, problem.kv_heads, problem.head_dim
    group, scale = heads // kv_heads, problem.scale
    window = problem.window or 2**40

    @T.prim_func(s_tir=True)
    def attend(q_in: T.handle, k_in: T.handle, v_in: T.handle, kv_len: T.int64, out_in: T.handle):
        batch, seq, tiles = T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_in, (batch, seq, heads, dim), "float32")
        k_cache = T.match_buffer(k_in, (batch, kv_heads, tiles, dim, TILE), "float32")
        v_cache = T.match_buffer(v_in, (batch, kv_heads, tiles, TILE, dim), "float32")
        out = T.match_buffer(out_in, (batch, seq, heads * dim), "float32")
        for b, s in T.grid(batch, seq):
            for h in T.parallel(heads):
                state = T.alloc_buffer((3,), "float32")
                state[0] = T.float32(-1e30)
                for t in T.serial(kv_len - seq + s + 1):
                    if t > kv_len - seq + s - window:
                        state[2] = T.float32(0)
                        for d in T.serial(dim):
                            state[2] = (
                                state[2] + q[b, s, h, d] * k_cache[b, h // group, t // TILE, d, t % TILE]
                            )
                        state[0] = T.max(state[0], state[2] * T.float32(scale))
                state[1] = T.float32(0)
                for c in T.serial(dim):
                    out[b, s, h * dim + c] = T.float32(0)
                for t in T.serial(kv_len - seq + s + 1):
                    if t > kv_len - seq + s - window:
                        state[2] = T.float32(0)
                        for d in T.serial(dim):
                            state[2] = (
                                state[2] + q[b, s, h, d] * k_cache[b, h // group, t // TILE, d, t % TILE]
                            )
                        state[2] = T.exp(state[2] * T.float32(scale) - state[0])
                        state[1] = state[1] + state[2]
                        for c in T.serial(dim):
                            out[b, s, h * dim + c] = (
                                out[b, s, h * dim + c]
                                + state[2] * v_cache[b, h // group, t // TILE, t % TILE, c]
                            )
                for c in T.serial(dim):
                    out[b, s, h * dim + c] = out[b, s, h * dim + c] / state[1]

    return attend


def over_heads(schedule: Any, problem: Attention) -> None:
    """Heads over the cores, in every block that has them."""
    del problem
    for name in ("scores", "weights", "weighted"):
        loops = schedule.get_loops(schedule.get_sblock(name))
        schedule.parallel(schedule.fuse(loops[0], loops[1]))


def in_python(problem: Any, q: Any, k_cache: Any, v_cache: Any, kv_len: int, out: Any) -> None:
    """Softmax attention in NumPy."""
    batch, seq, heads, dim = q.shape
    group = heads // problem.kv_heads
    keys = k_cache.transpose(0, 2, 4, 1, 3).reshape(batch, -1, problem.kv_heads, dim)[:, :kv_len]
    values = v_cache.transpose(0, 2, 3, 1, 4).reshape(batch, -1, problem.kv_heads, dim)[:, :kv_len]
    scores = np.einsum("bshd,bthd->bhst", q, np.repeat(keys, group, 2), dtype=np.float64) * problem.scale
    query, position = np.arange(kv_len - seq, kv_len)[:, None], np.arange(kv_len)[None]
    visible = position <= query
    if problem.window:
        visible &= position > query - problem.window
    weights = np.exp(
        np.where(visible, scores - scores.max(axis=-1, keepdims=True, where=visible, initial=-1e30), -np.inf)
    )
    weights /= weights.sum(axis=-1, keepdims=True)
    out[...] = np.einsum("bhst,bthd->bshd", weights, np.repeat(values, group, 2)).reshape(out.shape)
