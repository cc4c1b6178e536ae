"""A kernel in C that calls a BLAS: cblas_sgemm, found by name when it is first needed.

relax-llm compile CHECKPOINT --kernels docs/examples/blas.py

The weight stays as it is in the checkpoint, and what the product does not cover (bias, activation, residual) is added
by a kernel beside it. The artifact holds the library's path; RELAX_LLM_BLAS names another one at run time.
"""

import ctypes
import ctypes.util
import os
from pathlib import Path

import numpy as np

import relax_llm as rl

# What cblas_sgemm is called, and its integers: libraries for NumPy have names of their own, with 64-bit integers.
SYMBOLS = (("scipy_cblas_sgemm64_", "int64_t"), ("cblas_sgemm64_", "int64_t"), ("cblas_sgemm", "int"))

SOURCE = r"""
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef @INT@ blas_int;
typedef void sgemm(int order, int trans_a, int trans_b, blas_int m, blas_int n, blas_int k, float alpha,
                   const float *a, blas_int lda, const float *b, blas_int ldb, float beta, float *c, blas_int ldc);

static sgemm *find(void) {
  const char *path = getenv("RELAX_LLM_BLAS");
  void *library = dlopen(path ? path : "@PATH@", RTLD_NOW | RTLD_LOCAL);
  sgemm *found = library ? (sgemm *)dlsym(library, "@SYMBOL@") : NULL;
  if (!found) {
    fprintf(stderr, "The kernel 'blas' finds no @SYMBOL@: %s. RELAX_LLM_BLAS can name the library.\n", dlerror());
    abort();
  }
  return found;
}

/* out [M, N] = x [M, K] times the transpose of weight [N, K]. */
void blas(const float *x, const float *weight, float *out, int64_t M) {
  static sgemm *product; /* threads that come at once find the same */
  if (!product) product = find();
  product(101, 111, 112, M, N, K, 1.0f, x, K, weight, K, 0.0f, out, N);
}
"""


def library() -> tuple[str, str, str] | None:
    """The path of a BLAS, the name of its cblas_sgemm, and the C type of its integers; None where there is none."""
    beside = Path(np.__file__).parent.parent / "numpy.libs"
    places = [os.environ.get("RELAX_LLM_BLAS"), *map(str, sorted(beside.glob("*openblas*")))]
    places += [ctypes.util.find_library(name) for name in ("openblas", "mkl_rt", "blis", "cblas")]
    for place in filter(None, places):
        try:
            loaded = ctypes.CDLL(place)
        except OSError:
            continue
        for symbol, integer in SYMBOLS:
            if hasattr(loaded, symbol):
                return str(place), symbol, integer
    return None


@rl.kernel("matmul", m=(64, None))
def blas(problem: object) -> str:
    """C source for a problem: N and K are macros that the compiler is given."""
    found = library()
    if found is None:
        raise rl.Declined("no BLAS was found; RELAX_LLM_BLAS can name one")
    path, symbol, integer = found
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return SOURCE.replace("@PATH@", escaped).replace("@SYMBOL@", symbol).replace("@INT@", integer)
