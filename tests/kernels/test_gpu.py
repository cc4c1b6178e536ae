"""Schedules for a GPU, tested without one: threads that do not talk to each other may as well run one by one."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm.tirx import PrimFunc

from relax_llm.artifact.kv_cache import GRANULE, TILE
from relax_llm.kernels.gpu import gpu_kernel
from relax_llm.kernels.machine import machine
from relax_llm.kernels.operators import OPERATORS, Operator
from relax_llm.kernels.problem import Problem

from .bench import generate

_OF_ATTENTION = slice(1, 2)  # slow to compile, and the others differ in numbers alone
SAMPLES = [
    (record, problem)
    for record in OPERATORS.values()
    for problem in record.samples[_OF_ATTENTION if record.name == "attention" else slice(None)]
    if not re.search("f16|q[468]", problem.name)  # the target cuda refuses such weights
]
SIZES = {"batch": 2, "seq": 5, "M": 10, "kv_len": 37, "tiles": -(-37 // GRANULE) * GRANULE // TILE}


def one_by_one(func: PrimFunc) -> PrimFunc:
    """The same function with loops for threads."""
    text = func.script()
    assert "blockIdx.x" in text
    assert "shared" not in text  # where threads wait for each other
    serial = text.replace("T.thread_binding(", "T.serial(")
    return tvm.script.from_source(re.sub(r', thread="\w+Idx\.x"\)', ")", serial))


@pytest.mark.parametrize(("record", "problem"), SAMPLES, ids=[problem.name for _, problem in SAMPLES])
def test_every_operator_is_right(record: Operator, problem: Problem) -> None:
    kernel = one_by_one(gpu_kernel(problem, machine("cuda")))
    run = generate(kernel, machine())[problem.name]
    values = record.inputs(problem, SIZES, np.random.default_rng(0), False)
    expected = record.expected(problem, SIZES, values, False)
    arguments, results = [], {}
    for operand in record.launched(problem, None):
        if not operand.is_tensor:
            arguments.append(SIZES[operand.name])
            continue
        shape = operand.at(SIZES)
        poison = np.full(shape, -77, operand.dtype)
        given = poison if operand.role == "output" else values[operand.name].reshape(shape)
        tensor = tvm.runtime.tensor(np.array(given, order="C"))  # keeps a shape without axes, too
        arguments.append(tensor)
        if operand.is_result:
            results[operand.name] = tensor
    run(*arguments)
    for name, tensor in results.items():
        right = expected[name].right
        found = tensor.numpy().astype(np.float64).reshape(right.shape)
        assert np.isfinite(right).all()
        assert (np.abs(found - right) <= expected[name].bound).all(), name
