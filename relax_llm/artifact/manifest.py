"""What an artifact says of itself: manifest.json, as data."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from typing import Any, get_args, get_origin, get_type_hints

from relax_llm.errors import ArtifactError
from relax_llm.plan.python_kernel import PythonKernel

FORMAT = 3


CONTENDERS = "contenders"
"""The function whose logits are exact where a greedy choice needs them; not every model has one."""


@dataclass(frozen=True)
class Argument:
    """One tensor or size that a launch takes.

    Attributes:
        role: "activation", "weight", "cache", "size" or "output".
        name: The weight's or cache's name; empty for activations.
        shape: Sizes as text, numbers or formulas in the symbolic sizes.
        dtype: NumPy's name of the element type.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, in the place it has in a function.

    Attributes:
        site: The place in the model: "layers.3.mlp.down_proj".
        kernel: The symbol in the library.
        arguments: What it is called with, outputs last.
    """

    site: str
    kernel: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Kernel:
    """One function of the library.

    Attributes:
        operator: What it does: "matmul", "attention", ..., or "fused" for what no kernel of its own serves.
        problem: The fields of the problem it solves.
        flops: Arithmetic of one launch, a formula in the symbolic sizes.
        bytes: Memory it must move at least, likewise.
    """

    operator: str
    problem: Mapping[str, Any]
    flops: str
    bytes: str


@dataclass(frozen=True)
class Served:
    """A kernel and sizes.

    Attributes:
        kernel: Its name, as the plan has it.
        sizes: First and last of each size, both included, as `Box.to_json` gives them: {"M": [1, 8]}; a last of None
            is without end, and a size that is not named may be anything.
    """

    kernel: str
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class Dispatcher:
    """A function of the library that runs one of several kernels, by sizes.

    Beside it the library has the function `SYMBOL__open` with the same parameters, which asks the packed function
    "relax_llm.choose" for the kernel's index in `kernels`, given the dispatcher's symbol and the sizes.

    Attributes:
        axes: Names of the sizes that it chooses by, in the order in which it tells them.
        kernels: All kernels it can run, in the order of their indices, with the sizes each is valid for.
        ranges: What it does when nobody asks otherwise; total.
        pinned: The kernel that serves every size where results must not depend on it; "" where none is valid for all.
    """

    axes: tuple[str, ...]
    kernels: tuple[Served, ...]
    ranges: tuple[Served, ...]
    pinned: str = ""


@dataclass(frozen=True)
class Cache:
    """One attention site's KV cache, whose shapes `relax_llm.artifact.kv_cache` has.

    Attributes:
        site: The place in the model.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        format: "f32", "bf16" or "q8".
    """

    site: str
    kv_heads: int
    head_dim: int
    format: str = "f32"


@dataclass(frozen=True)
class Weight:
    """One packed tensor of weights.safetensors, and what it was made from."""

    name: str
    recipe: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size in memory and in the file."""
        bits = {"bfloat16": 16}.get(self.dtype) or int("".join(filter(str.isdigit, self.dtype)))
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class File:
    """A file of the artifact: its size in bytes, and a digest (of samples, for large files)."""

    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact but its code and its weights.

    Attributes:
        versions: Of this package, apache-tvm and apache-tvm-ffi, at the time of compiling.
        target: Name of the machine compiled for.
        features: Instruction set extensions the code may use.
        architecture: Name of the model class.
        config: The checkpoint's config.json.
        generation_config: The checkpoint's generation_config.json.
        weight_format: How matrices are stored, where nothing else was asked for.
        weight_formats: What was asked for some sites, by their patterns.
        vocab_size: Width of the logits.
        hidden_size: Width of the hidden states.
        context_length: The longest sequence.
        caches: The KV caches, in the order of the functions' argument.
        weights: The weights, likewise.
        kernels: Every kernel by symbol.
        functions: The launches of each function, in program order.
        dispatchers: Those of the kernels that choose among several, by symbol.
        python_kernels: Those that are written in Python, and have to be given when the artifact is loaded.
        files: The other files of the directory.
        notes: What the user should know, one sentence each.
    """

    versions: Mapping[str, str]
    target: str
    features: tuple[str, ...]
    architecture: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    weight_format: str
    vocab_size: int
    hidden_size: int
    context_length: int
    caches: tuple[Cache, ...]
    weights: tuple[Weight, ...]
    kernels: Mapping[str, Kernel]
    functions: Mapping[str, tuple[Launch, ...]]
    weight_formats: Mapping[str, str] = field(default_factory=dict)
    dispatchers: Mapping[str, Dispatcher] = field(default_factory=dict)
    python_kernels: tuple[PythonKernel, ...] = ()
    files: Mapping[str, File] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def greedy_function(self, seq: int, *, whole: bool = False) -> str:
        """The function whose logits a greedy choice looks at, after so many tokens; `whole`: one that computes all."""
        if CONTENDERS in self.functions and not whole:
            return CONTENDERS
        return "decode" if seq == 1 else "prefill"

    @property
    def stored_as(self) -> str:
        """How matrices are stored, in words."""
        return ", ".join(
            [self.weight_format, *(f"{sites} {format}" for sites, format in self.weight_formats.items())]
        )

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str, origin: str) -> "Manifest":
        """Parse manifest.json.

        Args:
            text: Its contents.
            origin: Its path, for messages.

        Raises:
            ArtifactError: It is not JSON, of another format, or lacks a field or has one of another type.
        """
        try:
            data = json.loads(text)
            found = data.pop("format")
            if found != FORMAT:
                raise ArtifactError(
                    f"{origin}: the artifact has format {found!r}, but this version reads format {FORMAT}; "
                    "compile it again."
                )
            manifest: Manifest = _read(Manifest, data, "")
            return manifest
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"{origin}: this is not an artifact's manifest ({type(error).__name__}: {error}); compile it again."
            ) from error


@lru_cache
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as what a type says: dataclasses, tuples and mappings of them, and plain values."""
    if kind is Any:
        return value
    if is_dataclass(kind):
        hints = _fields(kind)  # type: ignore[arg-type]
        if not isinstance(value, dict) or value.keys() != hints.keys():
            found = sorted(value) if isinstance(value, dict) else repr(value)[:60]
            raise ValueError(f"{where or 'the whole'} must have the fields {sorted(hints)}, but has {found}")
        make: Any = kind
        return make(
            **{name: _read(hint, value[name], f"{where}.{name}".strip(".")) for name, hint in hints.items()}
        )
    origin = get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, but is {repr(value)[:60]}")
        return tuple([_read(get_args(kind)[0], item, where) for item in value])
    if origin is not None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, but is {repr(value)[:60]}")
        return {name: _read(get_args(kind)[1], item, f"{where}.{name}") for name, item in value.items()}
    if type(value) is not kind:
        raise ValueError(f"{where} must be of type {kind.__name__}, but is {repr(value)[:60]}")
    return value
