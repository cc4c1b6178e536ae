"""Kernels for a GPU by the one door: what a user gave, where it can be launched there, and the built-in ones."""

from relax_llm.errors import KernelError
from relax_llm.kernels.forms import Realized, realize
from relax_llm.kernels.gpu import has_threads
from relax_llm.kernels.layout import Plain
from relax_llm.kernels.library import build
from relax_llm.kernels.machine import Machine
from relax_llm.kernels.matmul.problem import Matmul
from relax_llm.kernels.operators import operator_of
from relax_llm.kernels.problem import Problem
from relax_llm.plan.kernel import Declined, Kernel


def try_for_gpu(kernel: Kernel, problem: Problem, machine: Machine, *, given: bool) -> Realized | str:
    """A kernel for this problem, or why there is none.

    A GPU's kernels are launched by the host, where no dispatcher stands between: one of them computes all of a problem
    at every size.

    Args:
        kernel: Its record.
        problem: What to solve.
        machine: A GPU.
        given: Whether it is a user's.

    Raises:
        KernelError: The kernel was given, and cannot be one for a GPU.
    """
    if not given:
        layout = Plain() if isinstance(problem, Matmul) else None
        operands = operator_of(problem).launched(problem, layout)
        symbol = f"{kernel.name}__{problem.name}"
        return Realized(kernel, problem, symbol, build(problem, machine), operands, layout)
    try:
        return _realized(kernel, problem, machine)
    except Declined as reason:
        return f"declined: {reason}"
    except KernelError as error:
        if kernel.package:  # installed for all compilations, and not asked for in this one
            return f"is no kernel for a GPU: {error}"
        raise


def _realized(kernel: Kernel, problem: Problem, machine: Machine) -> Realized | str:
    """A user's kernel, or why it does not serve."""
    if not kernel.sizes.everything:
        raise KernelError(
            f"Kernel {kernel.name!r} is valid for {kernel.sizes}; on a GPU kernels are not chosen by size, so one must "
            "be valid for every size."
        )
    if kernel.layout == "tiled":
        raise KernelError(
            f"Kernel {kernel.name!r} reads the tiled layout, which fits the vectors of a processor; for a GPU say "
            'layout="plain", or give a Layout of yours.'
        )
    realized = realize(kernel, problem, machine)
    if realized.objects or realized.python is not None:
        form = "Python" if realized.python else "C"
        raise KernelError(
            f"Kernel {kernel.name!r} is {form}, which does not run on a GPU; give it as TVMScript whose "
            "loops are bound to threads, or as a schedule that binds them."
        )
    if realized.problem != problem:
        return "leaves a part of the problem to other functions, and on a GPU one kernel computes all; see absorbs"
    if not has_threads(realized.func):
        raise KernelError(
            f"Kernel {kernel.name!r} binds no loop to threads for {problem.name}; on a GPU its loops must be bound to "
            "blockIdx.x and threadIdx.x."
        )
    return realized
