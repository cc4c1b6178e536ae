"""The kernels of an artifact, gathered from its manifest for people to read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relax_llm.artifact.manifest import Argument, Kernel, Launch, Manifest
from relax_llm.table import Table


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


class KernelList(tuple[KernelUse, ...]):
    """Kernels, those with the most sites first; `print` shows them as a table, and so does a notebook."""

    __slots__ = ()

    @property
    def table(self) -> Table:
        """One row for each: sites, problem, symbolic shapes, flops and bytes as formulas."""
        rows = [
            (
                use.name,
                str(len(use.sites)),
                f"{use.kernel.operator} {problem_text(use.kernel.problem)}",
                shapes_text(use.example),
                use.kernel.flops,
                use.kernel.bytes,
            )
            for use in self
        ]
        return Table(("kernel", "sites", "problem", "shapes", "flops", "bytes"), rows, frozenset({1}))

    def __str__(self) -> str:
        return str(self.table)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def kernel_uses(manifest: Manifest) -> KernelList:
    """Every kernel of an artifact that a function launches."""
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
    return KernelList(sorted(uses, key=lambda use: (-len(use.sites), use.kernel.operator, use.name)))


def shapes_text(launch: Launch) -> str:
    """What a launch takes and gives: `[batch, seq, 576], weight [18, 576, 32] -> [batch, seq, 576]`."""
    inputs = [_argument_text(argument) for argument in launch.arguments if argument.role != "output"]
    outputs = [_argument_text(argument) for argument in launch.arguments if argument.role == "output"]
    return f"{', '.join(inputs)} -> {', '.join(outputs)}" if outputs else ", ".join(inputs)


def problem_text(problem: Mapping[str, Any]) -> str:
    """The fields of a problem that say something: `n=576 k=1536 weight_format=q8 norm(hidden=1536 eps=1e-05)`."""
    parts = []
    for name, value in problem.items():
        if value is True:
            parts.append(name)
        elif isinstance(value, list | tuple) and len(value) > 4:
            parts.append(f"{name}=({len(value)} numbers)")
        elif isinstance(value, Mapping):  # another problem's
            parts.append(f"{name}({problem_text({key: value[key] for key in value if key != 'operator'})})")
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
