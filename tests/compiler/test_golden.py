"""What each pass does, to be read: tests/compiler/golden has a function before and after it, for both families."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tvm import IRModule, relax, tirx

from relax_llm.compiler.passes.hide_internal import HideInternal
from relax_llm.compiler.passes.schedule_rest import ScheduleRest
from relax_llm.compiler.passes.select_elementwise import SelectElementwise
from relax_llm.compiler.planner import Planner
from relax_llm.kernels import builder as b
from relax_llm.kernels.inner import INTERNAL
from relax_llm.kernels.machine import machine
from relax_llm.kernels.problem import problem_of

from .modules import TARGET, after, before, called_of, functions_of, kernels_of, stages, text_of

if TYPE_CHECKING:
    from collections.abc import Callable

PASSES = ("HoistLastToken", "CombineProjections", "FuseMatmul", "Legalize", "SelectKernels", "LiftWeights")
families = pytest.mark.parametrize("model", ["llama", "gpt2"])


def _section(title: str, mod: IRModule) -> str:
    names = "".join(f"# {name}\n" for name in sorted(called_of(mod)))
    return f"# {title}\n\n{text_of(mod['prefill'])}\n# kernels:\n{names}"


@families
@pytest.mark.parametrize("name", PASSES)
def test_pass(golden: Callable[[str, str], None], name: str, model: str) -> None:
    text = f"{_section('before', before(model, name))}\n\n{_section('after', after(model, name))}"
    golden(f"{model}-{name}", text)


def _fused(make: Callable[[relax.Expr], relax.Expr]) -> IRModule:
    """A function of x [batch, seq, 96], after TVM's own lowering and fusion."""
    builder, batch, seq = relax.BlockBuilder(), tirx.Var("batch", "int64"), tirx.Var("seq", "int64")
    x = relax.Var("x", relax.TensorType([batch, seq, 96], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(make(x))
        builder.emit_func_output(result)
    mod, theirs = builder.get(), relax.transform
    for step in (theirs.LegalizeOps(), theirs.AnnotateTIROpPattern(), theirs.FuseOps(), theirs.FuseTIR()):
        mod = step(mod)
    return mod


def test_select_elementwise(golden: Callable[[str, str], None]) -> None:
    def gate(x: relax.Expr) -> relax.Expr:
        parts = relax.op.split(x, 2, axis=-1)
        return relax.op.multiply(relax.op.nn.silu(parts[0]), parts[1])

    mod = _fused(gate)
    made = SelectElementwise(Planner(machine(TARGET)))(mod)
    ((name, plain),) = kernels_of(mod).items()
    ((_, kernel),) = kernels_of(made).items()
    golden(
        "SelectElementwise",
        f"# before\n\n{text_of(mod['main'])}\n# {name}\n\n{text_of(plain)}\n\n"
        f"# after\n\n{text_of(made['main'])}\n# solves {problem_of(kernel)}\n",
    )


@families
def test_no_model_leaves_plain_loops_to_schedule(model: str) -> None:
    old, new = before(model, "ScheduleRest"), after(model, "ScheduleRest")
    assert all("tirx.is_scheduled" in func.attrs for func in kernels_of(old).values())
    for name, function in functions_of(old).items():
        assert text_of(function) == text_of(new[name])


def test_schedule_rest(golden: Callable[[str, str], None]) -> None:
    """What is no arithmetic on single elements: here halves of rows change places."""

    def turn(x: relax.Expr) -> relax.Expr:
        return relax.op.concat([relax.op.strided_slice(x, [2], [at], [at + 48]) for at in (48, 0)], axis=2)

    mod, on = _fused(turn), machine(TARGET)
    assert text_of(SelectElementwise(Planner(on))(mod)["main"]) == text_of(mod["main"])
    ((name, plain),) = kernels_of(mod).items()
    golden(
        "ScheduleRest", f"# before\n\n{text_of(plain)}\n\n# after\n\n{text_of(ScheduleRest(on)(mod)[name])}"
    )


def _double() -> None:
    rows = b.size("M")
    x, out = b.argument("x", (rows, 8)), b.argument("out", (rows, 8))
    b.store(out, b.load(x, 0, 0, lanes=8) * 2.0, 0, 0, lanes=8)


def test_hide_internal(golden: Callable[[str, str], None]) -> None:
    """What only a dispatcher calls loses its symbol; what the model calls keeps it."""
    called = b.prim_func("mine__double", _double).with_attr(INTERNAL, True)
    mod = IRModule({"mine__double": called, "dispatcher": b.prim_func("dispatcher", _double)})
    golden("HideInternal", f"# before\n\n{text_of(mod)}\n\n# after\n\n{text_of(HideInternal()(mod))}")


def digest(model: str) -> str:
    """A digest of a model's text after every pass."""
    texts = "".join(f"{name}\n{mod.script()}" for name, mod in stages(model))
    return hashlib.sha256(texts.encode()).hexdigest()


@pytest.mark.parametrize("seed", ["0", "4711"])
def test_the_result_is_the_same_in_every_process(seed: str) -> None:
    """Names and order follow from the model alone, whatever the order of sets and dictionaries of objects."""
    code = "from tests.compiler.test_golden import digest; print(digest('llama'), digest('gpt2'))"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest("llama"), digest("gpt2")]
