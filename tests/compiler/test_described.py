"""What TVM's lowering and fusion leave, read as expressions; what is no arithmetic on single elements is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tvm import relax, tirx
from tvm.relax import op

from relax_llm.compiler.described import described

if TYPE_CHECKING:
    from collections.abc import Callable

    from tvm.tirx import PrimFunc

    Shape = tuple[int | str, ...]

ROWS: Shape = ("batch", "seq", 48)


def _c(value: float) -> relax.Expr:
    return relax.const(value, "float32")


def _gate(x: relax.Expr) -> relax.Expr:
    parts = op.split(x, 2, axis=-1)
    return op.multiply(op.nn.silu(parts[0]), parts[1])


def _deep(x: relax.Expr) -> relax.Expr:
    for _ in range(7):
        x = op.nn.silu(x)
    return x


CASES: dict[str, tuple[Callable[..., relax.Expr], list[Shape], str | None]] = {
    "silu": (op.nn.silu, [ROWS], "a * sigmoid(a)"),
    "gelu": (op.nn.gelu, [ROWS], "a * (0.5 + (erf(a * 0.70710677) * 0.5))"),
    "relu": (op.nn.relu, [ROWS], "maximum(a, 0.0)"),
    "a soft cap": (
        lambda x: op.multiply(op.tanh(op.divide(x, _c(30))), _c(30)),
        [ROWS],
        "tanh(a / 30.0) * 30.0",
    ),
    "roots": (lambda x: op.add(op.rsqrt(x), op.sqrt(op.abs(x))), [ROWS], "rsqrt(a) + sqrt(abs(a))"),
    "a choice": (
        lambda x, y: op.where(op.greater(x, _c(0)), x, op.exp(y)),
        [ROWS, ROWS],
        "where(0.0 < a, a, exp(b))",
    ),
    "two conditions": (
        lambda x, y: op.where(op.logical_and(op.less(x, y), op.not_equal(x, y)), x, y),
        [ROWS, (48,)],
        "where((a < b) and (a != b), a, b)",
    ),
    "limits": (lambda x: op.clip(x, -1, 1), [ROWS], "maximum(minimum(a, 1.0), -1.0)"),
    "a condition as a number": (
        lambda x: op.multiply(op.astype(op.greater_equal(x, _c(2)), "float32"), x),
        [ROWS],
        "float32(2.0 <= a) * a",
    ),
    "a gate of one matrix": (_gate, [("batch", "seq", 96)], "(a * sigmoid(a)) * a[48:]"),
    "a weight and one": (lambda x, w: op.multiply(x, op.add(w, _c(1))), [ROWS, (48,)], "b * (a + 1.0)"),
    "a number for each row": (op.multiply, [ROWS, ("batch", "seq", 1)], "a * b"),
    "heads": (op.multiply, [("batch", "seq", 3, 16), ("batch", "seq", 3, 1)], "a * b"),
    "one token": (op.add, [("batch", 1, 48), (1, 1, 48)], "a + b"),
    "rotated halves": (
        lambda x: op.concat(
            [op.strided_slice(x, [2], [24], [48]), op.strided_slice(x, [2], [0], [24])], axis=2
        ),
        [ROWS],
        None,
    ),
    "a sum": (lambda x: op.sum(x, axis=-1), [ROWS], None),
    "another order": (lambda x: op.add(op.permute_dims(x, [0, 2, 1]), _c(1)), [ROWS], None),
    "a triangle": (op.tril, [ROWS], None),
    "sizes of no step": (op.exp, [("batch", "tiles", 4)], None),
    "half precision": (lambda x: op.astype(x, "float16"), [ROWS], None),
    "a constant": (lambda x: op.zeros_like(x), [ROWS], None),
    "too much to write down": (_deep, [ROWS], None),
}


def _lowered(make: Callable[..., relax.Expr], shapes: list[Shape]) -> PrimFunc:
    builder = relax.BlockBuilder()
    sizes = {name: tirx.Var(name, "int64") for name in ("batch", "seq", "tiles")}
    given = [[sizes[size] if isinstance(size, str) else size for size in shape] for shape in shapes]
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(given)]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(make(*inputs))
        builder.emit_func_output(result)
    mod, theirs = builder.get(), relax.transform
    for step in (theirs.LegalizeOps(), theirs.AnnotateTIROpPattern(), theirs.FuseOps(), theirs.FuseTIR()):
        mod = step(mod)
    functions: list[Any] = [func for _, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)]
    (func,) = functions
    return func


@pytest.mark.parametrize("case", list(CASES))
def test_what_a_function_computes(case: str) -> None:
    make, shapes, expression = CASES[case]
    problem = described(_lowered(make, shapes))
    assert (None if problem is None else problem.expression) == expression


def test_decode_and_prefill_share_a_problem() -> None:
    """Also where an embedding of positions is the same for all sequences."""
    one = described(_lowered(op.add, [("batch", 1, 48), (1, 1, 48)]))
    some = described(_lowered(op.add, [ROWS, (1, "seq", 48)]))
    assert one == some
    assert one is not None
    assert one.inputs == (ROWS, (1, "seq", 48))
