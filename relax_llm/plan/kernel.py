"""The one door: a kernel of yours, whatever it is written in, as a record that the compiler can choose."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

import numpy.typing as npt

from relax_llm.errors import KernelError, PlanError
from relax_llm.plan.plan import parts_of
from relax_llm.plan.sizes import Bounds, Box

Form = Literal["primfunc", "schedule", "c", "python"]
Selection = Literal["dynamic", "pinned"]
Cost = Callable[[Any, Mapping[str, int]], float]

AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "matmul": ("M",),
        "norm": ("M",),
        "embedding": ("M",),
        "append": ("batch", "seq", "kv_len"),
        "attention": ("batch", "seq", "kv_len"),
        "last_token": ("batch", "seq"),
        "positions": ("seq", "kv_len"),
        "rope_table": ("seq", "kv_len"),
        "argmax": ("M",),
        "contenders": ("M",),
        "softmax": ("M",),
        "elementwise": ("batch", "seq"),
    }
)
"""The operators, and the sizes by which their kernels are chosen."""

_EPILOGUES = ("bias", "activation", "gate", "residual")
_FORMS = ("primfunc", "schedule", "c", "python")
_BUILT_IN_LAYOUTS = ("plain", "tiled")


class Declined(Exception):  # noqa: N818 - not an error: an answer
    """Raised by a kernel that does not want a problem; the message is the reason, shown to the user."""


@dataclass(frozen=True)
class Layout:
    """A weight layout of your own. The weight is packed once, when the artifact is made.

    Attributes:
        name: What plans and manifests call it; kernels that share a weight must name the same layout.
        shape: Gives the shape of the packed weight for N outputs over K inputs.
        pack: Makes it from the weight [N, K], as in the checkpoint.
        dtype: Of the packed weight.
    """

    name: str
    shape: Callable[[int, int], tuple[int, ...]]
    pack: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
    dtype: str = "float32"


@dataclass(frozen=True)
class Kernel:
    """One way to solve an operator's problems.

    Attributes:
        name: What plans and tables call it.
        operator: What it computes; a key of `AXES`.
        form: "primfunc": `make(problem)` gives a TIR PrimFunc; "schedule": `make(schedule, problem)` transforms an
            `s_tir.Schedule` on the problem's definition; "c": `make(problem)` gives C or C++ source, or the path of an
            object file; "python": `make(problem, *arrays)` computes on NumPy arrays.
        make: The function that was decorated.
        sizes: What it is valid for.
        layout: How it wants the weight: "plain", [N, K] as in the checkpoint, "tiled" as the built-in kernels, or a
            layout of its own.
        absorbs: What it computes itself, of "norm" before the product, and of "bias", "activation", "gate" and
            "residual" behind it; the rest is added.
        sites: Patterns of the places it may serve.
        features: Instruction set extensions it needs, as /proc/cpuinfo spells them.
        weights: Weight formats it reads; for attention and append, formats of the caches.
        cost: Seconds that a launch takes, for a problem and its sizes, as far as can be told without measuring.
        files: What the function reads beside its own file: sources, headers, object files.
        package: The installed package that it comes from; empty for one that was given.
    """

    name: str
    operator: str
    form: Form
    make: Callable[..., Any]
    sizes: Box = Box()  # noqa: RUF009 - frozen
    layout: str | Layout = "plain"
    absorbs: frozenset[str] = frozenset()
    sites: tuple[str, ...] = ("*",)
    features: frozenset[str] = frozenset()
    weights: frozenset[str] = frozenset({"f32"})
    cost: Cost | None = None
    files: tuple[str, ...] = ()
    package: str = ""

    @property
    def layout_name(self) -> str:
        """The name of its weight layout."""
        return self.layout.name if isinstance(self.layout, Layout) else self.layout

    def serves(self, site: str) -> bool:
        """Whether one of the site patterns matches the site, or a part of it where several were fused."""
        return any(fnmatchcase(name, pattern) for name in parts_of(site) for pattern in self.sites)


def kernel(
    operator: str,
    *,
    m: Bounds | int | None = None,
    seq: Bounds | int | None = None,
    kv_len: Bounds | int | None = None,
    batch: Bounds | int | None = None,
    form: Form | None = None,
    layout: str | Layout = "plain",
    absorbs: tuple[str, ...] = (),
    sites: str | tuple[str, ...] = "*",
    features: tuple[str, ...] = (),
    weights: tuple[str, ...] = ("f32",),
    cost: Cost | None = None,
    files: tuple[str, ...] = (),
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a kernel of a function.

    ::

        @rl.kernel("matmul", m=(1, 8))
        def my_gemv(problem):            # problem.n outputs, problem.k inputs
            ...
            return prim_func             # (x [M, K], weight [N, K], out [M, N])

        @rl.kernel("attention", seq=1, kv_len=(1, 512))
        def my_decode_attention(problem): ...

    Args:
        operator: "matmul", "attention", or another key of `AXES`.
        m: The rows it is valid for: (first, last), both included; last None for no end; or one number. For matmul,
            norm and embedding, where M = batch * seq.
        seq: The query tokens it is valid for, likewise; for attention and what belongs to it.
        kv_len: The tokens in the cache, those of this step included.
        batch: The sequences.
        form: What the function gives; by default a function with a parameter `schedule` is a schedule, and else the
            result tells a PrimFunc from C source. "python" must be said.
        layout: "plain", "tiled", or a `Layout`.
        absorbs: Epilogues the kernel computes itself.
        sites: One or more patterns such as "layers.*.mlp.*".
        features: Instruction set extensions it needs.
        weights: Weight formats it reads; for attention and append, formats of the caches: "f32", "bf16", "q8".
        cost: Gives the seconds of a launch for (problem, sizes). A kernel with a cost competes with the others;
            one without serves all its sizes.
        files: Paths of what the function reads: C files, headers, object files. A change of one compiles anew.
        name: By default the function's.

    Raises:
        KernelError: An argument is not usable.
    """
    axes = AXES.get(operator)
    if axes is None:
        raise KernelError(
            f"Kernels for the operator {operator!r} cannot be registered; known: {', '.join(AXES)}."
        )
    given = {
        axis: bounds
        for axis, bounds in (("batch", batch), ("M", m), ("seq", seq), ("kv_len", kv_len))
        if bounds is not None
    }
    for axis in given:
        if axis not in axes:
            raise KernelError(
                f"A kernel for {operator} is not chosen by {axis.lower()}, but by {', '.join(axes).lower()}."
            )
    try:
        sized = Box.of(**given).within(axes)
    except (PlanError, TypeError, ValueError) as error:
        raise KernelError(f"{given!r} are no ranges of sizes: {error}") from error
    if not isinstance(layout, Layout) and layout not in _BUILT_IN_LAYOUTS:
        raise KernelError(f'layout must be "plain", "tiled" or a relax_llm.Layout, not {layout!r}.')
    if operator != "matmul" and (layout != "plain" or absorbs):
        raise KernelError(f"layout and absorbs are for matmul kernels; {operator} has neither.")
    unknown = sorted(set(absorbs) - set(_EPILOGUES))
    if unknown:
        raise KernelError(f"absorbs names {', '.join(unknown)}; known: {', '.join(_EPILOGUES)}.")
    if form is not None and form not in _FORMS:
        raise KernelError(f"form must be one of {', '.join(_FORMS)}, not {form!r}.")

    def register(make: Callable[..., Any]) -> Kernel:
        takes_schedule = "schedule" in inspect.signature(make).parameters
        chosen = name or make.__name__
        if not chosen.isidentifier():
            raise KernelError(f"{chosen!r} cannot be a kernel's name; it must be a name as in Python or C.")
        return Kernel(
            chosen,
            operator,
            form or ("schedule" if takes_schedule else "primfunc"),
            make,
            sized,
            layout,
            frozenset(absorbs),
            (sites,) if isinstance(sites, str) else tuple(sites),
            frozenset(features),
            frozenset(weights),
            cost,
            tuple(map(str, files)),
        )

    return register
