"""Who multiplies matrices for benchmarks/kernels.py: each in a process of its own, one at a time.

Importing this module must stay cheap and start no thread pool: the environment of a child process is set first.
"""

import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

POOL = 1 << 28
"""f32 elements of the memory that weights are taken from, in turns: 1 GiB."""

_SETTLE = 0.004  # seconds: what threads of the peer before spin for
_SPIN = {"OPENBLAS_THREAD_TIMEOUT": "20", "TVM_BIND_THREADS": "0"}


@dataclass(frozen=True)
class Shape:
    """A matrix product of a model: x [M, K] times the transpose of a weight [N, K].

    Attributes:
        name: Whose.
        n: Outputs.
        k: Reduction length.
    """

    name: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.name} {self.n}x{self.k}"

    @property
    def bytes(self) -> int:
        """Of the weight."""
        return 4 * self.n * self.k


class Product(Protocol):
    """A way to multiply.

    Attributes:
        names: The kernels that it has; several where one is chosen by size.
    """

    names: list[str]

    def bind(self, kernel: str, x: Array, out: Array, weights: list[Array]) -> Callable[[int], None] | None:
        """What computes `out` from `x` [M, K] and the weight of an index, or None where the kernel does not serve M.

        Args:
            kernel: One of `names`.
            x: [M, K].
            out: [M, N].
            weights: Several of [N, K], to be taken in turns.
        """
        ...


class OpenBLAS:
    """The library that NumPy's wheels carry."""

    def __init__(self, threads: int, _: Shape) -> None:
        """Find it among the libraries of this process."""
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        places = sorted({line.split()[-1] for line in maps if "openblas" in line})
        if not places:
            raise ImportError("NumPy was not built with OpenBLAS here")
        library = ctypes.CDLL(places[0])
        prefix, suffix = "scipy_", "64_"
        self._int: type[ctypes.c_int32] | type[ctypes.c_int64] = ctypes.c_int64
        if not hasattr(library, "scipy_cblas_sgemm64_"):
            prefix, suffix, self._int = "", "", ctypes.c_int32
        getattr(library, f"{prefix}openblas_set_num_threads{suffix}")(threads)
        self._sgemm = getattr(library, f"{prefix}cblas_sgemm{suffix}")
        self._sgemv = getattr(library, f"{prefix}cblas_sgemv{suffix}")
        self._sgemm.restype = self._sgemv.restype = None
        self.names = ["openblas"]

    def bind(self, kernel: str, x: Array, out: Array, weights: list[Array]) -> Callable[[int], None]:
        """One row is cblas_sgemv, more are cblas_sgemm: what a careful caller does."""
        (m, k), n = x.shape, out.shape[1]
        i, one, zero = self._int, ctypes.c_float(1), ctypes.c_float(0)
        row_major, plain, transposed = 101, 111, 112
        at = [ctypes.c_void_p(weight.ctypes.data) for weight in weights]
        xp, op = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        if m == 1:
            vector = (row_major, plain, i(n), i(k), one)
            return lambda w: self._sgemv(*vector, at[w], i(k), xp, i(1), zero, op, i(1))
        matrix = (row_major, plain, transposed, i(m), i(n), i(k), one)
        ldx, ldo = i(k), i(n)
        return lambda w: self._sgemm(*matrix, xp, ldx, at[w], ldx, zero, op, ldo)


class Torch:
    """PyTorch: what F.linear calls (MKL in the wheels for x86), and oneDNN's product."""

    def __init__(self, threads: int, _: Shape) -> None:
        """Import it."""
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self.names = ["torch"]
        if torch.backends.mkldnn.is_available():
            self.names.append("onednn")

    def bind(self, kernel: str, x: Array, out: Array, weights: list[Array]) -> Callable[[int], None]:
        """Into memory that is there already, where the function can: F.linear takes new memory at every call."""
        torch = self._torch
        xt, ot = torch.from_numpy(x), torch.from_numpy(out)
        if kernel == "onednn":
            plain = [torch.from_numpy(weight) for weight in weights]
            linear = torch.ops.mkldnn._linear_pointwise

            def onednn(w: int) -> None:
                with torch.inference_mode():
                    linear(xt, plain[w], None, "none", [], "")

            return onednn
        turned = [torch.from_numpy(weight).t() for weight in weights]

        def mm(w: int) -> None:
            with torch.inference_mode():
                torch.mm(xt, turned[w], out=ot)

        return mm


class RelaxLLM:
    """This project's kernels, each by its name."""

    def __init__(self, threads: int, shape: Shape) -> None:
        """Generate code for the kernels of one shape."""
        os.environ["TVM_NUM_THREADS"] = str(threads)
        import tvm_ffi

        from relax_llm.artifact.memory import aligned
        from relax_llm.kernels.generate import generate
        from relax_llm.kernels.instruments import MULTIPLY_ADD, multiply_add
        from relax_llm.kernels.machine import LANES, machine
        from relax_llm.kernels.matmul import Matmul
        from relax_llm.kernels.matmul.family import matmul_kernels
        from relax_llm.kernels.matmul.tiled import layout_for
        from relax_llm.kernels.threads import load
        from relax_llm.plan.kernel import Declined

        here, problem = machine(), Matmul(shape.n, shape.k)
        self._problem = problem
        self._dlpack = tvm_ffi.from_dlpack
        self._packed = layout_for(problem, here).shape(shape.n, shape.k)
        self._kernels, made = {}, {}
        for kernel in matmul_kernels(here):
            if kernel.layout == "tiled":
                with suppress(Declined):  # it is for weights or activations in another format
                    made[kernel.name] = kernel.make(problem)
                    self._kernels[kernel.name] = kernel
        made[MULTIPLY_ADD] = multiply_add(here)
        library = load(generate(made, here))
        half, sums = aligned((threads, LANES)), aligned((threads, LANES))
        half[...] = 0.5
        self._steps = 200_000 * here.accumulators
        self._registers = [self._dlpack(half), self._steps, self._dlpack(sums)]
        self._vectors = threads * LANES
        self._multiply_add = library[MULTIPLY_ADD]
        del made[MULTIPLY_ADD]
        self._functions = {name: library[name] for name in made}
        self.names = list(made)

    def bind(self, kernel: str, x: Array, out: Array, weights: list[Array]) -> Callable[[int], None] | None:
        """A kernel where it is valid."""
        record, rows = self._kernels[kernel], len(x)
        if {"M": rows} not in record.sizes:
            return None
        function = self._functions[kernel]
        at = [self._dlpack(self._as_packed(weight)) for weight in weights]
        xt, ot = self._dlpack(x), self._dlpack(out)
        return lambda w: function(xt, at[w], ot)

    def flops(self) -> float:
        """Operations a second of multiply-adds in registers, now: about a millisecond."""
        began = time.perf_counter()
        self._multiply_add(*self._registers)
        return 2 * self._vectors * self._steps / (time.perf_counter() - began)

    def planned(self, m: int) -> str:
        """The kernel that costs choose."""
        from relax_llm.plan.choosing import cover

        ranges = cover(list(self._kernels.values()), self._problem, ("M",))
        return next(part.kernel for part in ranges if {"M": m} in part.sizes)

    def _as_packed(self, weight: Array) -> Array:
        """The memory of a weight, and what follows it, as a packed one: the values are random in any case."""
        count = int(np.prod(self._packed))
        return np.lib.stride_tricks.as_strided(weight.reshape(-1), (count,), (4,)).reshape(self._packed)


PEERS: dict[str, Callable[[int, Shape], Product]] = {
    "relax_llm": RelaxLLM,
    "openblas": OpenBLAS,
    "torch": Torch,
}


class Worker:
    """One of `PEERS` in a process of its own; a context manager, which ends the process."""

    def __init__(self, peer: str, threads: int) -> None:
        """Start it."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        os.environ.update(_SPIN)
        self._process = context.Process(target=_serve, args=(theirs, peer, threads), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def shape(self, shape: Shape) -> list[str]:
        """Turn to a shape; what is returned are the kernels for it.

        Raises:
            ImportError: What the peer needs is not installed.
        """
        return list(self._ask("shape", shape))

    def seconds(self, kernel: str, m: int, budget: float) -> float | None:
        """Seconds of one call, over as many as the budget in seconds allows, while all others wait."""
        answer: float | None = self._ask("seconds", kernel, m, budget)
        return answer

    def flops(self) -> float:
        """What this project's process could do at most in registers, at the clock that its last kernel left behind."""
        return float(self._ask("flops"))

    def planned(self, m: int) -> str:
        """The kernel that this project's costs choose for M rows."""
        return str(self._ask("planned", m))

    def _ask(self, *request: object) -> Any:
        self._connection.send(request)
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


class _Server:
    """Measures one peer.

    Weights lie one after another in `POOL` elements of memory and every call takes the next, as the layers of a model
    do: they come from wherever 1 GiB of weights is, memory and a little of the last cache, and never from the caches
    of a core.
    """

    def __init__(self, peer: str, threads: int) -> None:
        self._peer, self._threads = peer, threads
        rng = np.random.default_rng(0)
        # Values of +-[0.5, 1): no denormals, and no sum that grows far.
        piece = rng.uniform(0.5, 1, 1 << 20).astype(np.float32) * rng.choice(
            np.array([-1, 1], np.float32), 1 << 20
        )
        self._pool = _resident(POOL + (1 << 20))
        for start in range(0, len(self._pool), len(piece)):
            self._pool[start : start + len(piece)] = piece[: len(self._pool) - start]
        self._x, self._out = np.empty(0, np.float32), np.empty(0, np.float32)
        self._next = 0
        self._bound: dict[tuple[str, int], Callable[[int], None] | None] = {}

    def shape(self, shape: Shape) -> list[str]:
        self._product = PEERS[self._peer](self._threads, shape)
        self._shape = shape
        apart = -(-shape.n // 64) * 64 * shape.k  # whole panels
        count = max(1, POOL // apart)
        self._weights = [
            self._pool[i * apart : i * apart + shape.n * shape.k].reshape(shape.n, shape.k)
            for i in range(count)
        ]
        self._bound, self._next = {}, 0
        return self._product.names

    def flops(self) -> float:
        return float(self._product.flops())  # type: ignore[attr-defined]

    def planned(self, m: int) -> str:
        return str(self._product.planned(m))  # type: ignore[attr-defined]

    def seconds(self, kernel: str, m: int, budget: float) -> float | None:
        call = self._call(kernel, m)
        if call is None:
            return None
        time.sleep(_SETTLE)
        once = self._run(call, 1)  # wakes the threads, and shows how many calls the budget allows
        count = int(min(1000, budget / once))
        return self._run(call, count) if count > 1 else min(once, self._run(call, 1))

    def _call(self, kernel: str, m: int) -> Callable[[int], None] | None:
        if (kernel, m) not in self._bound:
            n, k = self._shape.n, self._shape.k
            if m * k > self._x.size:
                self._x = _resident(m * k)
                self._x[...] = np.resize(self._pool[7 : 7 + (1 << 19)], m * k)
                self._bound = {}
            if m * n > self._out.size:
                self._out = _resident(m * n)
                self._out[...] = 0
                self._bound = {}
            x, out = self._x[: m * k].reshape(m, k), self._out[: m * n].reshape(m, n)
            self._bound[kernel, m] = self._product.bind(kernel, x, out, self._weights)
        return self._bound[kernel, m]

    def _run(self, call: Callable[[int], None], count: int) -> float:
        at, size = self._next, len(self._weights)
        began = time.perf_counter()
        for _ in range(count):
            call(at)
            at = at + 1 if at + 1 < size else 0
        seconds = time.perf_counter() - began
        self._next = at
        return seconds / count


def _resident(count: int) -> Array:
    """f32 elements at the start of a page."""
    memory = np.empty(4 * count + 4096, np.uint8)
    start = -memory.ctypes.data % 4096
    return memory[start : start + 4 * count].view(np.float32)


def _serve(connection: Connection, peer: str, threads: int) -> None:
    server = _Server(peer, threads)
    while True:
        try:
            what, *arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(getattr(server, what)(*arguments))
        except ImportError as error:
            connection.send(error)
