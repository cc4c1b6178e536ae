"""The check at the door: a kernel runs against the float64 reference before anything may choose it.

It runs where kernels break: at the smallest sizes, at its ranges' boundaries, at the edges of usual tiles and their
neighbours, and at large sizes. It runs in a process of its own (`trial`), in memory where a read or write past an
argument shows, on outputs that show what was not written. A kernel that passes is remembered by what it is made of.

Each size runs twice. Random real numbers, with inaccessible memory after every argument, test the arithmetic. With
inaccessible memory before, what comes is where possible small integers, which test which terms are summed: every
partial sum is exact in float32, so that all orders of summation give the same bits and one term too few or too many is
seen at any reduction length.

A kernel written in Python runs in this process: it cannot be handed to another one, and it cannot crash as compiled
code does.
"""

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from relax_llm import cpu, formats
from relax_llm.artifact.formulas import evaluate
from relax_llm.errors import KernelError
from relax_llm.formats import FORMATS
from relax_llm.kernels import layout, operators, points as chosen_points, trial
from relax_llm.kernels.forms import Realized
from relax_llm.kernels.generate import generate
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.operators import Operator, operator_of
from relax_llm.kernels.points import all_sizes, sizes, status_of
from relax_llm.kernels.threads import link
from relax_llm.kernels.trial import BOUND, EXPECTED, Argument, Launch, Request, Trial, array_file
from relax_llm.places import cache_directory

Array = npt.NDArray[Any]

OTHER_PROCESSOR = "not checked: made for another processor"

_SLOWEST = 2.5e8  # FLOP/s that a launch may take at least: a quarter of what plain loops reach.
_START = 300.0  # Seconds, beyond all launches, until the process counts as stuck.


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
            or cannot be compiled or called. The message names the kernel, the problem, the sizes and what was seen.
    """
    if not _runs_here(machine, realized.kernel.features):
        return OTHER_PROCESSOR
    memory = cache_directory() / "checked" / _digest(realized, machine)
    known = _recall(memory)
    if known and realized.python is None:  # what a function in Python computes is not known from its record
        return known
    seed = secrets.randbits(32) if seed is None else seed
    operator = operator_of(realized.problem)
    points = list(sizes(operator, realized.kernel.sizes))
    with tempfile.TemporaryDirectory(prefix="relax_llm_check_") as name:
        directory = Path(name)
        arguments = tuple(Argument(o.name, o.dtype, o.role) for o in realized.operands)
        library = None if realized.python else _build(realized, machine, directory)
        rng = np.random.default_rng(seed)
        launches = tuple(_prepared(directory, realized, operator, points, rng, seconds))
        request = Request(str(library), realized.symbol, arguments, launches)
        if library is None:
            outcome = _run_here(directory, request, realized)
            fault = outcome.fault
        else:
            outcome = _run(directory, request)
            fault = _explained(outcome, directory, request)
    if fault:
        at = f"at {outcome.launch.where} " if outcome.launch else ""
        raise KernelError(
            f"Kernel {realized.kernel.name!r} is refused for {realized.problem.name}: {at}{fault.rstrip('.')}. "
            f"(The inputs were random from seed {seed}.)"
        )
    status = status_of(operator, points)
    _remember(memory, status)
    return status


def _prepared(
    directory: Path,
    realized: Realized,
    operator: Operator,
    points: Sequence[dict[str, int]],
    rng: np.random.Generator,
    seconds: float,
) -> Iterator[Launch]:
    """Write the arrays of every launch, and what is right for them."""
    names = tuple(o.name for o in realized.operands if o.is_tensor)
    for data, side in (("reals", "after"), ("integers", "before")):
        exact = data == "integers" and operator.exact
        if operator.by_rows:
            most = max(point["M"] for point in points)
            _prepare(directory, data, "", realized, operator, {"M": most}, rng, exact)
            for point in points:
                rows = (int(rng.integers(most - point["M"] + 1)), point["M"])
                yield Launch(point, "", rows, data, side, names, _limit(realized, point, seconds))
        else:
            for index, point in enumerate(points):
                _prepare(directory, data, str(index), realized, operator, point, rng, exact)
                yield Launch(point, str(index), (), data, side, names, _limit(realized, point, seconds))


def _prepare(
    directory: Path,
    data: str,
    group: str,
    realized: Realized,
    operator: Operator,
    point: dict[str, int],
    rng: np.random.Generator,
    exact: bool,
) -> None:
    every = all_sizes(operator, point)
    values = operator.inputs(realized.problem, every, rng, exact)
    for name, found in operator.expected(realized.problem, every, values, exact).items():
        np.save(directory / array_file(data, group, EXPECTED + name), found.right)
        np.save(directory / array_file(data, group, BOUND + name), found.bound)
    if realized.layout is not None:
        values["weight"] = _packed(realized, values["weight"])
    weights = {operand.name for operand in realized.operands if operand.role == "weight"}
    for name, array in values.items():
        np.save(directory / array_file(data, "" if name in weights else group, name), array)


def _packed(realized: Realized, weight: Array) -> Array:
    """The weight in the kernel's layout, which may be the user's own."""
    assert realized.layout is not None
    wanted = next(operand for operand in realized.operands if operand.name == "weight")
    try:
        packed = np.ascontiguousarray(realized.layout.pack(weight))
    except Exception as error:  # the function is the user's
        raise KernelError(
            f"Packing the weight of {realized.problem.name} as {realized.layout.name!r} failed: "
            f"{type(error).__name__}: {error}."
        ) from error
    if packed.shape != wanted.shape or packed.dtype.name != wanted.dtype:
        raise KernelError(
            f"The layout {realized.layout.name!r} packs the weight of {realized.problem.name} as {list(packed.shape)} "
            f"{packed.dtype.name}, but says that it is {list(wanted.shape)} {wanted.dtype}."
        )
    return packed


def _runs_here(machine: Machine, needed: frozenset[str]) -> bool:
    architecture = "x86_64" if machine.name in cpu.X86_LEVELS else machine.name
    here = cpu.features()  # empty where the operating system does not tell
    return architecture == cpu.architecture() and (not here or machine.features | needed <= here)


def _build(realized: Realized, machine: Machine, directory: Path) -> Path:
    """Compile the function, and link it with its objects, into a library of its own."""
    library = directory / "kernel.so"
    try:
        link(generate({realized.symbol: realized.func}, machine), library, realized.objects)
    except (RuntimeError, ValueError, TypeError) as error:
        raise KernelError(
            f"Kernel {realized.kernel.name!r} cannot be compiled for {realized.problem.name}: {error}"
        ) from error
    return library


def _limit(realized: Realized, point: dict[str, int], seconds: float) -> float:
    known = {"batch": 1, "seq": point.get("M", 1), "kv_len": 1, **point}
    return seconds + evaluate(realized.problem.flops, known) / _SLOWEST


def _run_here(directory: Path, request: Request, realized: Realized) -> _Outcome:
    """Run a request for a kernel in Python, in this process."""
    kernel, problem = realized.kernel, SimpleNamespace(**vars(realized.problem))
    trial_here = Trial(directory, request.arguments, lambda values: kernel.make(problem, *values))
    for launch in request.launches:
        with _alarm(launch.seconds):
            fault = trial_here.run(launch)
        if fault:
            return _Outcome(launch, fault["fault"])
    return _Outcome(None)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Turn the alarm of a launch that takes too long into an exception, where Python allows: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it did not finish within {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


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
    for name in (a.name for a in request.arguments if a.role != "size"):
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
        "sizes": kernel.sizes.to_json(),
        "operands": [str(operand) for operand in realized.operands],
        "layout": _layout_source(realized),
        "machine": [machine.name, sorted(machine.features), str(machine.target)],
        "tvm": tvm.__version__,
        "objects": [hashlib.sha256(content).hexdigest() for content in realized.objects],
        "checking": [
            hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
            for module in (sys.modules[__name__], chosen_points, trial, layout, *_record_modules())
        ],
    }
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _layout_source(realized: Realized) -> list[str]:
    """A layout by name, shape and what it makes of a small matrix: a user's function may change under its name."""
    if realized.layout is None:
        return []
    weight = next(operand for operand in realized.operands if operand.name == "weight")
    problem: Any = realized.problem
    sample = np.arange(problem.n * min(problem.k, 64), dtype=np.float32).reshape(problem.n, -1)
    stored = FORMATS[problem.weight_format].encode(sample)
    try:
        packed = np.ascontiguousarray(realized.layout.pack(stored)).tobytes()
    except Exception:  # it may insist on the whole matrix, which the check itself gives it
        packed = secrets.token_bytes(16)
    return [realized.layout.name, str(weight), hashlib.sha256(packed).hexdigest()]


def _record_modules() -> list[Any]:
    known = (operators.__name__, formats.__name__)
    return [module for name, module in sorted(sys.modules.items()) if name.startswith(known)]


def _recall(place: Path) -> str | None:
    try:
        status = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return status if status.startswith("checked at ") else None


def _remember(place: Path, status: str) -> None:
    """Keep a status, whole or not at all. A cache that cannot be written costs time, nothing else."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f"{place.name}.{os.getpid()}.{secrets.token_hex(4)}")
        fresh.write_text(status, encoding="utf-8")
        fresh.replace(place)
    except OSError:
        return
