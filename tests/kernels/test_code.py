"""The machine code: vectors of the right width, fused multiply-adds, and no calls where there should be none.

Code can be generated and read for every machine, whatever this one is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from tvm import ir, tirx

from relax_llm.errors import CompileError
from relax_llm.kernels.attention import Attention
from relax_llm.kernels.cache import Append
from relax_llm.kernels.generate import generate
from relax_llm.kernels.inner import complete
from relax_llm.kernels.intrinsics import INT8
from relax_llm.kernels.library import build
from relax_llm.kernels.lookup import Embedding, LastToken
from relax_llm.kernels.machine import Machine, machine
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.matmul.integer import integer
from relax_llm.kernels.matmul.multiply import steps_of_loop
from relax_llm.kernels.matmul.shape import UNROLL, layout_for, tile_for
from relax_llm.kernels.matmul.tiled import tiled
from relax_llm.kernels.norm import Norm
from relax_llm.kernels.positions import Positions, RopeTable
from relax_llm.kernels.problem import ATTRIBUTE, Problem, problem_of

MATMUL = Matmul(100, 33, bias=True, activation="gelu", residual=True)
GATED = Matmul(100, 33, activation="silu", gated=True)
ATTENTION = Attention(6, 2, 20, 0.2, 9)
PROBLEMS = (
    MATMUL,
    GATED,
    ATTENTION,
    Append(6, 2, 20),
    Append(6, 6, 5, rope=False),
    Norm(33, 1e-5),
    Norm(33, 1e-5, centered=True, bias=True),
    Embedding(33, 17),
    Embedding(33, 17, layout="tiled32"),
    LastToken(17),
    Positions(),
    RopeTable((1.0, 0.1), 0.7),
    RopeTable((1.0, 0.1), 1.0, (100.0, 2.0, 64)),
)
WITHOUT_LIBM = tuple(problem for problem in PROBLEMS if not isinstance(problem, RopeTable))
LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")
names = lambda problem: problem.name[:40]  # noqa: E731


@cache
def _source(problem: Problem, name: str, kind: str) -> str:
    module = generate({problem.name: build(problem, machine(name))}, machine(name)).mod
    text: str = module.inspect_source(kind)
    return text


def _calls(problem: Problem, name: str) -> set[str]:
    """The functions that a kernel calls, as LLVM's IR has them; intrinsics become instructions and do not count."""
    called = re.findall(r"\bcall [^@\n]*@([\w.]+)\(", _source(problem, name, "ll"))
    return {symbol for symbol in called if not symbol.startswith("llvm.")}


@pytest.mark.parametrize("problem", [MATMUL, GATED, ATTENTION], ids=names)
@pytest.mark.parametrize(
    ("name", "register", "none"), [("x86-64-v4", "zmm", None), ("x86-64-v3", "ymm", "zmm")]
)
def test_fused_multiply_adds_fill_the_registers(
    name: str, register: str, none: str | None, problem: Problem
) -> None:
    code = _source(problem, name, "s")
    fused = re.findall(rf"\bvfmadd\w*ps\b.*%{register}\d+", code)
    assert len(fused) >= machine(name).accumulators
    assert none is None or f"%{none}" not in code


@pytest.mark.parametrize("problem", [MATMUL, GATED, ATTENTION], ids=names)
@pytest.mark.parametrize("name", ["x86-64", "x86-64-v2"])
def test_older_machines_get_instructions_they_have(name: str, problem: Problem) -> None:
    code = _source(problem, name, "s")
    assert re.search(r"\bmulps\b.*%xmm", code)
    assert re.search(r"\baddps\b.*%xmm", code)
    assert not re.search(r"%[yz]mm|\bv\w+ps\b", code)


@pytest.mark.parametrize("problem", [MATMUL, GATED, ATTENTION], ids=names)
def test_aarch64(problem: Problem) -> None:
    assert (
        len(re.findall(r"\bfmla\s+v\d+\.4s", _source(problem, "aarch64", "s")))
        >= machine("aarch64").accumulators
    )


@pytest.mark.parametrize("problem", PROBLEMS, ids=names)
@pytest.mark.parametrize("name", [*LEVELS, "aarch64"])
def test_no_memory_is_taken_and_every_machine_is_served(name: str, problem: Problem) -> None:
    """Local memory is on the stack: taking it from the heap made decoding three times as slow."""
    calls = _calls(problem, name)
    assert not {symbol for symbol in calls if "Workspace" in symbol}
    assert not {symbol for symbol in calls if symbol in ("malloc", "free")}


@pytest.mark.parametrize("problem", WITHOUT_LIBM, ids=names)
def test_no_function_is_called_for_each_lane(problem: Problem) -> None:
    """`vectormath` replaces libm: its functions take one lane at a time."""
    calls = _calls(problem, "x86-64-v3")
    libm = {symbol for symbol in calls if re.fullmatch(r"(exp|tanh|erf|sin|cos|pow|sqrt|floor)\w?f?", symbol)}
    assert not libm
    assert not re.search(r"\bcall\w*\s+(expf|tanhf|erff|floorf|sqrtf)", _source(problem, "x86-64-v3", "s"))


def test_the_accumulators_of_a_matmul_stay_in_registers() -> None:
    """The loop over k of the full tile loads weights, broadcasts x, and multiplies and adds; it writes no vector."""
    code = _source(Matmul(64, 999), "x86-64-v4", "s")
    there = machine("x86-64-v4")
    rows = tile_for(there).rows
    blocks = re.split(r"^\.LBB\S+:.*$|^\tj.*$", code, flags=re.MULTILINE)
    count = 2 * rows * steps_of_loop(layout_for(Matmul(64, 999), there), rows)
    full = [block for block in blocks if len(re.findall(r"vfmadd\w*ps.*%zmm", block)) == count]
    assert full, f"no loop has the {count} multiply-adds of a full tile"
    for block in full:
        assert not re.search(r"vmov\w*\s+%zmm\d+, .*\(", block), (
            "an accumulator is written to memory in the loop"
        )


@pytest.mark.parametrize("problem", [ATTENTION, GATED], ids=names)
def test_stack_memory_begins_with_a_cache_line(problem: Problem) -> None:
    """TVM aligns it to 16 bytes, so that most vectors would lie across two lines."""
    source = _source(problem, "x86-64-v4", "ll")
    large = re.findall(r"(%[\w.]+) = alloca \[(\d+) x (?:float|i32)\]", source)
    aligned = re.findall(r"align 64 ptr @llvm\.ptrmask", source)
    assert aligned
    assert len(aligned) >= sum(int(count) >= 256 for _, count in large)


def test_the_host_adds_its_extensions_to_its_level_only() -> None:
    host = machine()
    if host.name in LEVELS:
        assert host.features >= machine(host.name).features
        assert host.vector_bits == machine(host.name).vector_bits
    for name in (*LEVELS, "aarch64"):
        assert machine(name).name == name
    levels = [machine(name).features for name in LEVELS]
    assert all(low < high for low, high in pairwise(levels))


@pytest.mark.parametrize(("younger", "level"), [(True, 1), (False, 2)])
def test_lines_are_asked_for_into_the_cache_that_has_misses_in_flight(*, younger: bool, level: int) -> None:
    plain = machine("x86-64-v3")
    there = replace(plain, features=plain.features | ({"avx_vnni"} if younger else set()))
    assert there.streams_into == level
    for problem in (Matmul(100, 64), ATTENTION):
        code = generate({problem.name: build(problem, there)}, there).mod.inspect_source("s")
        first, second = (len(re.findall(rf"\bprefetch{hint}\b", code)) for hint in ("t0", "t1"))
        assert first if younger else second
        assert not (second if younger else isinstance(problem, Attention) and first)


def _statements(node: Any) -> Iterator[Any]:
    """A statement of TIR and all in it."""
    yield node
    for name in ("seq", "body", "then_case", "else_case"):
        inside = getattr(node, name, None)
        for one in inside if name == "seq" and inside else [inside] if inside is not None else []:
            yield from _statements(one)


@pytest.mark.parametrize(("format", "few", "lines"), [("f32", 6, 8), ("bf16", 3, 4)])
def test_few_rows_leave_most_lines_to_the_prefetcher_of_the_core(format: str, few: int, lines: int) -> None:
    """A tile that is alone asks for a line of a turn where the core reads ahead, and else for all of them."""
    plain, problem = machine("x86-64-v4"), Matmul(64, 64, format)

    def asked(there: Machine, rows: int) -> tuple[int, int]:
        """Lines of a turn that a tile asks for if it is alone, and if not."""
        functions = complete({ir.GlobalVar(problem.name): tiled(problem, there)})
        (tile,) = (func for var, func in functions.items() if var.name_hint.endswith(f"rows{rows}"))
        branches = [
            [str(case).count("llvm.prefetch") for case in (node.then_case, node.else_case)]
            for node in _statements(tile.body)
            if isinstance(node, tirx.IfThenElse) and node.else_case is not None
        ]
        one, other = map(sum, zip(*branches, strict=True))
        always = str(tile).count("llvm.prefetch") - one - other
        passes = UNROLL // steps_of_loop(layout_for(problem, there), rows)
        return passes * (always + one), passes * (always + other)

    for rows in range(1, 8):
        passes = UNROLL // steps_of_loop(layout_for(problem, plain), rows)
        assert asked(plain, rows) == (passes if rows <= few else lines, lines)
        assert asked(replace(plain, features=plain.features | {"avx_vnni"}), rows) == (lines, lines)


def test_a_weight_is_loaded_once_for_both_bytes_of_activations() -> None:
    """For up to four rows, whose sums of both have registers: a turn has four vectors of codes of a byte."""
    plain, problem = machine("x86-64-v4"), Matmul(64, 64, "q8", activations="int16")
    options = {**plain.options, "mattr": ["-prefer-256-bit", "+avx512vnni"]}
    there = replace(plain, features=plain.features | INT8, options=options)
    code = generate({problem.name: integer(problem, there, planes=2)}, there).mod.inspect_source("s")
    found = re.findall(r"^\S*rows(\d)\S*:$(.*?)^\.Lfunc_end", code, re.MULTILINE | re.DOTALL)
    tiles = {int(rows): body for rows, body in found}
    assert sorted(tiles) == list(range(1, 7))
    for rows, body in tiles.items():
        blocks = re.split(r"^\.LBB\S+:.*$|^\tj.*$", body, flags=re.MULTILINE)
        products = [count for block in blocks if (count := len(re.findall(r"\bvpdpbusd\b", block)))]
        if len(products) > 1 and rows <= 2:  # LLVM makes a loop of its own for a tile that is alone
            assert products.pop() == 8 * rows
        assert products == ([8 * rows] if rows <= 4 else [4 * rows] * 2)


@pytest.mark.parametrize("name", ["x86-64-v9", " x86-64", "znver4", "rocm"])
def test_an_unknown_machine_is_refused(name: str) -> None:
    with pytest.raises(CompileError, match=r"Known targets: x86-64, .*aarch64"):
        machine(name)


@pytest.mark.parametrize("problem", PROBLEMS, ids=names)
def test_a_kernel_carries_its_problem(problem: Problem) -> None:
    func = build(problem, machine("x86-64-v3"))
    assert problem_of(func) == problem
    assert Problem.from_json(str(func.attrs[ATTRIBUTE])) == problem
    assert str(func.attrs["global_symbol"]) == problem.name
    assert re.fullmatch(r"[a-z][a-z0-9_]*", problem.name)


def test_names_tell_problems_apart() -> None:
    different = [
        *PROBLEMS,
        Norm(33, 1e-6),
        Norm(33, 1e-5, centered=True),
        Norm(33, 1e-5, bias=True),
        Matmul(100, 33),
        Matmul(10, 33),
        Matmul(100, 33, bias=True),
        Matmul(100, 33, residual=True),
        Attention(6, 2, 20, 0.2),
        Attention(6, 2, 20, 0.3, 9),
        Attention(6, 2, 20, 0.2, 8),
        RopeTable((1.0, 0.1), 0.8),
        RopeTable((1.0, 0.1)),
        RopeTable((1.0, 0.2)),
    ]
    assert len({problem.name for problem in different}) == len(different)
