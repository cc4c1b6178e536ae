"""Layers with weights, under the names and shapes that Hugging Face gives them, and functions without."""

from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.core import wrap_nested


class Linear(nn.Module):
    """x @ weight.T + bias, the weight stored as [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        """Declare the weight, and the bias if there is one."""
        self.weight = nn.Parameter((outputs, inputs), "float32")
        self.bias = nn.Parameter((outputs,), "float32") if bias else None

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[batch, seq, inputs] -> [batch, seq, outputs]."""
        product = nn.op.matmul(x, nn.op.permute_dims(self.weight))
        return product if self.bias is None else product + self.bias


class Conv1D(nn.Module):
    """x @ weight + bias, the weight stored as [inputs, outputs]: GPT-2's linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Declare the weight and the bias."""
        self.weight = nn.Parameter((inputs, outputs), "float32")
        self.bias = nn.Parameter((outputs,), "float32")

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[batch, seq, inputs] -> [batch, seq, outputs]."""
        return nn.op.matmul(x, self.weight) + self.bias


class Embedding(nn.Module):
    """Rows of a table; `as_head` uses the same table as an output projection."""

    def __init__(self, rows: int, hidden: int) -> None:
        """Declare the table."""
        self.weight = nn.Parameter((rows, hidden), "float32")

    def forward(self, ids: nn.Tensor) -> nn.Tensor:
        """[batch, seq] int32 -> [batch, seq, hidden]."""
        return wrap_nested(relax.op.take(self.weight._expr, ids._expr, axis=0), "embedding")

    def as_head(self, x: nn.Tensor) -> nn.Tensor:
        """[batch, seq, hidden] -> [batch, seq, rows]."""
        return nn.op.matmul(x, nn.op.permute_dims(self.weight))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * weight."""

    def __init__(self, hidden: int, eps: float) -> None:
        """Declare the weight."""
        self.weight = nn.Parameter((hidden,), "float32")
        self.eps = eps

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[batch, seq, hidden] -> the same."""
        return nn.op.rms_norm(x, weight=self.weight, axes=[-1], epsilon=self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""

    def __init__(self, hidden: int, eps: float) -> None:
        """Declare weight and bias."""
        self.weight = nn.Parameter((hidden,), "float32")
        self.bias = nn.Parameter((hidden,), "float32")
        self.eps = eps

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        """[batch, seq, hidden] -> the same."""
        expr = relax.op.nn.layer_norm(x._expr, self.weight._expr, self.bias._expr, axes=-1, epsilon=self.eps)
        return wrap_nested(expr, "layer_norm")


_ACTIVATIONS = {
    "silu": relax.op.nn.silu,
    "gelu": relax.op.nn.gelu,
    "gelu_tanh": relax.op.nn.gelu_tanh,
    "relu": relax.op.nn.relu,
}


def activation(name: str, x: nn.Tensor) -> nn.Tensor:
    """Apply an activation function by its name in `relax_llm.layers.ACTIVATIONS`' values."""
    return wrap_nested(_ACTIVATIONS[name](x._expr), name)


def concat(parts: list[nn.Tensor]) -> nn.Tensor:
    """Join tensors along their last axis. Over linear layers of one input it costs nothing: they become one matmul."""
    return nn.op.concat(parts, dim=-1)
