"""Matrix product with its epilogue: out = residual + act(x @ weight.T + bias), or act(gate) * up.

x is [batch, seq, K]; a launch sees M = batch * seq rows. The weight is [N, K], of which a gated product uses the
first half as gate and the second as up.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from tvm import te, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.layout import Layout, Plain, Tiled
from relax_llm.kernels.machine import LANES, Machine
from relax_llm.kernels.problem import Problem, tag
from relax_llm.kernels.vectormath import ACTIVATIONS


@dataclass(frozen=True)
class Matmul(Problem):
    """A matrix product and what is fused behind it.

    Attributes:
        n: Rows of the weight matrix; gated products have n / 2 outputs.
        k: Reduction length.
        weight_format: How the matrix is stored.
        bias: Add a vector of n after the reduction.
        activation: Applied after the bias (to the gate only, when gated); a key of `ACTIVATIONS`.
        gated: Multiply the activated first half of the outputs by the second half.
        residual: Add a tensor of the output's shape at the end.
    """

    operator: ClassVar[str] = "matmul"
    n: int
    k: int
    weight_format: str = "f32"
    bias: bool = False
    activation: str | None = None
    gated: bool = False
    residual: bool = False

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.gated else self.n

    @property
    def flops(self) -> str:
        return f"{2 * self.n * self.k}*batch*seq"

    @property
    def bytes(self) -> str:
        weights = 4 * self.n * (self.k + self.bias)
        return f"{weights} + {4 * (self.k + self.outputs * (1 + self.residual))}*batch*seq"


def arguments(problem: Matmul) -> list[str]:
    """Names of the tensors a matmul kernel takes, in order, the output last."""
    optional = [name for name in ("bias", "residual") if getattr(problem, name)]
    return ["x", "weight", *optional, "out"]


def definition(problem: Matmul, *, flat: bool = False) -> PrimFunc:
    """The definition: plain loops over the weight as it is in the checkpoint, to be scheduled or replaced.

    Before and after the fusion that asks for it::

        h = R.add(r, R.matmul(x, R.permute_dims(w)))
        h = R.call_tir(loops_matmul_n576_k1536_residual, (x, w, r))

    Args:
        problem: What to compute.
        flat: Take x as [M, K], as kernels do, and not as [batch, seq, K].
    """
    names = ("M",) if flat else ("batch", "seq")
    outer = tuple(tirx.Var(name, "int64") for name in names)
    x = te.placeholder((*outer, problem.k), name="x")
    weight = te.placeholder((problem.n, problem.k), name="weight")
    k = te.reduce_axis((0, problem.k), name="k")
    product = te.compute(
        (*outer, problem.n),
        lambda *at: te.sum(x[_ending(at, k)] * weight[at[-1], k], axis=k),
        name="matmul",
    )
    inputs, out = [x, weight], product
    if problem.bias:
        bias = te.placeholder((problem.n,), name="bias")
        inputs.append(bias)
        out = te.compute(product.shape, lambda *at: product[at] + bias[at[-1]], name="biased")
    biased = out
    activate = _SCALAR[problem.activation] if problem.activation else None
    half = problem.outputs
    if problem.gated:
        out = te.compute(
            (*outer, half),
            lambda *at: (activate or _identity)(biased[at]) * biased[_ending(at, at[-1] + half)],
            name="gated",
        )
    elif activate:
        out = te.compute(product.shape, lambda *at: activate(biased[at]), name="activated")
    if problem.residual:
        residual = te.placeholder((*outer, half), name="residual")
        inputs.append(residual)
        summed = out
        out = te.compute(summed.shape, lambda *at: summed[at] + residual[at], name="summed")
    func = te.create_prim_func([*inputs, out])
    return tag(func.with_attr("global_symbol", f"loops_{problem.name}"), problem)


def reference(problem: Matmul, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """The result in float64.

    Args:
        problem: What to compute.
        inputs: "x" [M, K], "weight" [N, K] as in the checkpoint, and where the problem has them "bias" [N] and
            "residual" [M, outputs].

    Returns:
        [M, outputs].
    """
    values = {name: value.astype(np.float64) for name, value in inputs.items()}
    product = values["x"] @ values["weight"].T
    if problem.bias:
        product = product + values["bias"]
    gate = product[:, : problem.outputs]
    out: npt.NDArray[np.float64] = _FLOAT64[problem.activation](gate) if problem.activation else gate
    if problem.gated:
        out = out * product[:, problem.outputs :]
    return out + values["residual"] if problem.residual else out


def _ending(at: tuple[Expr, ...], last: Expr) -> tuple[Expr, ...]:
    """Indices with another one for the last axis."""
    return (*at[:-1], last)


def _identity(x: Expr) -> Expr:
    return x


def _gelu_tanh(x: Expr) -> Expr:
    return x * tirx.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


_SCALAR = {
    "silu": lambda x: x * tirx.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1.0 + tirx.erf(x * 0.7071067811865476)),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: tirx.max(x, tirx.const(0.0, "float32")),
}

_FLOAT64: dict[str, Callable[[Any], Any]] = {
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1.0 + np.vectorize(math.erf)(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0.0),
}


@dataclass(frozen=True)
class Tile:
    """The register tile of a micro-kernel: `rows` of x by `cols` outputs, all held in vector registers."""

    rows: int
    cols: int


def tile_for(machine: Machine) -> Tile:
    """The tile that fills this machine's registers."""
    cols = 32 if machine.accumulators >= 8 else 16
    return Tile(max(1, machine.accumulators * LANES // cols), cols)


def layout_for(problem: Matmul, machine: Machine) -> Tiled:
    """The weight layout of this machine's kernels."""
    return Tiled(tile_for(machine).cols, problem.gated)


def layout_named(name: str, problem: Matmul, machine: Machine) -> Layout:
    """The layout that a kernel's record names: "plain", or "tiled" for this machine's own."""
    return Plain() if name == "plain" else layout_for(problem, machine)


def tiled(problem: Matmul, machine: Machine, *, flat: bool = False) -> PrimFunc:
    """A register-tiled product over a packed weight, exact for every M.

    Each task owns one panel of the weight, which stays in its core's cache while the rows of x stream by. The rows
    are cut into tiles of equal height, give or take one, and every height has its own unrolled micro-kernel: no row
    is padded, and none is left to a slow tail.

    The weight argument has the shape of `layout_for(problem, machine)`; x is [batch, seq, K], or [M, K] where `flat`.
    """
    tile = tile_for(machine)
    layout = layout_for(problem, machine)
    panels = layout.panels(problem.n)
    outputs = problem.outputs
    per_panel = tile.cols // 2 if problem.gated else tile.cols

    def emit() -> None:
        outer = (b.size("M"),) if flat else (b.size("batch"), b.size("seq"))
        x_arg = b.argument("x", (*outer, problem.k))
        weight = b.argument("weight", layout.shape(problem.n, problem.k))
        bias = b.argument("bias", (problem.n,)) if problem.bias else None
        residual_arg = b.argument("residual", (*outer, outputs)) if problem.residual else None
        out_arg = b.argument("out", (*outer, outputs))
        m = math.prod(outer[1:], start=outer[0])
        x, out = b.view(x_arg, (m, problem.k)), b.view(out_arg, (m, outputs))
        residual = b.view(residual_arg, (m, outputs)) if problem.residual else None

        def micro_kernel(rows: int, first: Expr, panel: Expr, staged: list[Expr]) -> None:
            acc = b.Registers(rows, b.chunks(tile.cols))
            acc.clear()
            with T.serial(problem.k) as k:
                for row, index, column, _ in acc:
                    product = b.splat(x[first + row, k]) * b.load(weight, panel, k, column)
                    acc.set(row, index, acc.get(row, index) + product)
            for row, index, _, _ in acc:
                b.store(staged[index], acc.get(row, index), row, 0)

        def epilogue(staged: list[Expr], row: Expr, at: Expr, panel: Expr, offset: int, lanes: int) -> None:
            column = b.let("column", panel * per_panel + offset)

            def reduced(start: int, bias_start: Expr) -> Expr:
                value = b.load(staged[start // LANES], row, start % LANES, lanes=lanes)
                return value if bias is None else value + b.load(bias, bias_start, lanes=lanes)

            value = b.let("value", reduced(offset, column))
            if problem.activation:
                value = b.let("activated", ACTIVATIONS[problem.activation](value))
            if problem.gated:
                value = value * reduced(per_panel + offset, column + outputs)
            if residual is not None:
                value = value + b.load(residual, at, column, lanes=lanes)
            b.store(out, value, at, column, lanes=lanes)

        def write(width: int, staged: list[Expr], height: Expr, first: Expr, panel: Expr) -> None:
            with T.serial(height) as row:
                for offset, lanes in b.chunks(width, min(LANES, per_panel)):
                    epilogue(staged, row, first + row, panel, offset, lanes)

        def task(panel: Expr) -> None:
            staged = [b.local((tile.rows, LANES)) for _ in b.chunks(tile.cols)]
            tiles = b.let("tiles", (m + (tile.rows - 1)) // tile.rows)
            with T.serial(tiles) as i:
                first = b.let("first", m * i // tiles)
                height = b.let("height", m * (i + 1) // tiles - first)
                for rows in range(1, tile.rows + 1):
                    with b.when(height == rows):
                        micro_kernel(rows, first, panel, staged)
                rest = outputs % per_panel
                if rest:
                    b.either(
                        panel < outputs // per_panel,
                        lambda: write(per_panel, staged, height, first, panel),
                        lambda: write(rest, staged, height, first, panel),
                    )
                else:
                    write(per_panel, staged, height, first, panel)

        b.tasks(panels, task, name="panel")

    return tag(b.prim_func(problem.name, emit), problem)
