"""The check at the door: a matmul kernel runs against the float64 reference before anything may choose it.

It runs where kernels break: at one row, at its range's boundaries, at the edges of usual tiles and their neighbours,
and at many rows. It runs in a process of its own (`trial`), in memory where a read or write past an argument shows,
on outputs that show what was not written. A kernel that passes is remembered by what it is made of.

Each size runs twice. Random real numbers, with inaccessible memory after every argument, test the arithmetic.
Small integers, with inaccessible memory before, test which terms are summed: every partial sum is exact in float32,
so that all orders of summation give the same bits and one term too few or too many is seen at any reduction length.
"""

import hashlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from relax_llm import cpu
from relax_llm.errors import KernelError
from relax_llm.kernels import layout, trial
from relax_llm.kernels.forms import Realized
from relax_llm.kernels.machine import CODE_GENERATION, Machine
from relax_llm.kernels.matmul import Matmul, arguments, problem as matmul_problem, reference
from relax_llm.kernels.matmul.tiled import layout_named
from relax_llm.kernels.trial import Launch, Request
from relax_llm.places import cache_directory

Array = npt.NDArray[Any]

OTHER_PROCESSOR = "not checked: made for another processor"

_TILES = (4, 8, 16, 32, 64)
_MANY = 257
_SLOWEST = 2.5e8  # FLOP/s that a launch may take at least: a quarter of what plain loops reach.
_START = 300.0  # Seconds, beyond all launches, until the process counts as stuck.
_ROUNDOFF = {
    "f32": 2.0**-24
}  # Of the accumulation, by weight format; the reference reads the same stored weight.
_LARGEST = 7  # Integers of the second run, in magnitude.
# Steepest slope of each activation: an error of d before it is at most this times d behind it.
_SLOPE = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "relu": 1.0}


@dataclass(frozen=True)
class _Outcome:
    """How a trial ended.

    Attributes:
        launch: The last launch that began, if one did.
        fault: What was wrong, or None.
        crash: The signal that ended the process, or None.
    """

    launch: Launch | None
    fault: str | None = None
    crash: str | None = None


def check(realized: Realized, machine: Machine, *, seconds: float = 20.0, seed: int | None = None) -> str:
    """Run a kernel against the reference, unless the same kernel passed before.

    Args:
        realized: The kernel, made for a problem.
        machine: What it is compiled for.
        seconds: How long a launch may take, beyond what plain loops need for its arithmetic.
        seed: Of the random inputs; by default a new one each time. Messages name it.

    Returns:
        "checked at M=1, 2, ...", or `OTHER_PROCESSOR` where this one cannot run the kernel.

    Raises:
        KernelError: The kernel is wrong, writes or reads out of bounds, modifies an input, crashes, takes too long,
            or cannot be compiled or called. The message names the kernel, the problem, M and what was seen.
    """
    if not _runs_here(machine, realized.kernel.features):
        return OTHER_PROCESSOR
    memory = cache_directory() / "checked" / _digest(realized, machine)
    known = _recall(memory)
    if known:
        return known
    seed = secrets.randbits(32) if seed is None else seed
    rows = sizes(realized.kernel.first, realized.kernel.last)
    with tempfile.TemporaryDirectory(prefix="relax_llm_check_") as name:
        directory = Path(name)
        library = _build(realized, machine, directory)
        rng = np.random.default_rng(seed)
        for data in ("reals", "integers"):
            _prepare(directory, data, realized, machine, max(rows), rng)
        names = tuple(arguments(realized.problem))
        launches = tuple(
            Launch(
                m,
                int(rng.integers(max(rows) - m + 1)),
                data,
                side,
                names,
                _limit(realized.problem, m, seconds),
            )
            for data, side in (("reals", "after"), ("integers", "before"))
            for m in rows
        )
        request = Request(str(library), realized.symbol, names, launches)
        outcome = _run(directory, request)
        fault = _explained(outcome, directory, request)
    if fault:
        at = f"at M={outcome.launch.rows} " if outcome.launch else ""
        raise KernelError(
            f"Kernel {realized.kernel.name!r} is refused for {realized.problem.name}: {at}{fault.rstrip('.')}. "
            f"(The inputs were random from seed {seed}.)"
        )
    status = f"checked at M={', '.join(map(str, rows))}"
    _remember(memory, status)
    return status


def sizes(first: int, last: int | None) -> list[int]:
    """The M at which a kernel for first..last is run, ascending.

    The ends of the range and their neighbours, the first four (each remainder of the smallest tile), for each tile
    height its first multiple in the range and its neighbours, and 257.
    """
    edges = [first, *(-(-first // tile) * tile for tile in _TILES), *([last] if last is not None else [])]
    wanted = {_MANY, first + 2, first + 3, *(edge + step for edge in edges for step in (-1, 0, 1))}
    return sorted(m for m in wanted if m >= first and (last is None or m <= last))


def expected(problem: Matmul, inputs: Mapping[str, Array], *, exact: bool) -> tuple[Array, Array]:
    """The right result in float64, and how far from it an honest float32 kernel may be, for each element.

    Write u = 2**-24, and S for the sum of |x| |w| over the reduction, plus |bias|. However it is ordered, a float32
    sum is within g u S of the exact one, where g <= K + 2 always (Higham 2002, section 3.1: K + 1 roundings on the way
    of a term), and where rounding errors of random inputs are independent, g <= c sqrt(K) with overwhelming
    probability (Higham and Mary 2019). Partial sums grow at most linearly, so the errors of K additions add up to a
    standard deviation below u S sqrt(K / 3); c = 4 is seven of these, and 4 more roundings cover products and bias. So
    g = min(K + 2, 4 sqrt(K) + 4). Where `exact`, inputs are small integers and g = 0.

    Behind the sum, an activation multiplies the error by at most its steepest slope and adds one of its own: 16 u
    max(1, |x|), three times what was measured for the worst of the built-in ones. A product of two inexact factors has
    the error |a| d(b) + |b| d(a) + d(a) d(b) and a rounding. A residual may be where the sum starts from or be added
    last: g + 2 roundings of its size, and one of the result's.

    Args:
        problem: What to compute.
        inputs: "x" [M, K], "weight" [N, K], and where the problem has them "bias" [N] and "residual" [M, outputs].
        exact: Whether sums of the inputs are exact in float32.

    Returns:
        The result and the bound, each float64 [M, outputs].
    """
    u = _ROUNDOFF[problem.weight_format]
    roundings = 0.0 if exact else min(problem.k + 2.0, 4.0 * math.sqrt(problem.k) + 4.0)
    linear = replace(problem, activation=None, gated=False, residual=False)
    outer = {name: array for name, array in inputs.items() if name != "residual"}
    right = reference(problem, inputs)
    plain = not (problem.activation or problem.gated)
    total = right if plain and not problem.residual else reference(linear, outer)
    if exact:
        error = np.zeros_like(total)
    else:
        error = roundings * u * reference(linear, {name: np.abs(array) for name, array in outer.items()})
    half = problem.outputs
    value, bound = total[:, :half], error[:, :half]
    if problem.activation:
        own = 0.0 if problem.activation == "relu" else 16.0 * u * np.maximum(1.0, np.abs(value))
        bound = _SLOPE[problem.activation] * bound + own
    if problem.gated:
        gate = {name: array[:half] if name in ("weight", "bias") else array for name, array in outer.items()}
        value = reference(replace(problem, n=half, gated=False, residual=False), gate)
        other, its = total[:, half:], error[:, half:]
        bound = np.abs(value) * its + np.abs(other) * bound + its * bound + u * np.abs(value * other)
    if problem.residual:
        bound = bound + u * ((roundings + 2.0) * np.abs(inputs["residual"]) + np.abs(right))
    return right, bound


def _prepare(
    directory: Path, data: str, realized: Realized, machine: Machine, rows: int, rng: np.random.Generator
) -> None:
    """Write the arrays of one kind of data for the trial, and what is right for them."""
    problem = realized.problem
    inputs = _integers(problem, rows, rng) if data == "integers" else _reals(problem, rows, rng)
    right = np.empty((rows, problem.outputs))
    bound = np.empty((rows, problem.outputs))
    step = max(1, 2**23 // problem.k)  # columns at a time, so that a float64 copy of the weight stays small
    for start in range(0, problem.outputs, step):
        columns = slice(start, min(start + step, problem.outputs))
        right[:, columns], bound[:, columns] = expected(
            *_columns(problem, inputs, columns), exact=data == "integers"
        )
    packed = layout_named(realized.kernel.layout, problem, machine).pack(inputs["weight"])
    for name, array in {**inputs, "weight": packed, "expected": right, "bound": bound}.items():
        np.save(directory / f"{data}.{name}.npy", array)


def _shapes(problem: Matmul, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    shapes = {
        "x": (rows, problem.k),
        "weight": (problem.n, problem.k),
        "bias": (problem.n,),
        "residual": (rows, problem.outputs),
    }
    return ((name, shapes[name]) for name in arguments(problem) if name != "out")


def _reals(problem: Matmul, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Normal numbers; the weight scaled so that products are of order 1, where activations bend."""
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in _shapes(problem, rows)}
    inputs["weight"] *= np.float32(1 / math.sqrt(problem.k))
    return inputs


def _integers(problem: Matmul, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Integers other than 0, the weight, bias and residual times a power of two: every sum of them is exact.

    No sum reaches 2**24: products stay below 2**23, and bias and residual below 2**22 each.
    """
    largest = min(_LARGEST, math.isqrt(2**23 // problem.k))
    typical = largest * (largest + 1) / 3 * math.sqrt(problem.k)
    shift = min(22, max(0, round(math.log2(typical))))

    def draw(shape: tuple[int, ...], limit: int) -> Array:
        magnitude: Array = rng.integers(1, limit + 1, shape, np.int32).astype(np.float32)
        return np.where(rng.integers(0, 2, shape, np.int8), magnitude, -magnitude)

    limits = {"x": largest, "weight": largest, "bias": 2**shift, "residual": 2**shift}
    inputs = {name: draw(shape, limits[name]) for name, shape in _shapes(problem, rows)}
    for name in inputs.keys() - {"x"}:
        inputs[name] *= np.float32(2.0**-shift)
    return inputs


def _columns(problem: Matmul, inputs: Mapping[str, Array], columns: slice) -> tuple[Matmul, dict[str, Array]]:
    """The problem of some outputs alone."""
    chosen: npt.NDArray[np.intp] = np.arange(columns.start, columns.stop)
    rows = np.concatenate([chosen, chosen + problem.outputs]) if problem.gated else chosen
    part = {name: array[rows] if name in ("weight", "bias") else array for name, array in inputs.items()}
    if problem.residual:
        part["residual"] = inputs["residual"][:, columns]
    return replace(problem, n=len(rows)), part


def _runs_here(machine: Machine, needed: frozenset[str]) -> bool:
    architecture = "x86_64" if machine.name in cpu.X86_LEVELS else machine.name
    here = cpu.features()  # empty where the operating system does not tell
    return architecture == cpu.architecture() and (not here or machine.features | needed <= here)


def _build(realized: Realized, machine: Machine, directory: Path) -> Path:
    """Compile the function, and link it with its objects, into a library of its own."""
    library = directory / "kernel.so"
    objects = [directory / f"object{index}.o" for index in range(len(realized.objects))]
    for path, content in zip(objects, realized.objects, strict=True):
        path.write_bytes(content)
    func = realized.func.with_attr("global_symbol", realized.symbol)
    try:
        with tvm.transform.PassContext(config=CODE_GENERATION):
            compiled = tvm.compile(tvm.IRModule({realized.symbol: func}), target=machine.target)
        compiled.export_library(str(library), addons=[str(path) for path in objects])
    except (RuntimeError, ValueError, TypeError) as error:
        raise KernelError(
            f"Kernel {realized.kernel.name!r} cannot be compiled for {realized.problem.name}: {error}"
        ) from error
    return library


def _limit(problem: Matmul, rows: int, seconds: float) -> float:
    return seconds + 2.0 * rows * problem.n * problem.k / _SLOWEST


def _run(directory: Path, request: Request) -> _Outcome:
    """Run a request in a process of its own."""
    request.write(directory)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    limit = _START + sum(launch.seconds for launch in request.launches)
    command = [sys.executable, "-m", trial.__name__, str(directory)]
    try:
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, timeout=limit, check=False
        )
        code, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stuck:
        code, output, errors = -int(signal.SIGALRM), stuck.stdout or b"", stuck.stderr or b""
    told = [json.loads(line) for line in output.decode().splitlines() if line.endswith("}")]
    begun = [line["launch"] for line in told if "launch" in line]
    launch = request.launches[begun[-1]] if begun else None
    last = told[-1] if told else {}
    if "done" in last:
        return _Outcome(launch)
    if "fault" in last:
        return _Outcome(launch, last["fault"])
    said = " ".join(errors.decode(errors="replace").split())[-300:]
    said = f"; it said: {said}" if said else ""
    if launch is None:
        raise KernelError(f"The process that checks kernels did not start (exit code {code}){said}.")
    if code == -int(signal.SIGALRM):
        return _Outcome(launch, f"it did not finish within {launch.seconds:.3g} s")
    if code < 0:
        return _Outcome(launch, f"it crashed with {_signal_name(-code)}{said}", _signal_name(-code))
    return _Outcome(launch, f"it ended the process with exit code {code}{said}")


def _explained(outcome: _Outcome, directory: Path, request: Request) -> str | None:
    """The fault; for a crash at inaccessible memory, found by running again, which argument it lies beside."""
    launch = outcome.launch
    if launch is None or outcome.crash not in ("SIGSEGV", "SIGBUS"):
        return outcome.fault
    roomy = _run(directory, replace(request, launches=(replace(launch, guarded=()),)))
    if roomy.crash:
        return outcome.fault
    if roomy.fault and roomy.fault.startswith(trial.OUT_OF_BOUNDS):
        return roomy.fault
    place = {"after": "past the end", "before": "before the start"}[launch.side]
    for name in request.arguments:
        if _run(directory, replace(request, launches=(replace(launch, guarded=(name,)),))).crash:
            return f"it reads {place} of {name!r} ({outcome.crash} in the inaccessible memory there)"
    return f"{outcome.fault}, when inaccessible memory lies directly {launch.side} its arguments"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _digest(realized: Realized, machine: Machine) -> str:
    """What a passed check depends on: the code, what it is for and where, and how it was checked."""
    kernel = realized.kernel
    what = {
        "symbol": realized.symbol,
        "func": tvm.ir.save_json(realized.func),
        "problem": realized.problem.to_json(),
        "rows": [kernel.first, kernel.last],
        "layout": layout_named(kernel.layout, realized.problem, machine).name,
        "machine": [machine.name, sorted(machine.features), str(machine.target)],
        "tvm": tvm.__version__,
        "objects": [hashlib.sha256(content).hexdigest() for content in realized.objects],
        "checking": [
            hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
            for module in (sys.modules[__name__], trial, matmul_problem, layout)
        ],
    }
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _recall(place: Path) -> str | None:
    try:
        status = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return status if status.startswith("checked at M=") else None


def _remember(place: Path, status: str) -> None:
    """Keep a status, whole or not at all. A cache that cannot be written costs time, nothing else."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f"{place.name}.{os.getpid()}.{secrets.token_hex(4)}")
        fresh.write_text(status, encoding="utf-8")
        fresh.replace(place)
    except OSError:
        return
