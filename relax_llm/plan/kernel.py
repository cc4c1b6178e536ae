"""The one door: a kernel of yours, whatever it is written in, as a record that the compiler can choose."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from relax_llm.errors import KernelError
from relax_llm.plan.plan import parts_of

Form = Literal["primfunc", "schedule", "c"]

_EPILOGUES = ("bias", "activation", "gate", "residual")


class Declined(Exception):  # noqa: N818 - not an error: an answer
    """Raised by a kernel that does not want a problem; the message is the reason, shown to the user."""


@dataclass(frozen=True)
class Kernel:
    """One way to solve an operator's problems.

    Attributes:
        name: What plans and tables call it.
        operator: What it computes: "matmul".
        form: "primfunc": `make(problem)` gives a TIR PrimFunc; "schedule": `make(schedule, problem)` transforms an
            `s_tir.Schedule` on the problem's definition; "c": `make(problem)` gives C source.
        make: The function that was decorated.
        first: The fewest rows it is valid for.
        last: The most, or None.
        layout: How it wants the weight: "plain", [N, K] as in the checkpoint, or "tiled" as the built-in kernels.
        absorbs: Which epilogues it computes itself, of "bias", "activation", "gate", "residual"; others are added.
        sites: Patterns of the places it may serve.
        features: Instruction set extensions it needs, as /proc/cpuinfo spells them.
    """

    name: str
    operator: str
    form: Form
    make: Callable[..., Any]
    first: int = 1
    last: int | None = None
    layout: str = "plain"
    absorbs: frozenset[str] = frozenset()
    sites: tuple[str, ...] = ("*",)
    features: frozenset[str] = frozenset()

    def serves(self, site: str) -> bool:
        """Whether one of the site patterns matches the site, or a part of it where several were fused."""
        return any(fnmatchcase(name, pattern) for name in parts_of(site) for pattern in self.sites)


def kernel(
    operator: str,
    *,
    m: tuple[int, int | None] | int = (1, None),
    form: Form | None = None,
    layout: str = "plain",
    absorbs: tuple[str, ...] = (),
    sites: str | tuple[str, ...] = "*",
    features: tuple[str, ...] = (),
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a kernel of a function.

    ::

        @rl.kernel("matmul", m=(1, 8))
        def my_gemv(problem):            # problem.n outputs, problem.k inputs
            ...
            return prim_func             # (x [M, K], weight [N, K], out [M, N])

    Args:
        operator: "matmul".
        m: The rows it is valid for: (first, last), both included; last None for no end; or one number.
        form: What the function gives; a function with a parameter `schedule` is a schedule, else the result tells
            a PrimFunc from C source.
        layout: "plain" or "tiled".
        absorbs: Epilogues the kernel computes itself.
        sites: One or more patterns such as "layers.*.mlp.*".
        features: Instruction set extensions it needs.
        name: By default the function's.

    Raises:
        KernelError: An argument is not usable.
    """
    first, last = (m, m) if isinstance(m, int) else m
    if operator != "matmul":
        raise KernelError(f"Kernels for the operator {operator!r} cannot be registered; known: matmul.")
    if first < 1 or (last is not None and last < first):
        raise KernelError(
            f"m={m!r} is not a range: the first number must be at least 1 and not exceed the last."
        )
    if layout not in ("plain", "tiled"):
        raise KernelError(f'layout must be "plain" or "tiled", not {layout!r}.')
    unknown = sorted(set(absorbs) - set(_EPILOGUES))
    if unknown:
        raise KernelError(f"absorbs names {', '.join(unknown)}; known: {', '.join(_EPILOGUES)}.")

    def register(make: Callable[..., Any]) -> Kernel:
        takes_schedule = "schedule" in inspect.signature(make).parameters
        return Kernel(
            name or make.__name__,
            operator,
            form or ("schedule" if takes_schedule else "primfunc"),
            make,
            first,
            last,
            layout,
            frozenset(absorbs),
            (sites,) if isinstance(sites, str) else tuple(sites),
            frozenset(features),
        )

    return register
