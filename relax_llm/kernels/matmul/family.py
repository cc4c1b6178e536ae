"""The matmul kernels that ship, as records like a user's own."""

from collections.abc import Callable
from functools import partial

from relax_llm.formats import FORMATS
from relax_llm.kernels.intrinsics import BF16
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.blocked import blocked
from relax_llm.kernels.matmul.cost import blocked_cost, tiled_cost
from relax_llm.kernels.matmul.integer import FEATURES, FORMATS_READ, integer, integer_cost
from relax_llm.kernels.matmul.pairs import pairs, pairs_cost
from relax_llm.kernels.matmul.plain import plain_panels, plain_rows
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.matmul.shape import first_blocked
from relax_llm.kernels.matmul.tiled import tiled
from relax_llm.plan.kernel import Kernel
from relax_llm.plan.sizes import Box

_PACKED = frozenset(FORMATS)
_ALL = frozenset({"norm", "bias", "activation", "gate", "residual"})
_MANY_ROWS = (
    9  # from which on activations of one byte pay; with fewer, reading the weight is most of the time
)
_ROUNDED_ROWS = 5  # from which on products of bf16 pay; with fewer, reading the weight is all of the time
_FEW_ROWS = 6  # up to which a dot product for each output beats transposing the weight first


def matmul_kernels(machine: Machine) -> list[Kernel]:
    """The built-in kernels, in the order of their precedence."""

    def make(build: Callable[[Matmul, Machine], object]) -> Callable[[Matmul], object]:
        return lambda problem: build(problem, machine)

    return [
        Kernel(
            "tiled",
            "matmul",
            "primfunc",
            make(lambda p, m: tiled(p, m, flat=True)),
            layout="tiled",
            absorbs=_ALL,
            weights=_PACKED,
            cost=tiled_cost(machine),
        ),
        Kernel(
            "blocked",
            "matmul",
            "primfunc",
            make(blocked),
            sizes=Box.of(M=(first_blocked(machine), None)),
            layout="tiled",
            absorbs=_ALL,
            # Products in integers are ahead of it at every size, and it is a lot of code.
            weights=_PACKED - (FORMATS_READ if machine.features >= FEATURES else frozenset()),
            cost=blocked_cost(machine),
        ),
        Kernel(
            "pairs",
            "matmul",
            "primfunc",
            make(pairs),
            sizes=Box.of(M=(_ROUNDED_ROWS, None)),
            layout="tiled",
            absorbs=_ALL,
            features=BF16,
            weights=frozenset({"bf16"}),
            cost=pairs_cost(machine, tiled_cost(machine, copied=True)),
        ),
        *(
            Kernel(
                name,
                "matmul",
                "primfunc",
                make(partial(integer, planes=planes)),
                sizes=Box.of(M=(first, None)),
                layout="tiled",
                absorbs=_ALL,
                features=FEATURES,
                weights=FORMATS_READ,
                cost=integer_cost(planes),
            )
            for name, planes, first in (("integer16", 2, 1), ("integer8", 1, _MANY_ROWS))
        ),
        Kernel(
            "plain_panels", "matmul", "primfunc", make(plain_panels), sizes=Box.of(M=(_FEW_ROWS + 1, None))
        ),
        Kernel(
            "plain_rows", "matmul", "primfunc", make(plain_rows)
        ),  # valid for all, so that it may be pinned
    ]
