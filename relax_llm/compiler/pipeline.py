"""The pass pipeline, in order: from a traced architecture to what the virtual machine runs.

It is a list that anyone may change: `relax_llm.pipeline()` gives a new one, `relax_llm.compile` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, overload, runtime_checkable

from tvm import IRModule, relax
from tvm.ir import GlobalVar
from tvm.ir.transform import Pass as TVMPass

from relax_llm.compiler.passes.check_once import CheckOnce
from relax_llm.compiler.passes.combine_projections import CombineProjections
from relax_llm.compiler.passes.fuse_matmul import FuseMatmul
from relax_llm.compiler.passes.fuse_norm import FuseNorm
from relax_llm.compiler.passes.hide_internal import HideInternal
from relax_llm.compiler.passes.hoist_last_token import HoistLastToken
from relax_llm.compiler.passes.legalize import Legalize
from relax_llm.compiler.passes.lift_weights import LiftWeights
from relax_llm.compiler.passes.schedule_rest import ScheduleRest
from relax_llm.compiler.passes.screen_head import ScreenHead
from relax_llm.compiler.passes.select_elementwise import SelectElementwise
from relax_llm.compiler.passes.select_kernels import SelectKernels
from relax_llm.compiler.passes.share_values import ShareValues
from relax_llm.compiler.planner import Planner
from relax_llm.errors import CompileError

Pass: TypeAlias = Callable[[IRModule], IRModule]


@runtime_checkable
class Binding(Protocol):
    """A pass that is made when a compilation begins, because it depends on the machine or on the choice of kernels."""

    def bind(self, planner: Planner) -> Pass:
        """The pass for one compilation; `planner.machine` is what is compiled for."""
        ...


Entry: TypeAlias = Pass | Binding


@dataclass(frozen=True)
class Standard:
    """A pass of the standard pipeline.

    Attributes:
        kind: What makes it: its class, or TVM's function.
        takes: What it is made with: "machine", "planner" or nothing.
    """

    kind: Callable[..., Pass]
    takes: str = ""

    def bind(self, planner: Planner) -> Pass:
        """The pass for one compilation."""
        if not self.takes:
            return self.kind()
        return self.kind(planner.machine if self.takes == "machine" else planner)


@dataclass(frozen=True)
class Launches:
    """The border between the two parts of the pipeline: here the manifest's launches are read from the module.

    Before it, functions consist of operators and calls of kernels; after it, no launch may come, go or move.
    """

    def __call__(self, mod: IRModule) -> IRModule:
        """Change nothing."""
        return mod


class Pipeline(list[Entry]):
    """Passes in order. All that lists do works; where a method takes a pass, its name or class will do.

    A pass is a callable that takes an IRModule and gives one: a function, an object, one of TVM's passes. One with a
    method `bind(planner)` is asked for the pass when a compilation begins.
    """

    def insert_before(self, where: object, step: Entry) -> None:
        """Put a pass right before another.

        Raises:
            CompileError: `where` is not in the pipeline, or more than once.
        """
        self.insert(self.position(where), step)

    def insert_after(self, where: object, step: Entry) -> None:
        """Put a pass right after another.

        Raises:
            CompileError: `where` is not in the pipeline, or more than once.
        """
        self.insert(self.position(where) + 1, step)

    def remove(self, what: object) -> None:
        """Take a pass out.

        Raises:
            CompileError: It is not in the pipeline, or more than once.
        """
        del self[self.position(what)]

    def replace(self, what: object, step: Entry) -> None:
        """Put a pass in the place of another.

        Raises:
            CompileError: `what` is not in the pipeline, or more than once.
        """
        self[self.position(what)] = step

    def move_before(self, what: object, where: object) -> None:
        """Move a pass right before another.

        Raises:
            CompileError: One of them is not in the pipeline, or more than once.
        """
        self._move(what, where, 0)

    def move_after(self, what: object, where: object) -> None:
        """Move a pass right after another.

        Raises:
            CompileError: One of them is not in the pipeline, or more than once.
        """
        self._move(what, where, 1)

    def position(self, what: object) -> int:
        """Where a pass stands.

        Args:
            what: Its name, its class, the function that makes it, or the pass.

        Raises:
            CompileError: It is not in the pipeline, or more than once.
        """
        found = [index for index, step in enumerate(self) if _is(step, what)]
        if len(found) == 1:
            return found[0]
        asked = what if isinstance(what, str) else name_of(what)
        if found:
            places = " and ".join(map(str, found))
            raise CompileError(
                f"{asked} is in the pipeline {len(found)} times, at {places}: use these positions, as in a list."
            )
        known = ", ".join(map(name_of, self))
        raise CompileError(f"The pipeline has no pass {asked}; it has {known}.")

    def names(self) -> list[str]:
        """The names of the passes, in order."""
        return [name_of(step) for step in self]

    def parts(self) -> tuple[Pipeline, Pipeline]:
        """The passes up to the border `Launches`, and those after it.

        Raises:
            CompileError: There is not one border.
        """
        border = self.position(Launches)
        return self[:border], self[border + 1 :]

    def bind(self, planner: Planner) -> list[Step]:
        """The passes of one compilation.

        Raises:
            CompileError: Something in the pipeline is not a pass.
        """
        return [_bound(entry, planner) for entry in self if not isinstance(entry, Launches)]

    def copy(self) -> Pipeline:
        """A copy that can be changed on its own."""
        return Pipeline(self)

    @overload  # type: ignore[override]
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Pipeline: ...
    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Pipeline(found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        """One line for each pass."""
        lines = []
        for index, step in enumerate(self):
            whose = "" if isinstance(step, Standard) else "  (border)" if _is(step, Launches) else "  (yours)"
            lines.append(f"{index:3}  {name_of(step)}{whose}")
        return "\n".join(["Pipeline, after export:", *lines])

    def _move(self, what: object, where: object, after: int) -> None:
        source, target = self.position(what), self.position(where)
        if source != target:
            step = self.pop(source)
            self.insert(target - (source < target) + after, step)


def pipeline() -> Pipeline:
    """The standard pipeline, as a new list: change it and give it to `compile`.

    What comes in is what `relax_llm.compiler.export` traced: one Relax function for each way to call the model. Up to
    the border, operators become launches of scheduled kernels; after it, TVM lowers launches to instructions of the
    virtual machine.
    """
    theirs = relax.transform
    return Pipeline(
        [
            Standard(HoistLastToken, "machine"),  # behind the last cache, only the last token is computed
            Standard(CombineProjections),  # q, k, v: one matmul
            Standard(FuseMatmul),  # bias, activation, gate * up and residual into matmuls
            Standard(Legalize, "machine"),  # norms and lookups have kernels of their own
            Standard(FuseNorm, "planner"),  # norms into matmuls that pack their activations
            Standard(SelectKernels, "planner"),  # which kernel serves each matmul, over which layout
            Standard(ScreenHead, "planner"),  # of the head, a greedy choice reads what may be chosen
            Standard(LiftWeights),  # concatenation and packing of weights: done when the artifact is made
            Standard(theirs.LegalizeOps),  # what is left, TVM's way
            Standard(theirs.AnnotateTIROpPattern),
            Standard(theirs.FuseOps),
            Standard(theirs.FuseTIR),
            Standard(SelectElementwise, "planner"),  # arithmetic on single elements has a kernel, too
            Standard(ScheduleRest, "machine"),  # no plain loop stays
            Launches(),
            Standard(theirs.ToNonDataflow),
            Standard(theirs.RemovePurityChecking),
            Standard(theirs.CallTIRRewrite),
            Standard(theirs.StaticPlanBlockMemory),
            Standard(theirs.LowerAllocTensor),
            Standard(theirs.LowerRuntimeBuiltin),
            Standard(theirs.ComputePrimValue),
            Standard(theirs.VMShapeLower),
            Standard(CheckOnce),  # weights and caches were checked when they were loaded
            Standard(ShareValues),  # tensors at one place of memory are made once, and not in every layer
            Standard(theirs.AttachGlobalSymbol),
            Standard(HideInternal),  # kernels that only a dispatcher calls
        ]
    )


@dataclass(frozen=True)
class Step:
    """A pass that can be applied.

    Attributes:
        name: What messages and files call it.
        apply: The pass.
        standard: Whether it is one of the standard pipeline, whose results need no check.
    """

    name: str
    apply: Pass
    standard: bool


def run(
    mod: IRModule,
    steps: Iterable[Step],
    watch: Callable[[str, IRModule], None] | None = None,
    *,
    launches_stay: bool = False,
) -> IRModule:
    """Apply passes one after the other.

    Args:
        mod: What the first one gets.
        steps: From `Pipeline.bind`.
        watch: Told of every pass's name and result.
        launches_stay: Whether the passes stand after the border.

    Raises:
        CompileError: A pass fails, or gives what is not a well-formed module with the same functions.
    """
    for step in steps:
        given = {} if step.standard else _results(mod)
        launched = {} if step.standard or not launches_stay else _launched(mod)
        try:
            mod = step.apply(mod)
        except CompileError:
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "relax_llm":  # a sentence already
                raise
            raise CompileError(
                f"The pass {step.name} fails on what it was given: {type(error).__name__}: {error}"
            ) from error
        if not step.standard:
            _check(step.name, given, mod)
            if launches_stay and _launched(mod) != launched:
                raise CompileError(
                    f"The pass {step.name} changes which kernels are launched, or their order; put it before the "
                    "border Launches, where the manifest reads them."
                )
        if watch is not None:
            watch(step.name, mod)
    return mod


def name_of(step: object) -> str:
    """What a pass is called: the name of its class or function, or TVM's name for it."""
    if isinstance(step, Standard):
        return step.kind.__name__
    if isinstance(step, TVMPass):
        return str(step.info.name)
    named = getattr(step, "__name__", None) or getattr(getattr(step, "func", None), "__name__", None)
    return str(named or type(step).__name__)


def _is(step: object, what: object) -> bool:
    if isinstance(what, str):
        return name_of(step) == what
    if step is what or (isinstance(step, Standard) and (step == what or step.kind is what)):
        return True
    return isinstance(what, type) and isinstance(step, what)


def _bound(entry: object, planner: Planner) -> Step:
    name = name_of(entry)
    made = entry.bind(planner) if isinstance(entry, Binding) and not isinstance(entry, type) else entry
    if isinstance(made, type) or not callable(made):
        hint = f"; put an object of the class in: {name}(...)" if isinstance(made, type) else ""
        raise CompileError(f"{name} is in the pipeline but is not a pass from a module to a module{hint}.")
    return Step(name, made, isinstance(entry, Standard))


def _results(mod: IRModule) -> dict[str, str]:
    """What each Relax function gives back, as text; every pass of ours and TVM's keeps it."""
    return {
        var.name_hint: str(func.ret_ty)
        for var, func in mod.functions_items()
        if isinstance(func, relax.Function)
    }


def _launched(mod: IRModule) -> dict[str, list[str]]:
    """The functions that each Relax function calls, in order."""
    found: dict[str, list[str]] = {}
    for var, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        calls = found.setdefault(var.name_hint, [])
        for block in func.body.blocks:
            for binding in block.bindings:
                if isinstance(binding.value, relax.Call):
                    callees = (binding.value.op, *binding.value.args[:1])  # call_tir has it as an argument
                    calls += [callee.name_hint for callee in callees if isinstance(callee, GlobalVar)]
    return found


def _check(name: str, given: dict[str, str], mod: object) -> None:
    """Refuse what no later pass could make sense of, while it is known whose it is."""
    if not isinstance(mod, IRModule):
        raise CompileError(f"The pass {name} gives {type(mod).__name__}; it must give the IRModule.")
    try:
        relax.analysis.well_formed(mod)
    except Exception as error:
        raise CompileError(f"The pass {name} gives a module that is not well-formed: {error}") from error
    found = _results(mod)
    for function, result in given.items():
        if function not in found:
            raise CompileError(f"The pass {name} loses the function {function!r}.")
        if found[function] != result:
            raise CompileError(
                f"The pass {name} changes what {function!r} gives back from {result} to {found[function]}; the "
                "runtime reads the first."
            )


def as_pipeline(passes: Sequence[Entry] | None) -> Pipeline:
    """The standard pipeline, or the passes given."""
    return pipeline() if passes is None else Pipeline(passes)
