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

Array = npt.NDArray[Any]

REQUEST = "request.json"
OUT_OF_BOUNDS = "it wrote out of bounds"
_FILL = 0xFF  # Around the buffers: as float32 it is a NaN, which shows in a result that uses it.
_ALIGNMENT = 64  # Bytes; what TVM's generated code may assume of a tensor.
_UNWRITTEN = {
    "reals": np.uint32(0x7FC0DEAD).view(np.float32),  # A NaN: whatever is computed from it is wrong.
    "integers": np.float32(-1.2345e30),  # A number: it shows where NaN does not, in max(out, value).
}
_BEHIND = np.float32(-77.25)  # Small, so that a sum with it differs from it.


@dataclass(frozen=True)
class Launch:
    """One execution of the kernel.

    Attributes:
        rows: M.
        first: The row of the prepared x and residual that it begins with.
        data: Which prepared arrays it gets: "reals" or "integers".
        side: Where inaccessible memory is: directly "after" or directly "before" the guarded arguments.
        guarded: The arguments next to inaccessible memory; others have room on both sides.
        seconds: How long it may take.
    """

    rows: int
    first: int
    data: str
    side: str
    guarded: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        library: Path of the library.
        symbol: The function in it.
        arguments: Names of its tensors, in order, "out" last. Of each but "out" the directory has an array for
            each kind of data, `reals.x.npy`; and it has `reals.expected.npy` and `reals.bound.npy`, [rows, outputs].
        launches: What to run, in order; the first fault ends it.
    """

    library: str
    symbol: str
    arguments: tuple[str, ...]
    launches: tuple[Launch, ...]

    def write(self, directory: Path) -> None:
        """Put the request where the process reads it."""
        (directory / REQUEST).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(directory: Path) -> "Request":
        """The request that `write` wrote."""
        values = json.loads((directory / REQUEST).read_text(encoding="utf-8"))
        launches = tuple(
            Launch(**{**launch, "guarded": tuple(launch["guarded"])}) for launch in values.pop("launches")
        )
        return Request(**{**values, "arguments": tuple(values["arguments"]), "launches": launches})


class Guarded:
    """An array in memory of its own: an inaccessible page, room filled with `_FILL`, the array, room, and again a page.

    Attributes:
        array: The array, float32, 64-byte aligned.
    """

    def __init__(self, shape: Sequence[int], side: str | None) -> None:
        """Allocate.

        Args:
            shape: Of the array.
            side: "after": the array ends at the second inaccessible page, as near as alignment allows; "before": it
                begins at the first; None: a page of room on both sides.
        """
        page = mmap.PAGESIZE
        size = 4 * int(np.prod(shape))
        room = -(-size // page) * page + 2 * page
        memory = np.frombuffer(mmap.mmap(-1, room + 2 * page), np.uint8)
        _forbid(memory[:page])
        _forbid(memory[page + room :])
        usable = memory[page : page + room]
        usable[:] = _FILL
        start = {"after": room - -(-size // _ALIGNMENT) * _ALIGNMENT, "before": 0, None: page}[side]
        self._before, self._after = usable[:start], usable[start + size :]
        self.array: Array = usable[start : start + size].view(np.float32).reshape(shape)

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


class _Trial:
    """The prepared arrays, and the weight in guarded memory for as long as launches ask for the same."""

    def __init__(self, directory: Path, request: Request, function: Callable[..., Any], tensor: Any) -> None:
        self._directory = directory
        self._arguments = request.arguments
        self._function = function
        self._tensor = tensor
        self._kept: dict[str, tuple[tuple[str, str | None], Guarded]] = {}

    def _source(self, launch: Launch, name: str) -> Array:
        """The prepared array as this launch gets it, mapped from its file."""
        array: Array = np.load(self._directory / f"{launch.data}.{name}.npy", mmap_mode="r")
        if name in ("weight", "bias"):
            return array
        return array[launch.first : launch.first + launch.rows]

    def _place(self, launch: Launch, name: str) -> Guarded:
        side = launch.side if name in launch.guarded else None
        key = (launch.data, side)
        if name in self._kept and self._kept[name][0] == key:
            return self._kept[name][1]
        source = self._source(launch, "expected" if name == "out" else name)
        place = Guarded(source.shape, side)
        if name != "out":
            place.array[...] = source
        if name in ("weight", "bias"):
            self._kept[name] = (key, place)
        return place

    def run(self, launch: Launch) -> dict[str, Any] | None:
        """Launch once.

        Returns:
            What was wrong, as {"fault": sentence}, or None.
        """
        fault, out = self._call(launch, _UNWRITTEN[launch.data])
        if fault or out is None:
            return {"fault": fault}
        expected, bound = self._source(launch, "expected"), self._source(launch, "bound")
        with np.errstate(invalid="ignore"):
            error = np.abs(out - expected)
            wrong = ~(error <= bound)
        if not wrong.any():
            return None
        row, column = (int(at[0]) for at in np.nonzero(wrong))
        where = f"element [{row}, {column}]"
        wrongs = f"{int(wrong.sum())} of {wrong.size} elements are wrong"
        if launch.data == "reals" and not np.isnan(out[row, column]):
            return {
                "fault": f"{_mismatch(where, out, expected, bound, row, column)}; {wrongs}{_worst(error, bound)}."
            }
        # Either not written, or computed from what the output held before: another value there tells.
        fault, again = self._call(launch, _BEHIND)
        if fault or again is None:
            return {"fault": fault}
        if again[row, column] == _BEHIND:
            return {"fault": f"{where} of the output was never written; {wrongs}."}
        if _differs(out[row, column], again[row, column]):
            return {
                "fault": f"{where} depends on what was in the output before the launch: it is read before it is "
                f"written (a sum must begin at zero); {wrongs}."
            }
        if np.isnan(out[row, column]):
            return {"fault": f"{where} is NaN where {expected[row, column]:.9g} is right; {wrongs}."}
        return {
            "fault": f"{_mismatch(where, out, expected, bound, row, column)}; {wrongs}{_worst(error, bound)}."
        }

    def _call(self, launch: Launch, poison: np.float32) -> tuple[str | None, Array | None]:
        """Run the function on an output full of `poison`: (what was wrong with its conduct, the output)."""
        places = {name: self._place(launch, name) for name in self._arguments}
        places["out"].array[...] = poison
        tensors = [self._tensor(place.array) for place in places.values()]
        signal.setitimer(signal.ITIMER_REAL, launch.seconds)
        try:
            self._function(*tensors)
        except Exception as error:
            return f"the launch raised: {' '.join(str(error).split())[-400:]}", None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for name, place in places.items():
            overrun = place.overrun()
            if overrun:
                return f"{OUT_OF_BOUNDS}: {overrun} of {name!r}.", None
        for name, place in places.items():
            if name == "out":
                continue
            source = self._source(launch, name)
            changed = np.argwhere(place.array.view(np.uint32) != source.view(np.uint32))
            if changed.size:
                at = tuple(int(index) for index in changed[0])
                return (
                    f"it modified its input {name!r}: element {list(at)} was {source[at]:.9g} and is "
                    f"{place.array[at]:.9g}."
                ), None
        return None, places["out"].array


def _mismatch(where: str, out: Array, expected: Array, bound: Array, row: int, column: int) -> str:
    return (
        f"{where} is {out[row, column]:.9g} where {expected[row, column]:.9g} is right "
        f"(error {abs(out[row, column] - expected[row, column]):.3g}, bound {bound[row, column]:.3g})"
    )


def _worst(error: Array, bound: Array) -> str:
    finite = error[np.isfinite(error)]
    if not finite.size:
        return ""
    return f", the largest error is {finite.max():.3g} against a largest bound of {bound.max():.3g}"


def _differs(a: np.float32, b: np.float32) -> bool:
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
    trial = _Trial(directory, request, function, runtime.from_dlpack)
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
