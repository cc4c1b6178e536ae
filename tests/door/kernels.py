# mypy: disable-error-code="no-untyped-def, untyped-decorator, valid-type"
"""Kernels as a user would write them: TVMScript, a schedule, C."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.script import tirx as T

import relax_llm as rl

if TYPE_CHECKING:
    from relax_llm.kernels.matmul import Matmul

C_SOURCE = """
#include <stdint.h>
void in_c(const float *x, const float *weight, float *out, int64_t M) {
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j++) {
      float sum = 0;
      for (int64_t k = 0; k < K; k++) sum += x[i * K + k] * weight[j * K + k];
      out[i * N + j] = sum;
    }
}
"""


def script(problem: Matmul) -> Any:
    """One output to a task, in TVMScript."""
    n, k = problem.n, problem.k

    @T.prim_func(s_tir=True)
    def gemv(x_handle: T.handle, weight: T.Buffer((n, k), "float32"), out_handle: T.handle):
        M = T.int64()
        x = T.match_buffer(x_handle, (M, k), "float32")
        out = T.match_buffer(out_handle, (M, n), "float32")
        for j in T.parallel(n):
            for i in T.serial(M):
                out[i, j] = T.float32(0)
                for r in T.serial(k):
                    out[i, j] = out[i, j] + x[i, r] * weight[j, r]

    return gemv


def schedule_outputs(schedule: Any, problem: Matmul) -> None:
    """Vectors along the outputs, rows over the cores."""
    block = schedule.get_sblock("matmul")
    i, j, k = schedule.get_loops(block)
    outer, inner = schedule.split(j, [None, 8])
    schedule.reorder(i, outer, k, inner)
    schedule.vectorize(inner)
    schedule.parallel(schedule.fuse(i, outer))
    schedule.decompose_reduction(block, k)


def in_script(**options: Any) -> Any:
    return rl.kernel("matmul", name="in_script", **options)(script)


def by_schedule(**options: Any) -> Any:
    def by_schedule(schedule: Any, problem: Matmul) -> None:
        schedule_outputs(schedule, problem)

    return rl.kernel("matmul", **options)(by_schedule)


def in_c(**options: Any) -> Any:
    def in_c(problem: Matmul) -> str:
        return C_SOURCE

    return rl.kernel("matmul", **options)(in_c)


def over_bf16(name: str) -> str:
    """C source of a product over a plain weight in bf16, a function of this name."""
    return f"""
        #include <stdint.h>
        #include <string.h>
        void {name}(const float *x, const uint16_t *weight, float *out, int64_t M) {{
          for (int64_t i = 0; i < M; i++)
            for (int64_t j = 0; j < N; j++) {{
              float sum = 0;
              for (int64_t k = 0; k < K; k++) {{
                uint32_t bits = (uint32_t)weight[j * K + k] << 16;
                float value;
                memcpy(&value, &bits, 4);
                sum += x[i * K + k] * value;
              }}
              out[i * N + j] = sum;
            }}
        }}
        """
