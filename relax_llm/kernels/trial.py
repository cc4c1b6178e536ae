"""One library's function, run in guarded memory: the process that `checking` starts, and that a bad kernel may kill.

It loads NumPy and TVM's runtime, no compiler. `python -m relax_llm.kernels.trial DIRECTORY` reads `request.json` and
the arrays beside it, and writes a line of JSON before every launch: when the process dies, the last line says where.
"""

import ctypes
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm import ffi
from relax_llm.artifact.memory import dtype_of

Array = npt.NDArray[Any]

REQUEST = "request.json"
EXPECTED, BOUND = "expected.", "bound."
"""Before a result's name: what it should be, and how far from it it may be."""
OUT_OF_BOUNDS = "it wrote out of bounds"
_FILL = 0xFF  # Around the buffers: as float32 it is a NaN, which shows in a result that uses it.
_ALIGNMENT = 64  # Bytes; what TVM's generated code may assume of a tensor.
_UNWRITTEN = {
    "reals": np.uint32(0x7FC0DEAD),  # A NaN: whatever is computed from it is wrong.
    "integers": np.float32(-1.2345e30).view(
        np.uint32
    ),  # A number: it shows where NaN does not, in max(out, value).
}
_BEHIND = np.float32(-77.25).view(np.uint32)  # Small, so that a sum with it differs from it.


@dataclass(frozen=True)
class Argument:
    """One argument of the kernel, as `relax_llm.kernels.operators.Operand` describes it."""

    name: str
    dtype: str
    role: str


@dataclass(frozen=True)
class Launch:
    """One execution of the kernel.

    Attributes:
        sizes: The symbolic sizes; those that are arguments are passed.
        group: Which prepared arrays it gets, beside the weights, which all launches share.
        rows: Where a launch is a part of a larger one, the first of its rows and how many they are; else empty.
        data: Which kind of data it gets: "reals" or "integers".
        side: Where inaccessible memory is: directly "after" or directly "before" the guarded arguments.
        guarded: The arguments next to inaccessible memory; others have room on both sides.
        seconds: How long it may take.
    """

    sizes: dict[str, int]
    group: str
    rows: tuple[int, ...]
    data: str
    side: str
    guarded: tuple[str, ...]
    seconds: float

    @property
    def where(self) -> str:
        """Its sizes as text; a batch of one is not worth a word."""
        return ", ".join(
            f"{name}={size}" for name, size in self.sizes.items() if (name, size) != ("batch", 1)
        )


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        library: Path of the library.
        symbol: The function in it.
        arguments: What it takes, in order. For each tensor but outputs the directory has an array for each kind of data
            and group, as `array_file` names them; for each result it has what is expected, and the bound.
        launches: What to run, in order; the first fault ends it.
    """

    library: str
    symbol: str
    arguments: tuple[Argument, ...]
    launches: tuple[Launch, ...]

    def write(self, directory: Path) -> None:
        """Put the request where the process reads it."""
        (directory / REQUEST).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(directory: Path) -> "Request":
        """The request that `write` wrote."""
        values = json.loads((directory / REQUEST).read_text(encoding="utf-8"))
        launches = tuple(
            Launch(**{**launch, "guarded": tuple(launch["guarded"]), "rows": tuple(launch["rows"])})
            for launch in values.pop("launches")
        )
        arguments = tuple(Argument(**argument) for argument in values.pop("arguments"))
        return Request(**values, arguments=arguments, launches=launches)


def array_file(data: str, group: str, name: str) -> str:
    """The file of a prepared array."""
    return f"{data}.{group}.{name}.npy"


class Guarded:
    """An array in memory of its own: an inaccessible page, room filled with `_FILL`, the array, room, and again a page.

    Attributes:
        array: The array, 64-byte aligned.
    """

    def __init__(self, shape: Sequence[int], dtype: str, side: str | None) -> None:
        """Allocate.

        Args:
            shape: Of the array.
            dtype: Of its elements.
            side: "after": the array ends at the second inaccessible page, as near as alignment allows; "before": it
                begins at the first; None: a page of room on both sides.
        """
        page = mmap.PAGESIZE
        kind = dtype_of(dtype)
        size = kind.itemsize * int(np.prod(shape))
        room = -(-size // page) * page + 2 * page
        memory = np.frombuffer(mmap.mmap(-1, room + 2 * page), np.uint8)
        _forbid(memory[:page])
        _forbid(memory[page + room :])
        usable = memory[page : page + room]
        usable[:] = _FILL
        start = {"after": room - -(-size // _ALIGNMENT) * _ALIGNMENT, "before": 0, None: page}[side]
        self._before, self._after = usable[:start], usable[start + size :]
        self.array: Array = usable[start : start + size].view(kind).reshape(shape)

    def poison(self, bits: np.uint32) -> None:
        """Fill the array with the same four bytes."""
        flat = self.array.reshape(-1).view(np.uint8)
        flat[...] = np.resize(np.frombuffer(bits.tobytes(), np.uint8), flat.size)

    def overrun(self) -> str | None:
        """Where the room around the array was written to, if it was."""
        for room, place in ((self._after, "after the end"), (self._before, "before the start")):
            touched = np.flatnonzero(room != _FILL)
            if touched.size:
                near = int(touched[0] if room is self._after else room.size - 1 - touched[-1])
                return f"{near} bytes {place}" if near else f"directly {place}"
        return None


def _forbid(page: Array) -> None:
    """Make a page inaccessible: to read or write it is SIGSEGV."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page.ctypes.data), ctypes.c_size_t(page.size), 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")


Function = Callable[[Sequence[Any]], None]
"""Runs the kernel on its arguments: arrays and numbers."""


class Trial:
    """The prepared arrays, and the weights in guarded memory for as long as launches ask for the same."""

    def __init__(self, directory: Path, arguments: Sequence[Argument], function: Function) -> None:
        """Prepare to launch a function on what lies in a directory."""
        self._directory = directory
        self._arguments = arguments
        self._tensors = {argument.name: argument for argument in arguments if argument.role != "size"}
        self._function = function
        self._kept: dict[str, tuple[tuple[str, str | None], Guarded]] = {}

    def _source(self, launch: Launch, name: str, kind: str = "") -> Array:
        """The prepared array as this launch gets it, mapped from its file."""
        weight = self._tensors[name].role == "weight"
        file = self._directory / array_file(launch.data, "" if weight else launch.group, kind + name)
        array: Array = np.load(file, mmap_mode="r").view(
            dtype_of(self._tensors[name].dtype) if not kind else None
        )
        if weight or not launch.rows:
            return array
        first, count = launch.rows
        return array[first : first + count]

    def _place(self, launch: Launch, name: str) -> Guarded:
        argument = self._tensors[name]
        side = launch.side if name in launch.guarded else None
        key = (launch.data, side)
        if name in self._kept and self._kept[name][0] == key:
            return self._kept[name][1]
        source = self._source(launch, name, EXPECTED if argument.role == "output" else "")
        place = Guarded(source.shape, argument.dtype, side)
        if argument.role != "output":
            place.array[...] = source
        if argument.role == "weight":
            self._kept[name] = (key, place)
        return place

    def run(self, launch: Launch) -> dict[str, Any] | None:
        """Launch once.

        Returns:
            What was wrong, as {"fault": sentence}, or None.
        """
        fault, results = self._call(launch, _UNWRITTEN[launch.data])
        if fault:
            return {"fault": fault}
        for name, out in results.items():
            fault = self._judged(launch, name, out)
            if fault:
                return {"fault": fault}
        return None

    def _judged(self, launch: Launch, name: str, out: Array) -> str | None:
        """What is wrong with one result, if something is."""
        expected, bound = self._source(launch, name, EXPECTED), self._source(launch, name, BOUND)
        with np.errstate(invalid="ignore"):
            error = np.abs(out.astype(np.float64) - expected)
            wrong = ~(error <= bound) & ~(np.isnan(out) & np.isnan(expected))
        if not wrong.any():
            return None
        at = tuple(int(index[0]) for index in np.nonzero(wrong))
        of = "" if name == "out" else f" of {name!r}"
        where = f"element {list(at)}{of}"
        wrongs = f"{int(wrong.sum())} of {wrong.size} elements are wrong"
        told = f"{_mismatch(where, out, expected, bound, at)}; {wrongs}{_worst(error, bound)}."
        if self._tensors[name].role == "updated" or (launch.data == "reals" and not np.isnan(out[at])):
            return told
        # Either not written, or computed from what the output held before: another value there tells.
        fault, again = self._call(launch, _BEHIND)
        if fault:
            return fault
        behind = np.broadcast_to(_BEHIND, (2,)).copy().view(out.dtype)[0]
        if again[name][at] == behind:
            return f"{where} of the output was never written; {wrongs}."
        if _differs(out[at], again[name][at]):
            return (
                f"{where} depends on what was in the output before the launch: it is read before it is "
                f"written (a sum must begin at zero); {wrongs}."
            )
        if np.isnan(out[at]):
            return f"{where} is NaN where {expected[at]:.9g} is right; {wrongs}."
        return told

    def _call(self, launch: Launch, poison: np.uint32) -> tuple[str | None, dict[str, Array]]:
        """Run the function on outputs full of `poison`: (what was wrong with its conduct, the results)."""
        places = {name: self._place(launch, name) for name in self._tensors}
        for name, place in places.items():
            if self._tensors[name].role == "output":
                place.poison(poison)
        values = [
            places[argument.name].array if argument.name in places else launch.sizes[argument.name]
            for argument in self._arguments
        ]
        signal.setitimer(signal.ITIMER_REAL, launch.seconds)
        try:
            self._function(values)
        except Exception as error:
            return f"the launch raised: {' '.join(str(error).split())[-400:]}", {}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for name, place in places.items():
            overrun = place.overrun()
            if overrun:
                return f"{OUT_OF_BOUNDS}: {overrun} of {name!r}.", {}
        for name, place in places.items():
            if self._tensors[name].role in ("output", "updated"):
                continue
            source = self._source(launch, name)
            whole = np.uint8 if source.dtype.itemsize == 1 else f"u{source.dtype.itemsize}"
            changed = np.argwhere(place.array.view(whole) != source.view(whole))
            if changed.size:
                at = tuple(int(index) for index in changed[0])
                return (
                    f"it modified its input {name!r}: element {list(at)} was {source[at]:.9g} and is "
                    f"{place.array[at]:.9g}."
                ), {}
        return None, {
            name: place.array
            for name, place in places.items()
            if self._tensors[name].role in ("output", "updated")
        }


def _mismatch(where: str, out: Array, expected: Array, bound: Array, at: tuple[int, ...]) -> str:
    return (
        f"{where} is {out[at]:.9g} where {expected[at]:.9g} is right "
        f"(error {abs(out[at] - expected[at]):.3g}, bound {bound[at]:.3g})"
    )


def _worst(error: Array, bound: Array) -> str:
    finite = error[np.isfinite(error)]
    if not finite.size:
        return ""
    return f", the largest error is {finite.max():.3g} against a largest bound of {bound.max():.3g}"


def _differs(a: Any, b: Any) -> bool:
    return not (a == b or (np.isnan(a) and np.isnan(b)))


def main(directory: Path) -> None:
    """Run the request in a directory and report on standard output."""
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What a kernel prints must not mix with the report.
    _no_core_dump()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def tell(**values: Any) -> None:
        report.write(json.dumps(values) + "\n")
        report.flush()

    request = Request.read(directory)
    runtime = ffi.runtime()
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
        signal.signal(number, signal.SIG_DFL)  # TVM's runtime prints its own stack, which nobody asked for.
    try:
        ctypes.CDLL(request.library)  # Resolves every symbol now; TVM would leave it to the first call.
        function = runtime.load_module(request.library)[request.symbol]
    except (RuntimeError, OSError, AttributeError) as error:
        reason = str(error).replace(request.library, "library")
        tell(fault=f"its library cannot be loaded: {' '.join(reason.split())[-400:]}")
        os._exit(0)

    def call(values: Sequence[Any]) -> None:
        function(*[runtime.from_dlpack(v) if isinstance(v, np.ndarray) else v for v in values])

    trial = Trial(directory, request.arguments, call)
    for index, launch in enumerate(request.launches):
        tell(launch=index)
        fault = trial.run(launch)
        if fault:
            tell(**fault)
            os._exit(0)
    tell(done=True)
    os._exit(0)  # Every launch is judged; what a library does when it is unloaded is no kernel's business.


def _no_core_dump() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
