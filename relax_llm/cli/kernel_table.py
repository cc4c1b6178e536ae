"""The kernels and launches of an artifact, gathered from its manifest for people to read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from relax_llm.artifact import formulas
from relax_llm.artifact.manifest import Argument, Kernel, Launch, Manifest
from relax_llm.errors import InputError


@dataclass(frozen=True)
class KernelUse:
    """A kernel with where it is used.

    Attributes:
        name: Its symbol in the library.
        kernel: What it is.
        sites: The places in the model that launch it, in program order.
        launches: How often each function launches it.
        example: One launch, with as many sizes symbolic as any has.
    """

    name: str
    kernel: Kernel
    sites: tuple[str, ...]
    launches: Mapping[str, int]
    example: Launch


def kernel_uses(manifest: Manifest) -> list[KernelUse]:
    """Every kernel of an artifact, those with the most sites first."""
    found: dict[str, dict[str, list[Launch]]] = {name: {} for name in manifest.kernels}
    for function, launches in manifest.functions.items():
        for launch in launches:
            found.setdefault(launch.kernel, {}).setdefault(function, []).append(launch)
    uses = [
        KernelUse(
            name,
            manifest.kernels[name],
            tuple(dict.fromkeys(launch.site for launches in by_function.values() for launch in launches)),
            {function: len(launches) for function, launches in by_function.items()},
            max((launches[0] for launches in by_function.values()), key=_symbols),
        )
        for name, by_function in found.items()
        if by_function
    ]
    return sorted(uses, key=lambda use: (-len(use.sites), use.kernel.operator, use.name))


def symbols(manifest: Manifest) -> frozenset[str]:
    """The sizes that the costs of an artifact's kernels depend on."""
    costs = (cost for kernel in manifest.kernels.values() for cost in (kernel.flops, kernel.bytes))
    return frozenset().union(*map(formulas.names, costs))


def parse_sizes(text: str, known: Iterable[str]) -> dict[str, int]:
    """The sizes in a text such as "batch=1,seq=1,kv_len=100".

    Raises:
        InputError: A name is not one of `known`, comes twice, or its value is not a positive whole number.
    """
    names = sorted(known)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in names:
            raise InputError(f"--at: there is no size {name!r} here; the sizes are {', '.join(names)}.")
        if not (value.isascii() and value.isdecimal() and len(value) <= 12 and int(value) > 0):
            raise InputError(f"--at: {name} is {value!r}; it must be a whole number, 1 or above.")
        if name in sizes:
            raise InputError(f"--at names {name} twice.")
        sizes[name] = int(value)
    if sizes.get("seq", 1) > sizes.get("kv_len", sizes.get("seq", 1)):
        raise InputError("--at: kv_len counts the tokens of this call too, so it is at least seq.")
    return sizes


def shapes_text(launch: Launch) -> str:
    """What a launch takes and gives: `[batch, seq, 576], weight [18, 576, 32] -> [batch, seq, 576]`."""
    inputs = [_argument_text(argument) for argument in launch.arguments if argument.role != "output"]
    outputs = [_argument_text(argument) for argument in launch.arguments if argument.role == "output"]
    return f"{', '.join(inputs)} -> {', '.join(outputs)}" if outputs else ", ".join(inputs)


def problem_text(problem: Mapping[str, Any]) -> str:
    """The fields of a problem that say something: `n=576 k=1536 weight_format=f32 residual`."""
    parts = []
    for name, value in problem.items():
        if value is True:
            parts.append(name)
        elif isinstance(value, list | tuple) and len(value) > 4:
            parts.append(f"{name}=({len(value)} numbers)")
        elif value is not None and value is not False:
            parts.append(f"{name}={value}")
    return " ".join(parts)


def _argument_text(argument: Argument) -> str:
    if argument.role == "size":
        return argument.name
    kind = f"{argument.role} " if argument.role in ("weight", "cache") else ""
    return f"{kind}[{', '.join(argument.shape)}]"


def _symbols(launch: Launch) -> int:
    sizes = {size for argument in launch.arguments for size in argument.shape}
    return sum(not size.isdecimal() for size in sizes)
