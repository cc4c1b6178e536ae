"""What depends on positions alone: their indices, and the rotations of rotary embeddings. Once in a step."""

from dataclasses import dataclass
from typing import ClassVar

from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.builder import Expr
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.problem import Problem, tag


@dataclass(frozen=True)
class Positions(Problem):
    """The positions kv_len - seq ... kv_len - 1 of the tokens of this step."""

    operator: ClassVar[str] = "positions"

    @property
    def flops(self) -> str:
        return "0"

    @property
    def bytes(self) -> str:
        return "4*seq"


def positions(problem: Positions, machine: Machine) -> PrimFunc:
    """kv_len -> out [1, seq] int32."""

    def emit() -> None:
        seq = b.size("seq")
        kv_len = b.scalar("kv_len")
        out = b.argument("out", (1, seq), "int32")
        with T.serial(seq) as i:
            b.put(out, T.cast(kv_len - seq + i, "int32"), 0, i)

    return tag(b.prim_func(problem.name, emit), problem)


@dataclass(frozen=True)
class RopeTable(Problem):
    """Cosines and sines of rotary position embeddings (Su et al. 2021).

    Attributes:
        inverse_frequencies: Radians per position of each pair, all scalings applied; head_dim / 2 of them.
        magnitude: Factor on cosines and sines (YaRN's attention factor).
        dynamic: For dynamic NTK scaling (theta, factor, original context length): where kv_len exceeds the original
            context, frequencies follow from theta scaled by the length; None otherwise.
    """

    operator: ClassVar[str] = "rope_table"
    inverse_frequencies: tuple[float, ...]
    magnitude: float = 1.0
    dynamic: tuple[float, float, int] | None = None

    def __post_init__(self) -> None:
        if not self.inverse_frequencies:
            raise KernelError("A rope table needs at least one frequency.")
        if self.dynamic is not None and len(self.inverse_frequencies) < 2:
            raise KernelError("Dynamic scaling of a rope table needs at least two frequencies.")

    @property
    def flops(self) -> str:
        return f"{3 * len(self.inverse_frequencies)}*seq"

    @property
    def bytes(self) -> str:
        return f"{8 * len(self.inverse_frequencies)}*seq"


def rope_table(problem: RopeTable, machine: Machine) -> PrimFunc:
    """kv_len -> out [seq, 2, head_dim / 2]: for each position its cosines, then its sines."""
    half = len(problem.inverse_frequencies)

    def emit() -> None:
        seq = b.size("seq")
        kv_len = b.scalar("kv_len")
        out = b.argument("out", (seq, 2, half))
        frequencies = b.local((half,))
        for i, frequency in enumerate(problem.inverse_frequencies):
            b.put(frequencies, T.float32(frequency), i)
        if problem.dynamic:
            theta, factor, original = problem.dynamic
            with b.when(kv_len > original), T.serial(half) as i:
                dim = 2.0 * half
                grown = T.float64(factor / original) * T.cast(kv_len, "float64") - T.float64(factor - 1.0)
                base = T.float64(theta) * T.pow(grown, T.float64(dim / (dim - 2.0)))
                power = T.float64(-2.0 / dim) * T.cast(i, "float64")
                b.put(frequencies, T.cast(T.pow(base, power), "float32"), i)

        def task(i: Expr) -> None:
            position = b.let("position", T.cast(kv_len - seq + i, "float32"))
            with T.serial(half) as j:
                angle = b.let("angle", position * frequencies[j])
                b.put(out, T.cos(angle) * T.float32(problem.magnitude), i, 0, j)
                b.put(out, T.sin(angle) * T.float32(problem.magnitude), i, 1, j)

        b.tasks(seq, task, serial_if=seq <= 16, name="position")

    return tag(b.prim_func(problem.name, emit), problem)
