"""The last token is chosen as early as can be, and no earlier; `test_fusion` has the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.core import wrap_nested

from relax_llm.compiler.bindings import is_launch, lines
from relax_llm.compiler.export import export
from relax_llm.compiler.passes.hoist_last_token import HoistLastToken
from relax_llm.kernels.attention import Attention
from relax_llm.kernels.cache import Append
from relax_llm.kernels.lookup import LastToken
from relax_llm.kernels.machine import machine
from relax_llm.kernels.problem import problem_of
from relax_llm.layers import LayerNorm, Linear, RMSNorm, activation

from .modules import TARGET, after, before, functions_of, text_of
from .probes import HIDDEN, IDS, MACHINE, Probe, declare, decoder_of, execute_all, lower, random_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from tvm import IRModule

    from relax_llm.compiler.bindings import Line
    from relax_llm.kernels.problem import Problem


def _prefill(mod: IRModule) -> Line:
    return next(line for line in lines(mod) if line.name == "prefill")


def _launches(mod: IRModule) -> list[tuple[Problem | None, relax.Var, relax.Expr]]:
    """The problems that a prefill solves, what they give, and the call."""
    line = _prefill(mod)
    return [(problem_of(mod[expr.args[0]]), var, expr) for var, expr in line if is_launch(expr)]


def _tokens(value: Any) -> str:
    size = value.ty.shape[1]
    return str(getattr(size, "value", size))


@pytest.mark.parametrize("model", ["llama without biases", "relu gpt2"])
def test_layers_but_the_last_have_all_tokens(model: str) -> None:
    mod = after(model, "HoistLastToken")
    found = _launches(mod)
    attention = [expr for problem, _, expr in found if isinstance(problem, Attention)]
    assert [_tokens(expr.args[1][0]) for expr in attention] == ["seq", "1"]
    appended = [expr for problem, _, expr in found if isinstance(problem, Append)]
    assert [_tokens(expr.args[1][0]) for expr in appended] == ["seq", "seq"]
    of_last = [_tokens(var) for var, expr in _prefill(mod) if isinstance(var.ty, relax.TensorType)]
    assert "seq" not in of_last[of_last.index("1") + 1 :]
    chosen = [problem for problem, _, _ in found if isinstance(problem, LastToken)]
    assert len(chosen) == 2  # the queries, and what attention is added to


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_other_functions_stay(model: str) -> None:
    old, new = (functions_of(make(model, "HoistLastToken")) for make in (before, after))
    assert {name for name in old if text_of(old[name]) != text_of(new[name])} == {"prefill"}


def _hoisted(forward: Callable[[Any, nn.Tensor], nn.Tensor], **made: Callable[[], nn.Module]) -> list[str]:
    """The operators of a decoder's prefill, and how many tokens each gives."""
    decoder = decoder_of(Probe(declare(**made), forward, lambda _, x: x))
    mod = HoistLastToken(MACHINE)(export(decoder, MACHINE))
    found = []
    for var, expr in _prefill(mod):
        if isinstance(expr, relax.Call) and isinstance(var.ty, relax.TensorType) and len(var.ty.shape) == 3:
            problem = problem_of(mod[expr.args[0]]) if is_launch(expr) else None
            name = problem.operator if problem else expr.op.name.removeprefix("relax.")
            found.append(f"{name} {_tokens(var)}")
    weights = random_weights(decoder)
    of_all, of_last = execute_all(lower(decoder), weights, IDS, "hidden", "prefill")
    np.testing.assert_allclose(of_last, of_all[:, -1:], rtol=1e-5, atol=1e-5)
    return found


def _wrapped(expr: relax.Expr) -> nn.Tensor:
    tensor: nn.Tensor = wrap_nested(expr, "made")
    return tensor


def _linear() -> nn.Module:
    return Linear(HIDDEN, HIDDEN)


def test_over_what_computes_each_token_by_itself() -> None:
    def forward(m: Any, x: nn.Tensor) -> nn.Tensor:
        return m.norm(x + activation("silu", m.a(m.before(x))) * m.b(x))

    layers = {"a": _linear, "b": _linear}
    norms = {
        "before": lambda: LayerNorm(HIDDEN, 1e-5),
        "norm": lambda: RMSNorm(HIDDEN, 1e-5),
    }
    assert _hoisted(forward, **layers, **norms) == [
        *("take seq", "last_token 1", "nn.layer_norm 1", "matmul 1", "nn.silu 1", "matmul 1"),
        *("multiply 1", "add 1", "nn.rms_norm 1"),
    ]


def test_over_parts_of_a_row() -> None:
    def forward(m: Any, x: nn.Tensor) -> nn.Tensor:
        parts = relax.op.split(m.a(x)._expr, 2, axis=-1)
        first, second = parts[0], parts[1]
        return _wrapped(relax.op.concat([relax.op.tanh(first), second], axis=2))

    assert _hoisted(forward, a=_linear) == ["take seq", "last_token 1", "matmul 1", "tanh 1", "concat 1"]


def test_not_over_arithmetic_alone() -> None:
    def forward(m: Any, x: nn.Tensor) -> nn.Tensor:
        y = m.a(x)
        mixed = relax.op.nn.softmax(y._expr, axis=1)
        return m.b(_wrapped(relax.op.add(y._expr, relax.op.exp(mixed))))

    assert _hoisted(forward, a=_linear, b=_linear) == [
        *("take seq", "matmul seq", "nn.softmax seq", "exp seq", "add seq", "last_token 1", "matmul 1"),
    ]


def test_a_value_that_others_need_whole_is_computed_once() -> None:
    def forward(m: Any, x: nn.Tensor) -> nn.Tensor:
        y = m.a(x)
        return m.b(y) + m.b(_wrapped(relax.op.nn.softmax(y._expr, axis=1)))

    assert _hoisted(forward, a=_linear, b=_linear) == [
        *("take seq", "matmul seq", "last_token 1", "matmul 1", "nn.softmax seq"),
        *("last_token 1", "matmul 1", "add 1"),
    ]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: relax.op.nn.softmax(x, axis=1),
        lambda x: relax.op.concat([x, x], axis=1),
        lambda x: relax.op.matmul(relax.op.matmul(x, relax.op.permute_dims(x, [0, 2, 1])), x),
        lambda x: relax.op.flip(x, axis=1),
    ],
    ids=["softmax over tokens", "tokens twice", "products of tokens", "the other way round"],
)
def test_not_over_what_mixes_tokens(mix: Callable[[relax.Expr], relax.Expr]) -> None:
    found = _hoisted(lambda m, x: m.a(_wrapped(mix(m.a(x)._expr))), a=_linear)
    assert found[:2] == ["take seq", "matmul seq"]
    assert found[-2:] == ["last_token 1", "matmul 1"]


def test_what_is_alike_for_all_tokens_stays() -> None:
    def forward(m: Any, x: nn.Tensor) -> nn.Tensor:
        return _wrapped(relax.op.add(m.a(x)._expr, relax.op.sum(x._expr, axis=1, keepdims=True)))

    assert _hoisted(forward, a=_linear) == ["take seq", "last_token 1", "matmul 1", "sum 1", "add 1"]


def test_there_is_nothing_to_hoist_over() -> None:
    mod = export(decoder_of(Probe(lambda _: None, lambda _, x: x, lambda _, x: x)), machine(TARGET))
    hoisted = HoistLastToken(machine(TARGET))(mod)
    assert text_of(functions_of(hoisted)["prefill"]) == text_of(functions_of(mod)["prefill"])
