"""What is fused and what must not be; either way the result is what the model says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.core import wrap_nested

from relax_llm.kernels.matmul import Matmul
from relax_llm.layers import Conv1D, Decoder, Linear, Step, activation, concat

from .probes import (
    HIDDEN,
    IDS,
    ROWS,
    Probe,
    declare,
    decoder_of,
    execute,
    execute_all,
    kernels,
    lower,
    random_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Weights = dict[str, Array]

H, N = HIDDEN, 10


def _linear(outputs: int = N, *, bias: bool = False, inputs: int = H) -> Callable[[], nn.Module]:
    return lambda: Linear(inputs, outputs, bias=bias)


def _conv(outputs: int = N) -> Callable[[], nn.Module]:
    return lambda: Conv1D(H, outputs)


def _vector(size: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter((size,), "float32")


def _apply(w: Weights, name: str, x: Array) -> Array:
    """A linear layer in float64."""
    result: Array = x @ w[f"{name}.weight"].astype(np.float64).T
    return result + w[f"{name}.bias"] if f"{name}.bias" in w else result


def _conv_apply(w: Weights, name: str, x: Array) -> Array:
    result: Array = x @ w[f"{name}.weight"].astype(np.float64) + w[f"{name}.bias"]
    return result


def _silu(x: Array) -> Array:
    result: Array = x / (1.0 + np.exp(-x))
    return result


def _relu(x: Array) -> Array:
    result: Array = np.maximum(x, 0.0)
    return result


def silu(x: nn.Tensor) -> nn.Tensor:
    return activation("silu", x)


def relu(x: nn.Tensor) -> nn.Tensor:
    return activation("relu", x)


def _join(*parts: Array) -> Array:
    return np.concatenate(parts, axis=-1)


def _product(x: nn.Tensor, weight: Any) -> nn.Tensor:
    """x @ weight, the weight as an expression."""
    return wrap_nested(relax.op.matmul(x._expr, weight), "product")


def _transposed(weight: nn.Parameter, axes: list[int] | None = None) -> Any:
    return relax.op.permute_dims(weight._expr, axes)


PROBES: dict[str, Probe] = {
    "projections of one input": Probe(
        declare(a=_linear(), b=_linear(3), c=_linear(4)),
        lambda m, x: concat([m.a(x), m.b(x), m.c(x)]),
        lambda w, x: _join(_apply(w, "a", x), _apply(w, "b", x), _apply(w, "c", x)),
        ("n17_k12",),
    ),
    "projections with biases": Probe(
        declare(a=_linear(bias=True), b=_linear(3, bias=True)),
        lambda m, x: concat([m.a(x), m.b(x)]),
        lambda w, x: _join(_apply(w, "a", x), _apply(w, "b", x)),
        ("n13_k12_bias",),
    ),
    "a bias on one projection alone": Probe(
        declare(a=_linear(bias=True), b=_linear(3)),
        lambda m, x: concat([m.a(x), m.b(x)]),
        lambda w, x: _join(_apply(w, "a", x), _apply(w, "b", x)),
        ("n10_k12_bias", "n3_k12"),
    ),
    "a projection that is used elsewhere, too": Probe(
        declare(a=_linear(), b=_linear(3)),
        lambda m, x: (lambda a: concat([concat([a, m.b(x)]), a]))(m.a(x)),
        lambda w, x: _join(_apply(w, "a", x), _apply(w, "b", x), _apply(w, "a", x)),
        ("n10_k12", "n3_k12"),
    ),
    "projections of different inputs": Probe(
        declare(a=_linear(), b=_linear(3)),
        lambda m, x: concat([m.a(x), m.b(relu(x))]),
        lambda w, x: _join(_apply(w, "a", x), _apply(w, "b", _relu(x))),
        ("n10_k12", "n3_k12"),
    ),
    "one projection twice": Probe(
        declare(a=_linear()),
        lambda m, x: (lambda a: concat([a, a]))(m.a(x)),
        lambda w, x: _join(_apply(w, "a", x), _apply(w, "a", x)),
    ),
    "projections with something else between": Probe(
        declare(a=_linear(), b=_linear(3)),
        lambda m, x: concat([m.a(x), x, m.b(x)]),
        lambda w, x: _join(_apply(w, "a", x), x, _apply(w, "b", x)),
        ("n10_k12", "n3_k12"),
    ),
    "projections with residuals in place of biases": Probe(
        declare(a=_linear(H), b=_linear(H)),
        lambda m, x: concat([m.a(x) + x, m.b(x) + x]),
        lambda w, x: _join(_apply(w, "a", x) + x, _apply(w, "b", x) + x),
        ("n12_k12_residual", "n12_k12_residual"),
    ),
    "projections with a bias of one element": Probe(
        declare(a=_linear(), b=_linear(3), v=_vector(1)),
        lambda m, x: concat([m.a(x) + m.v, m.b(x) + m.v]),
        lambda w, x: _join(_apply(w, "a", x) + w["v"], _apply(w, "b", x) + w["v"]),
    ),
    "projections stored the other way round": Probe(
        declare(a=_conv(), b=_conv(3)),
        lambda m, x: concat([m.a(x), m.b(x)]),
        lambda w, x: _join(_conv_apply(w, "a", x), _conv_apply(w, "b", x)),
        ("n10_k12_bias", "n3_k12_bias"),
    ),
    "gate and up": Probe(
        declare(a=_linear(), b=_linear()),
        lambda m, x: silu(m.a(x)) * m.b(x),
        lambda w, x: _silu(_apply(w, "a", x)) * _apply(w, "b", x),
        ("n20_k12_silu_gated",),
    ),
    "gate and up with biases": Probe(
        declare(a=_linear(bias=True), b=_linear(bias=True)),
        lambda m, x: silu(m.a(x)) * m.b(x),
        lambda w, x: _silu(_apply(w, "a", x)) * _apply(w, "b", x),
        ("n20_k12_bias_silu_gated",),
    ),
    "up before gate": Probe(
        declare(a=_linear(), b=_linear()),
        lambda m, x: m.b(x) * silu(m.a(x)),
        lambda w, x: _silu(_apply(w, "a", x)) * _apply(w, "b", x),
    ),
    "a bias on the gate alone": Probe(
        declare(a=_linear(bias=True), b=_linear()),
        lambda m, x: silu(m.a(x)) * m.b(x),
        lambda w, x: _silu(_apply(w, "a", x)) * _apply(w, "b", x),
        ("n10_k12_bias_silu", "n10_k12"),
    ),
    "a bias on up alone": Probe(
        declare(a=_linear(), b=_linear(bias=True)),
        lambda m, x: silu(m.a(x)) * m.b(x),
        lambda w, x: _silu(_apply(w, "a", x)) * _apply(w, "b", x),
        ("n10_k12_silu", "n10_k12_bias"),
    ),
    "gate and up both activated": Probe(
        declare(a=_linear(), b=_linear()),
        lambda m, x: silu(m.a(x)) * relu(m.b(x)),
        lambda w, x: _silu(_apply(w, "a", x)) * _relu(_apply(w, "b", x)),
        ("n10_k12_silu", "n10_k12_relu"),
    ),
    "gate and up of different inputs": Probe(
        declare(a=_linear(), b=_linear()),
        lambda m, x: silu(m.a(x)) * m.b(relu(x)),
        lambda w, x: _silu(_apply(w, "a", x)) * _apply(w, "b", _relu(x)),
        ("n10_k12_silu", "n10_k12"),
    ),
    "up used elsewhere, too": Probe(
        declare(a=_linear(), b=_linear()),
        lambda m, x: (lambda up: silu(m.a(x)) * up + up)(m.b(x)),
        lambda w, x: (_silu(_apply(w, "a", x)) + 1.0) * _apply(w, "b", x),
    ),
    "up used elsewhere, too, and made after the gate": Probe(
        declare(a=_linear(), b=_linear()),
        lambda m, x: (lambda gate, up: gate * up + up)(silu(m.a(x)), m.b(x)),
        lambda w, x: (_silu(_apply(w, "a", x)) + 1.0) * _apply(w, "b", x),
        ("n10_k12_silu", "n10_k12"),
    ),
    "up without its bias used elsewhere, too": Probe(
        declare(a=_linear(bias=True), b=_linear(), v=_vector(N)),
        lambda m, x: (lambda gate, up: gate * (up + m.v) + up)(silu(m.a(x)), m.b(x)),
        lambda w, x: _silu(_apply(w, "a", x)) * (_apply(w, "b", x) + w["v"]) + _apply(w, "b", x),
        ("n10_k12_bias_silu", "n10_k12"),
    ),
    "the gate used elsewhere, too": Probe(
        declare(a=_linear(), b=_linear()),
        lambda m, x: (lambda gate: gate * m.b(x) + gate)(silu(m.a(x))),
        lambda w, x: _silu(_apply(w, "a", x)) * (_apply(w, "b", x) + 1.0),
    ),
    "up with a residual": Probe(
        declare(a=_linear(H), b=_linear(H)),
        lambda m, x: silu(m.a(x)) * (m.b(x) + x),
        lambda w, x: _silu(_apply(w, "a", x)) * (_apply(w, "b", x) + x),
        ("n12_k12_silu", "n12_k12_residual"),
    ),
    "up with a bias of one element": Probe(
        declare(a=_linear(bias=True), b=_linear(), v=_vector(1)),
        lambda m, x: silu(m.a(x)) * (m.b(x) + m.v),
        lambda w, x: _silu(_apply(w, "a", x)) * (_apply(w, "b", x) + w["v"]),
    ),
    "a gate times a vector": Probe(
        declare(a=_linear(), v=_vector(N)),
        lambda m, x: silu(m.a(x)) * m.v,
        lambda w, x: _silu(_apply(w, "a", x)) * w["v"],
        ("n10_k12_silu",),
    ),
    "a gate times itself": Probe(
        declare(a=_linear()),
        lambda m, x: (lambda gate: gate * gate)(silu(m.a(x))),
        lambda w, x: _silu(_apply(w, "a", x)) ** 2,
        ("n10_k12_silu",),
    ),
    "a gate times its own product": Probe(
        declare(a=_linear()),
        lambda m, x: (lambda product: silu(product) * product)(m.a(x)),
        lambda w, x: _silu(_apply(w, "a", x)) * _apply(w, "a", x),
        ("n10_k12",),
    ),
    "a gated product with a residual": Probe(
        declare(a=_linear(H), b=_linear(H)),
        lambda m, x: x + silu(m.a(x)) * m.b(x),
        lambda w, x: x + _silu(_apply(w, "a", x)) * _apply(w, "b", x),
        ("n24_k12_silu_gated_residual",),
    ),
    "a residual on either side": Probe(
        declare(a=_linear(H), b=_linear(H)),
        lambda m, x: (lambda y: m.b(y) + y)(x + m.a(x)),
        lambda w, x: (lambda y: _apply(w, "b", y) + y)(x + _apply(w, "a", x)),
        ("n12_k12_residual", "n12_k12_residual"),
    ),
    "a residual made later than the product": Probe(
        declare(a=_linear(H), b=_linear(H)),
        lambda m, x: (lambda product: product + m.b(relu(x)))(m.a(x)),
        lambda w, x: _apply(w, "a", x) + _apply(w, "b", _relu(x)),
    ),
    "a product added to itself": Probe(
        declare(a=_linear()),
        lambda m, x: (lambda product: product + product)(m.a(x)),
        lambda w, x: 2.0 * _apply(w, "a", x),
        ("n10_k12",),
    ),
    "an activation behind a residual": Probe(
        declare(a=_linear(H)),
        lambda m, x: silu(x + m.a(x)),
        lambda w, x: _silu(x + _apply(w, "a", x)),
        ("n12_k12_residual",),
    ),
    "two residuals": Probe(
        declare(a=_linear(H)),
        lambda m, x: m.a(x) + x + relu(x),
        lambda w, x: _apply(w, "a", x) + x + _relu(x),
        ("n12_k12_residual",),
    ),
    "two activations": Probe(
        declare(a=_linear()),
        lambda m, x: relu(silu(m.a(x))),
        lambda w, x: _relu(_silu(_apply(w, "a", x))),
        ("n10_k12_silu",),
    ),
    "two biases": Probe(
        declare(a=_linear(bias=True), v=_vector(N)),
        lambda m, x: m.a(x) + m.v,
        lambda w, x: _apply(w, "a", x) + w["v"],
        ("n10_k12_bias",),
    ),
    "a bias behind an activation": Probe(
        declare(a=_linear(), v=_vector(N)),
        lambda m, x: silu(m.a(x)) + m.v,
        lambda w, x: _silu(_apply(w, "a", x)) + w["v"],
        ("n10_k12_silu",),
    ),
    "a bias of one element": Probe(
        declare(a=_linear(), v=_vector(1)),
        lambda m, x: m.a(x) + m.v,
        lambda w, x: _apply(w, "a", x) + w["v"],
        ("n10_k12",),
    ),
    "one output": Probe(
        declare(a=_linear(1, bias=True)),
        lambda m, x: m.a(x),
        lambda w, x: _apply(w, "a", x),
        ("n1_k12_bias",),
    ),
    "one layer for two inputs": Probe(
        declare(a=_linear(H)),
        lambda m, x: m.a(relu(m.a(x))),
        lambda w, x: _apply(w, "a", _relu(_apply(w, "a", x))),
        ("n12_k12_relu", "n12_k12"),
    ),
    "a head tied to the embedding": Probe(
        declare(a=_linear(H)),
        lambda m, x: m.embed.as_head(m.a(x)),
        lambda w, x: _apply(w, "a", x) @ w["embed.weight"].astype(np.float64).T,
        ("n12_k12", "n19_k12"),
    ),
    "an embedding that is a gate, too": Probe(
        declare(b=_linear(ROWS)),
        lambda m, x: silu(m.embed.as_head(x)) * m.b(x),
        lambda w, x: _silu(x @ w["embed.weight"].astype(np.float64).T) * _apply(w, "b", x),
        ("n38_k12_silu_gated",),
    ),
    "a weight that is scaled": Probe(
        declare(a=_linear()),
        lambda m, x: _product(x, _transposed(m.a.weight * 2.0)),
        lambda w, x: 2.0 * _apply(w, "a", x),
    ),
    "a weight with a correction": Probe(
        declare(a=_linear(), down=_linear(2), up=_linear(N, inputs=2)),
        lambda m, x: _product(
            x,
            relax.op.permute_dims(
                relax.op.add(m.a.weight._expr, relax.op.matmul(m.up.weight._expr, m.down.weight._expr))
            ),
        ),
        lambda w, x: _apply(w, "a", x) + _apply(w, "up", _apply(w, "down", x)),
    ),
    "a weight transposed by its axes": Probe(
        declare(a=_linear()),
        lambda m, x: _product(x, _transposed(m.a.weight, [1, 0])),
        lambda w, x: _apply(w, "a", x),
    ),
    "a weight that is not transposed by its axes": Probe(
        declare(a=_linear(H)),
        lambda m, x: _product(x, _transposed(m.a.weight, [0, 1])),
        lambda w, x: x @ w["a.weight"].astype(np.float64),
    ),
    "a weight transposed twice": Probe(
        declare(a=_linear(H)),
        lambda m, x: _product(x, relax.op.permute_dims(_transposed(m.a.weight))),
        lambda w, x: x @ w["a.weight"].astype(np.float64),
    ),
    "a product of activations": Probe(
        declare(a=_linear(H)),
        lambda m, x: nn.op.matmul(nn.op.matmul(m.a(x), nn.op.permute_dims(x, [0, 2, 1])), x),
        lambda w, x: _apply(w, "a", x) @ x.transpose(0, 2, 1) @ x,
        ("n12_k12",),
    ),
    "what no kernel serves": Probe(
        declare(a=_linear()),
        lambda m, x: nn.op.tanh(m.a(x) * 0.1) * 30.0,
        lambda w, x: 30.0 * np.tanh(0.1 * _apply(w, "a", x)),
        ("n10_k12",),
    ),
    "a softmax": Probe(
        declare(a=_linear()),
        lambda m, x: nn.op.softmax(m.a(x), axis=-1),
        lambda w, x: (lambda e: e / e.sum(axis=-1, keepdims=True))(np.exp(_apply(w, "a", x))),
        ("n10_k12",),
    ),
    "many elements that no kernel serves": Probe(
        declare(a=_linear(100)),
        lambda m, x: nn.op.sum(nn.op.tanh(m.a(x)), axis=-1, keepdims=True) * m.a(x),
        lambda w, x: (lambda a: np.tanh(a).sum(axis=-1, keepdims=True) * a)(_apply(w, "a", x)),
    ),
}


@pytest.mark.parametrize("name", list(PROBES))
def test_probe(name: str) -> None:
    probe = PROBES[name]
    decoder = decoder_of(probe)
    mod = lower(decoder)
    if probe.matmuls is not None:
        found = [
            problem.name.removeprefix("matmul_") for problem in kernels(mod) if isinstance(problem, Matmul)
        ]
        assert sorted(found) == sorted(probe.matmuls)
    weights = random_weights(decoder)
    x = weights["embed.weight"].astype(np.float64)[IDS]
    reference = probe.reference(weights, x)
    of_all, of_last = execute_all(mod, weights, IDS, "hidden", "prefill")
    for ours, right in ((of_all, reference), (of_last, reference[:, -1:])):
        assert ours.shape == right.shape
        assert np.isfinite(ours).all()
        assert np.abs(ours - right).max() <= 1e-5 * max(1.0, np.abs(reference).max())


class _TableNamedWeight(Decoder):
    """An embedding table whose parameter has the name that passes give to what they join."""

    def __init__(self) -> None:
        self.vocab_size, self.context_length = ROWS, 64
        self.weight = nn.Parameter((ROWS, H), "float32")
        self.a, self.b = Linear(H, N), Linear(H, N)

    def hidden_states(self, token_ids: nn.Tensor, step: Step) -> nn.Tensor:
        x = wrap_nested(relax.op.take(self.weight._expr, token_ids._expr, axis=0), "embedding")
        return silu(self.a(x)) * self.b(x)

    def logits(self, hidden: nn.Tensor) -> nn.Tensor:
        return hidden


def test_names_do_not_collide() -> None:
    decoder = _TableNamedWeight()
    weights = random_weights(decoder)
    ours = execute(lower(decoder), weights, IDS)
    x = weights["weight"].astype(np.float64)[IDS]
    reference = _silu(_apply(weights, "a", x)) * _apply(weights, "b", x)
    np.testing.assert_allclose(ours, reference, atol=1e-5)
