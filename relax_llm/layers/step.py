"""One step of a decoder, as the layers see it while the model is traced: sizes, caches, and what layers share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, relax
from tvm.relax.frontend import nn

from relax_llm.kernels.library import build
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.positions import Positions, RopeTable
from relax_llm.kernels.problem import Problem


@dataclass
class Step:
    """The call that is being traced: `seq` tokens, after which the cache holds `kv_len`.

    Attributes:
        batch: Sequences; all have the same length.
        seq: Query tokens of this call; 1 in decode.
        kv_len: Tokens in the cache after this call.
        caches: The tensors of each attention site's cache, updated in place.
        machine: What kernels are generated for.
        kernels: The module's kernels so far, shared by all of its functions.
    """

    batch: Any
    seq: Any
    kv_len: Any
    caches: Mapping[str, Sequence[relax.Expr]]
    machine: Machine
    kernels: dict[Problem, ir.GlobalVar]
    _shared: dict[Problem, nn.Tensor] = field(default_factory=dict)

    def positions(self) -> nn.Tensor:
        """Positions of this step's tokens: [1, seq] int32."""
        return self._once(Positions(), [1, self.seq], "int32")

    def rope(self, table: RopeTable) -> nn.Tensor:
        """Cosines and sines at this step's positions: [seq, 2, head_dim / 2]."""
        return self._once(table, [self.seq, 2, len(table.inverse_frequencies)], "float32")

    def _once(self, problem: Problem, shape: Sequence[Any], dtype: str) -> nn.Tensor:
        if problem not in self._shared:
            self._shared[problem] = self.launch(problem, [self.kv_len], shape, dtype)
        return self._shared[problem]

    def launch(
        self,
        problem: Problem,
        inputs: Sequence[Any],
        shape: Sequence[Any],
        dtype: str = "float32",
        in_place: Sequence[int] = (),
    ) -> nn.Tensor:
        """Emit one launch of the kernel that solves a problem.

        Args:
            problem: What to compute.
            inputs: Tensors (as Relax expressions or `nn.Tensor`) and sizes, in the kernel's order.
            shape: The shape of the new output.
            dtype: Its type.
            in_place: Positions of inputs that the kernel updates.
        """
        builder = relax.BlockBuilder.current()
        args = [value._expr if isinstance(value, nn.Tensor) else value for value in inputs]
        if problem not in self.kernels:
            self.kernels[problem] = builder.add_func(build(problem, self.machine), problem.name)
        kernel = self.kernels[problem]
        out_type = relax.TensorType(list(shape), dtype)
        if not in_place:
            return nn.Tensor(
                _expr=builder.emit(relax.op.call_tir(kernel, args, out_ty=out_type), problem.operator)
            )
        types = [args[index].ty for index in in_place]
        call = relax.op.call_tir_inplace(kernel, args, [*in_place, -1], [*types, out_type])
        results = builder.emit(call, problem.operator)
        return nn.Tensor(_expr=builder.emit(relax.TupleGetItem(results, len(in_place)), problem.operator))
