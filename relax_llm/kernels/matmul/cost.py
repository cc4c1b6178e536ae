"""How long the kernels over a packed weight take, as far as can be told without measuring.

Two times are set against each other: multiply-adds at the speed of the registers, and the weight's bytes at the speed
of memory. Prefetching hides most of the smaller behind the larger. To that come what each tile costs beside its
multiply-adds, x where it is too large for the second-level cache, and copying in `blocked`.

The constants describe cores of two servers with AVX-512 (Xeon and EPYC); `python -m benchmarks.kernels` prints
what they predict beside what it measures. Only comparisons between kernels matter, so that constants which are wrong
for all kernels alike do no harm. `relax-llm tune` measures instead.
"""

from collections.abc import Callable, Mapping

from relax_llm import cpu
from relax_llm.formats import FORMATS
from relax_llm.kernels.layout import Tiled
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.shape import Blocking, blocked_blocking, tile_for, tiled_blocking

_HERTZ = 3.5e9
_PORTS = 2  # multiply-adds of a vector that begin in a cycle
_MEMORY = 16e9  # bytes a second that a core reads
_AGAIN = 0.25  # of the time of the first reading of the weight, for every block of rows after the first
_CACHE = 30e9  # bytes a second from the last-level cache, where nothing was asked for ahead
_COPY = 60e9  # bytes of x a second that `blocked` copies
_HIDDEN = 0.6  # of the smaller of two times, behind the larger
_TILE = 150 / _HERTZ  # seconds that a tile takes in each part of the reduction beside its multiply-adds
_SCATTERED = 1.15
"""How much longer multiply-adds take on tall tiles whose rows lie in x: often a multiple of a page apart, so that they
compete for a few places of a first-level cache. Rows that were copied next to each other do not."""
_LAUNCH = 2e-6
_SECOND_LEVEL = 1 << 20  # bytes of x that stay in the second-level cache beside the weight

Cost = Callable[[Matmul, Mapping[str, int]], float]


def tiled_cost(machine: Machine, *, copied: bool = False) -> Cost:
    """Seconds of a launch of `tiled`; of one over rows that were copied next to each other, where `copied`."""

    def cost(problem: Matmul, sizes: Mapping[str, int]) -> float:
        m = sizes["M"]
        blocking = tiled_blocking(problem, machine)
        tasks = blocking.blocks(m) * _panels(problem, machine)
        rows = min(m, blocking.tiles * blocking.tile.rows)
        again = 4 * m * problem.k * (_panels(problem, machine) - 1)  # bytes of x that every panel reads anew
        streamed = again / _CACHE * (1 - _HIDDEN) if 4 * rows * problem.k > _SECOND_LEVEL else 0.0
        scattered = _SCATTERED if m > 2 * blocking.tile.alone and not copied else 1.0
        return _seconds(problem, machine, m, blocking, tasks, _HIDDEN, streamed, scattered)

    return cost


def blocked_cost(machine: Machine) -> Cost:
    """Seconds of a launch of `blocked`."""

    def cost(problem: Matmul, sizes: Mapping[str, int]) -> float:
        m = sizes["M"]
        blocking = blocked_blocking(problem, machine)
        groups = blocking.groups(_panels(problem, machine))
        copied = 4 * m * problem.k * groups / _COPY
        return _seconds(problem, machine, m, blocking, blocking.blocks(m) * groups, _HIDDEN, copied)

    return cost


def _panels(problem: Matmul, machine: Machine) -> int:
    return Tiled(tile_for(machine).cols, problem.gated).panels(problem.n)


def _seconds(
    problem: Matmul,
    machine: Machine,
    m: int,
    blocking: Blocking,
    tasks: int,
    hidden: float,
    more: float,
    scattered: float = 1.0,
) -> float:
    tile, panels = blocking.tile, _panels(problem, machine)
    tiles = blocking.count(m)
    lanes = machine.vector_bits // 32
    products = panels * problem.k * m * (tile.cols // lanes) / (_PORTS * _HERTZ)
    latency = (
        panels * problem.k * tiles * 4 / _HERTZ
    )  # a step cannot begin before the one before it is through
    compute = max(products, latency) * scattered + panels * tiles * blocking.parts * _TILE
    blocks = blocking.blocks(m)
    memory = (
        FORMATS[problem.weight_format].nbytes(problem.n, problem.k) * (1 + (blocks - 1) * _AGAIN) / _MEMORY
    )
    alone = max(compute, memory) + (1 - hidden) * min(compute, memory) + more
    cores = max(1, cpu.cores())
    busy = tasks / -(-tasks // cores)  # cores that have work to the end
    return _LAUNCH + alone / busy
