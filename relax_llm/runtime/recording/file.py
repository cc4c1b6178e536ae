"""The file of a recording: safetensors, whose metadata say which tensors were the arguments of which launch."""

import json
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.memory import ALIGNMENT, dtype_of
from relax_llm.errors import RecordingError

Array = npt.NDArray[Any]

LIMIT = 2**30
"""Bytes; the most that a recording holds where nothing else is said."""

FORMAT = "relax-llm recording 1"
_FORMAT, _RECORDING = "format", "recording"

_LONGEST = 10**8  # bytes of a header, as safetensors has it

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMES = {short: name for name, short in _DTYPES.items()}


@dataclass(frozen=True)
class Taken:
    """One argument of a recorded launch.

    Attributes:
        name: What the kernel calls it.
        role: "activation", "weight", "cache", "size" or "output".
        dtype: NumPy's name of the element type.
        shape: Its sizes.
        value: The number, for a size.
        before: The tensor that went in; "" for outputs, and for weights that are not in the file.
        after: The tensor that was there afterwards; "" where it is what went in.
        weight: A weight's name in the artifact.
        digest: Of a weight's bytes.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...] = ()
    value: int = 0
    before: str = ""
    after: str = ""
    weight: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Made:
    """One recorded launch.

    Attributes:
        call: Number of the call since the recording began, from 0.
        function: What was called.
        index: The launch's place in it.
        site: Where in the model.
        operator: What is computed.
        kernel: What computed it, by its name in the plan.
        symbol: What the model calls there.
        done: "run", or "replaced" by what was not this kernel.
        sizes: The launch's sizes.
        arguments: What it was called with, outputs last.
    """

    call: int
    function: str
    index: int
    site: str
    operator: str
    kernel: str
    symbol: str
    done: str
    sizes: Mapping[str, int]
    arguments: tuple[Taken, ...]


@dataclass(frozen=True)
class Origin:
    """What was recorded.

    Attributes:
        artifact: Path of the artifact.
        manifest: Digest of its manifest.
        target: What it was compiled for.
        versions: Of the packages that it was compiled with.
    """

    artifact: str
    manifest: str
    target: str
    versions: Mapping[str, str]


class Writer:
    """A recording under way: tensors go to a temporary file beside the place of the recording."""

    def __init__(self, path: Path, limit: int) -> None:
        """Begin.

        Args:
            path: Where the recording goes; a recording that is there is replaced.
            limit: The most bytes of tensors.

        Raises:
            RecordingError: Something else is there, or nothing can be written there.
        """
        self.path = path
        self.limit = limit
        self.nbytes = 0
        self._tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        if path.is_dir() or (path.exists() and not _is_recording(path)):
            raise RecordingError(f"{path} is there and is no recording; choose another name.")
        with self._writing():
            self._file: Any = tempfile.TemporaryFile(dir=path.parent, prefix=f".{path.name}.")  # noqa: SIM115 - closed by `close`

    def put(self, name: str, array: Array) -> str:
        """Write a tensor, once for a name.

        Returns:
            The name.

        Raises:
            RecordingError: It would exceed the limit, or the disk is full.
        """
        if name in self._tensors:
            return name
        if self.nbytes + array.nbytes > self.limit:
            raise RecordingError(
                f"The recording {self.path} would exceed its limit of {self.limit:,} bytes; record fewer "
                "launches, or raise the limit."
            )
        with self._writing():
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._tensors[name] = str(array.dtype), array.shape, self.nbytes, self.nbytes + array.nbytes
        self.nbytes += array.nbytes
        return name

    def finish(self, origin: Origin, launches: Sequence[Made]) -> None:
        """Write the file.

        Raises:
            RecordingError: The disk is full.
        """
        said = json.dumps({"origin": asdict(origin), "launches": [asdict(launch) for launch in launches]})
        header: dict[str, Any] = {"__metadata__": {_FORMAT: FORMAT, _RECORDING: said}}
        for name, (dtype, shape, begin, end) in self._tensors.items():
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with self._writing(), temporary.open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                self._file.seek(0)
                shutil.copyfileobj(self._file, file, 2**20)
            with self._writing():
                temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        """Give back what was written, without a recording."""
        with suppress(OSError):  # of what was still to be written, on a full disk
            self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecordingError(
                f"The recording {self.path} cannot be written: {error.strerror or error}."
            ) from error


@dataclass(frozen=True)
class Contents:
    """What a recording holds.

    Attributes:
        origin: What was recorded.
        launches: The launches, in order.
        tensors: The tensors by name, mapped into memory; what is written to them stays in this process.
    """

    origin: Origin
    launches: tuple[Made, ...]
    tensors: Mapping[str, Array]


def read(path: Path) -> Contents:
    """Open a recording.

    Raises:
        RecordingError: It is none, is truncated, or contradicts itself.
    """
    try:
        header, base = _header(path)
        metadata = header.pop("__metadata__", {})
        if metadata.get(_FORMAT) != FORMAT:
            raise RecordingError(
                f"{path} is not a recording that this version reads; record one with `relax-llm record`."
            )
        ends = [entry["data_offsets"][1] for entry in header.values()]
        size, expected = path.stat().st_size, base + max(ends, default=0)
        if size < expected:
            raise RecordingError(
                f"{path} is truncated: it has {size:,} of {expected:,} bytes. Record it again, or copy it again."
            )
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {name: _tensor(mapped, base, entry) for name, entry in header.items()}
        said = json.loads(metadata[_RECORDING])
        launches = tuple(_made(launch, tensors) for launch in said["launches"])
        return Contents(Origin(**said["origin"]), launches, tensors)
    except OSError as error:
        raise RecordingError(f"The recording {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordingError(
            f"{path} is damaged ({type(error).__name__}: {error}); record it again."
        ) from error


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST
        if length >= min(_LONGEST, path.stat().st_size):
            raise RecordingError(f"{path} is not a recording, or is truncated within its first lines.")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise TypeError("the header is no object")
    return header, 8 + length


def _is_recording(path: Path) -> bool:
    try:
        return bool(_header(path)[0]["__metadata__"][_FORMAT].startswith("relax-llm recording"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecordingError):
        return False


def _tensor(mapped: mmap.mmap, base: int, entry: Mapping[str, Any]) -> Array:
    begin, end = entry["data_offsets"]
    kind = dtype_of(_NAMES[entry["dtype"]])
    count = int(np.prod(entry["shape"], dtype=np.int64))
    if begin < 0 or count < 0 or end - begin != count * kind.itemsize:
        raise ValueError("a tensor's size contradicts its shape")
    data = np.frombuffer(mapped, np.uint8, end - begin, base + begin)
    if data.ctypes.data % kind.alignment:
        data = data.copy()
    tensor: Array = data.view(kind).reshape(entry["shape"])
    return tensor


def _made(data: Mapping[str, Any], tensors: Mapping[str, Array]) -> Made:
    arguments = tuple(
        Taken(**{**argument, "shape": tuple(argument["shape"])}) for argument in data["arguments"]
    )
    for argument in arguments:
        for name in filter(None, (argument.before, argument.after)):
            if (tensors[name].shape, str(tensors[name].dtype)) != (argument.shape, argument.dtype):
                raise ValueError(f"the tensor {name} is not what the launch took")
    return Made(**{**data, "arguments": arguments})
