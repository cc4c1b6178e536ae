"""Where kernels meet: a library of candidates for each problem, memory like the model's, and a contest."""

import hashlib
import json
import math
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from relax_llm import ffi
from relax_llm.kernels.forms import Realized
from relax_llm.kernels.machine import CODE_GENERATION, Machine
from relax_llm.kernels.operators import operator_of
from relax_llm.kernels.operators.operator import Operand
from relax_llm.kernels.problem import Problem
from relax_llm.places import cache_directory
from relax_llm.tuning import bench, memory
from relax_llm.tuning.contest import Contest, Rival
from relax_llm.tuning.library import Entrant, link
from relax_llm.tuning.rounds import Deadline, Run
from relax_llm.tuning.survey import Subject

_LARGEST = 2**24


class Arena:
    """Compiled candidates, and the memory that they are measured in."""

    def __init__(
        self,
        machine: Machine,
        subjects: Sequence[Subject],
        activations: int,
        deadline: Deadline,
        compiled: Callable[[], None],
    ) -> None:
        """Compile, or take equal libraries from the cache, and allocate.

        Args:
            machine: What to compile for: this machine.
            subjects: What competes.
            activations: Bytes that arguments other than weights may take.
            deadline: When to compile no more.
            compiled: Called after each problem.

        Raises:
            CompileError: Code generation failed.
        """
        runtime = ffi.runtime()
        self._subjects = tuple(subjects)  # kept, because they are known by identity
        self._digests: dict[tuple[Problem, str], str] = {}
        self._functions: dict[int, dict[str, tuple[bench.Launch, str]]] = {}
        for subject in subjects:
            entrants = [
                Entrant(f"tuned_{number}", subject.problem, realized)
                for number, realized in enumerate(subject.candidates)
            ]
            digests = {entrant.realized.symbol: _digest(entrant, machine) for entrant in entrants}
            whole = hashlib.blake2b(json.dumps([*digests.values()]).encode(), digest_size=16)
            path = cache_directory() / "tuning" / f"{whole.hexdigest()}.so"
            if not path.is_file():
                if deadline.left() <= 0:
                    continue
                link(entrants, machine, path)
            library = runtime.load_module(str(path))
            self._functions[id(subject)] = {
                entrant.realized.kernel.name: (library[entrant.symbol], _layout(entrant.realized))
                for entrant in entrants
            }
            self._digests |= {(subject.problem, symbol): digest for symbol, digest in digests.items()}
            compiled()
        self._tensor: Callable[[Any], Any] = runtime.from_dlpack
        needed = [len(subject.entry.sites) * _weight_bytes(subject.candidates[0]) for subject in subjects]
        largest = max(_weight_bytes(realized) for subject in subjects for realized in subject.candidates)
        self._weights = memory.Memory(max(largest, min(sum(needed), memory.available())))
        self._activations = memory.Memory(min(activations, memory.available()))

    def contest(self, subject: Subject) -> Contest | None:
        """The contest for a problem; None where the time was over before its kernels were compiled."""
        functions = self._functions.get(id(subject))
        if functions is None:
            return None
        layouts = {_layout(realized): realized for realized in subject.candidates}

        def arguments(size: int) -> bench.Arguments:
            sizes = {"batch": 1, "seq": size, "M": size}
            launched = _launched(subject.candidates[0], subject)
            weights = {}
            for layout, realized in layouts.items():
                for operand in _launched(realized, subject):
                    if operand.name == bench.WEIGHT:
                        weights[layout] = (operand.at(sizes), operand.dtype)
            return bench.Arguments(
                {operand.name: operand.at(sizes) for operand in launched},
                {operand.name: operand.dtype for operand in launched},
                weights or dict.fromkeys(layouts, ((), "float32")),
            )

        def prepare(size: int, cold: bool) -> Run:
            return bench.runner(
                functions, arguments(size), self._weights, self._activations, self._tensor, cold=cold
            )

        rivals = tuple(
            Rival(
                realized.kernel.name,
                realized.kernel.sizes["M"],
                self._digests[subject.problem, realized.symbol],
                _layout(realized),
            )
            for realized in subject.candidates
        )
        # A little more or less memory to read from changes nothing: measurements are kept under its order of magnitude.
        name = f"{subject.problem.name} over 2**{self._weights.size.bit_length()} bytes of weights"
        largest = _LARGEST
        while largest > 1 and arguments(largest).nbytes > self._activations.size:
            largest //= 2
        return Contest(name, rivals, prepare, largest)


def _launched(realized: Realized, subject: Subject) -> tuple[Operand, ...]:
    return operator_of(subject.problem).launched(subject.problem, realized.layout)


def _layout(realized: Realized) -> str:
    return realized.layout.name if realized.layout else ""


def _weight_bytes(realized: Realized) -> int:
    return sum(
        math.prod(size for size in operand.shape if isinstance(size, int)) * np.dtype(operand.dtype).itemsize
        for operand in realized.operands
        if operand.name == bench.WEIGHT
    )


def _digest(entrant: Entrant, machine: Machine) -> str:
    """What a kernel's time depends on: its code, that of what runs behind it, and how both are compiled."""
    realized = entrant.realized
    what = {
        "problem": entrant.problem.to_json(),
        "core": realized.problem.to_json(),
        "func": tvm.ir.save_json(realized.func),
        "layout": _layout(realized),
        "objects": [hashlib.blake2b(data).hexdigest() for data in realized.objects],
        "target": str(machine.target),
        "options": CODE_GENERATION,
        "tvm": tvm.__version__,
        "package": _sources(),
        # The code of a kernel in Python lies outside of all this, so it is measured every time.
        "python": secrets.token_hex() if realized.python else "",
    }
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()


def _sources() -> str:
    """What wraps kernels when they are measured and when they run."""
    from relax_llm.kernels import dispatch, norm
    from relax_llm.kernels.matmul import rest

    files = [Path(str(module.__file__)).read_bytes() for module in (dispatch, norm, rest)]
    return hashlib.blake2b(b"".join(files)).hexdigest()
