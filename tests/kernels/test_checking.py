"""The check at the door: honest kernels pass, and every planted fault is refused with what was seen."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.tirx import PrimFunc
from tvm.tirx.script.builder import ir as T

from relax_llm import cpu
from relax_llm.errors import KernelError
from relax_llm.kernels import builder as b
from relax_llm.kernels.checking import OTHER_PROCESSOR, check
from relax_llm.kernels.forms import realize
from relax_llm.kernels.machine import machine
from relax_llm.kernels.matmul import Matmul
from relax_llm.kernels.matmul.tiled import tiled
from relax_llm.kernels.operators import OPERATORS, matmul as record
from relax_llm.kernels.operators.matmul import bounded
from relax_llm.kernels.points import sizes
from relax_llm.kernels.vectormath import ACTIVATIONS
from relax_llm.plan.kernel import Kernel, kernel
from relax_llm.plan.sizes import Box

from ..machines import PLAINER

NoProcess = Callable[[], None]

MACHINE = machine(PLAINER)
EPILOGUES = ("bias", "activation", "gate", "residual")
SMALL = Matmul(n=48, k=64)  # Buffers of whole cache lines: out of bounds is at once inaccessible memory.
ODD = Matmul(n=21, k=19)  # Buffers with a few bytes of room behind them.


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is remembered from one test to the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "relax_llm" / "checked"


def c_kernel(statement: str, *, m: tuple[int, int | None] = (1, 9), before: str = "") -> Kernel:
    """A plain product in C, each element stored by the given statement, after `before` has run once in a launch."""
    source = f"""
        #include <math.h>
        #include <signal.h>
        #include <stdint.h>
        #include <stdlib.h>
        #include <stdio.h>
        int planted(float *x, float *w, float *out, int64_t M) {{
            {before}
            for (int64_t i = 0; i < M; i++)
                for (int64_t j = 0; j < N; j++) {{
                    float sum = 0;
                    for (int64_t k = 0; k < K; k++) sum += x[i * K + k] * w[j * K + k];
                    {statement}
                }}
            return 0;
        }}"""
    return kernel("matmul", m=m, form="c", name="planted")(lambda problem: source)


def refusal(made: Kernel, problem: Matmul = SMALL, **options: Any) -> str:
    """The sentence with which a kernel is refused."""
    with pytest.raises(KernelError) as caught:
        check(realize(made, problem, MACHINE), MACHINE, **options)
    message = str(caught.value)
    assert f"'{made.name}' is refused for {problem.name}" in message
    return message


@kernel("matmul", layout="tiled", absorbs=EPILOGUES)
def built_in(problem: Matmul) -> PrimFunc:
    return tiled(problem, MACHINE, flat=True)


@kernel("matmul", absorbs=EPILOGUES)
def loops(problem: Matmul) -> PrimFunc:
    """The product of a row and the residual, started from what is added last, each term in descending order of k."""
    assert not problem.gated

    def emit() -> None:
        rows = b.size("M")
        x = b.argument("x", (rows, problem.k))
        weight = b.argument("weight", (problem.n, problem.k))
        bias = b.argument("bias", (problem.n,)) if problem.bias else None
        residual = b.argument("residual", (rows, problem.n)) if problem.residual else None
        out = b.argument("out", (rows, problem.n))
        linear = problem.activation is None
        with T.serial(rows) as i, T.serial(problem.n) as j:
            start = T.float32(0) if bias is None else bias[j]
            b.put(out, start + residual[i, j] if linear and residual is not None else start, i, j)
            with T.serial(problem.k) as k:
                at = problem.k - 1 - k
                b.put(out, out[i, j] + x[i, at] * weight[j, at], i, j)
            if not linear:
                value = ACTIVATIONS[str(problem.activation)](b.let("value", out[i, j]))
                b.put(out, value if residual is None else value + residual[i, j], i, j)

    return b.prim_func("loops", emit)


@kernel("matmul", absorbs=EPILOGUES)
def scheduled(schedule: Any, problem: Matmul) -> None:
    block = schedule.get_sblock("matmul")
    rows, _, k = schedule.get_loops(block)
    outer, inner = schedule.split(k, [None, 8])
    schedule.reorder(outer, rows, inner)


class TestHonestKernels:
    @pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
    @pytest.mark.parametrize("gated", [False, True])
    def test_built_in(self, activation: str | None, gated: bool) -> None:
        problem = Matmul(n=150, k=77, bias=not gated, activation=activation, residual=True, gated=gated)
        assert check(realize(built_in, problem, MACHINE), MACHINE).startswith(
            "checked at M=1, 2, 3, 4, 5, 7, 8, 9, "
        )

    @pytest.mark.parametrize("problem", [Matmul(n=1, k=1), Matmul(n=576, k=1536), Matmul(n=16, k=20000)])
    def test_built_in_shapes(self, problem: Matmul) -> None:
        assert check(realize(built_in, problem, MACHINE), MACHINE).endswith("64, 65, 257")

    @pytest.mark.parametrize(
        "problem",
        [
            SMALL,
            ODD,
            Matmul(n=8, k=9000, bias=True),
            Matmul(n=40, k=33, bias=True, activation="gelu", residual=True),
            Matmul(n=40, k=700, bias=True, residual=True),
        ],
    )
    @pytest.mark.parametrize("made", [loops, scheduled])
    def test_loops_and_schedule(self, made: Kernel, problem: Matmul) -> None:
        assert check(realize(made, problem, MACHINE), MACHINE).startswith("checked at")

    @pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
    def test_schedule_of_a_gated_product(self, activation: str | None) -> None:
        problem = Matmul(n=40, k=33, bias=True, activation=activation, gated=True, residual=True)
        assert check(realize(scheduled, problem, MACHINE), MACHINE).startswith("checked at")

    @pytest.mark.parametrize("problem", [SMALL, ODD])
    def test_c(self, problem: Matmul) -> None:
        status = check(realize(c_kernel("out[i * N + j] = sum;"), problem, MACHINE), MACHINE)
        assert status == "checked at M=1, 2, 3, 4, 5, 7, 8, 9"

    def test_c_that_prints(self) -> None:
        made = c_kernel(
            "out[i * N + j] = sum;", before='puts("{\\"fault\\": \\"printed\\"}"); fflush(stdout);'
        )
        assert check(realize(made, SMALL, MACHINE), MACHINE).startswith("checked at")

    def test_one_size(self) -> None:
        made = c_kernel("out[i * N + j] = sum;", m=(5, 5), before="if (M != 5) abort();")
        assert check(realize(made, SMALL, MACHINE), MACHINE) == "checked at M=5"

    def test_other_processor(self) -> None:
        foreign = machine("aarch64" if cpu.architecture() == "x86_64" else "x86-64")
        assert check(realize(loops, SMALL, foreign), foreign) == OTHER_PROCESSOR
        assert (
            check(realize(replace(loops, features=frozenset({"no_such"})), SMALL, MACHINE), MACHINE)
            == OTHER_PROCESSOR
        )


PLANTED: dict[str, tuple[Kernel, str]] = {
    "wrong at a tail": (
        c_kernel("out[i * N + j] = sum + (M % 4 == 3 && i == M - 1 && j == 2);"),
        r"at M=3 element \[2, 2\] is \S+ where \S+ is right \(error 1, bound \S+\); 1 of \d+ elements are wrong",
    ),
    "wrong at the last M": (
        c_kernel("out[i * N + j] = M == 9 ? -sum : sum;"),
        r"at M=9 element \[0, 0\] is .* elements are wrong, the largest error is \S+ against a largest bound of",
    ),
    "scaled": (c_kernel("out[i * N + j] = sum * 1.001f;"), r"at M=1 element .* where .* is right"),
    "eight bits after the point": (
        c_kernel("out[i * N + j] = (float)(int)(sum * 256) / 256;"),
        r"at M=1 element .* where .* is right",
    ),
    "a term too few": (
        c_kernel("out[i * N + j] = sum - x[i * K + K - 1] * w[j * K + K - 1];"),
        r"at M=1 element .* where .* is right",
    ),
    "NaN": (
        c_kernel("out[i * N + j] = i == 1 ? NAN : sum;"),
        r"at M=2 element \[1, 0\] is NaN where \S+ is right; ",
    ),
    "a row not written": (
        c_kernel("if (i < 4) out[i * N + j] = sum;"),
        r"at M=5 element \[4, 0\] of the output was never written; \d+ of \d+ elements are wrong",
    ),
    "sums into the output": (
        c_kernel("out[i * N + j] += sum;"),
        r"at M=1 element \[0, 0\] depends on what was in the output before the launch: it is read before",
    ),
    "reads the output where NaN does not show": (
        c_kernel(
            "out[i * N + j] = fmaxf(fminf(out[i * N + j], sum), sum - 1e4f * (out[i * N + j] < -1e20f));"
        ),
        r"at M=1 element \[0, 0\] depends on what was in the output before the launch",
    ),
    "writes past the end": (
        c_kernel("out[i * N + j] = sum; out[M * N] = 1;"),
        r"at M=1 it wrote out of bounds: directly after the end of 'out'",
    ),
    "writes before the start": (
        c_kernel("out[i * N + j] = sum; out[-3] = 1;"),
        r"at M=1 it wrote out of bounds: 8 bytes before the start of 'out'",
    ),
    "writes past an input": (
        c_kernel("out[i * N + j] = sum; if (M > 6) x[M * K + 1] = 1;"),
        r"at M=7 it wrote out of bounds: 4 bytes after the end of 'x'",
    ),
    "modifies x": (
        c_kernel("out[i * N + j] = sum;", before="x[M * K - 1] += 1;"),
        r"at M=1 it modified its input 'x': element \[0, \d+\] was \S+ and is",
    ),
    "segfault": (
        c_kernel("out[i * N + j] = sum;", before="*(volatile int *)8 = 1;"),
        r"at M=1 it crashed with SIGSEGV\. \(",
    ),
    "abort": (
        c_kernel("out[i * N + j] = sum;", before='if (M == 3) { fputs("no threes", stderr); abort(); }'),
        "at M=3 it crashed with SIGABRT; it said: no threes",
    ),
    "exit": (
        c_kernel("out[i * N + j] = sum;", before="exit(0);"),
        "at M=1 it ended the process with exit code 0",
    ),
}


class TestPlantedFaults:
    @pytest.mark.parametrize("problem", [SMALL, ODD], ids=["whole lines", "odd"])
    @pytest.mark.parametrize("name", PLANTED)
    def test_refused(self, name: str, problem: Matmul) -> None:
        made, seen = PLANTED[name]
        message = refusal(made, problem)
        assert re.search(seen, message), message
        assert re.search(r"from seed \d+", message)

    @pytest.mark.parametrize(("at", "place"), [("N * K", "past the end"), ("-1", "before the start")])
    def test_reads_out_of_bounds(self, at: str, place: str) -> None:
        made = c_kernel("out[i * N + j] = sum;", before=f"volatile float no = w[{at}]; (void)no;")
        assert f"it reads {place} of 'weight' (SIGSEGV in the inaccessible memory there)" in refusal(made)

    def test_uses_what_is_past_the_end_of_x(self) -> None:
        made = c_kernel("out[i * N + j] = sum + x[M * K];")
        assert "it reads past the end of 'x'" in refusal(made)
        assert "is NaN where" in refusal(made, ODD)  # within the same 64 bytes

    def test_never_finishes(self) -> None:
        made = c_kernel(
            "out[i * N + j] = sum;", before="while (M == 2) { volatile int spin = 0; (void)spin; }"
        )
        assert "at M=2 it did not finish within 1 s" in refusal(made, seconds=1.0)

    def test_wrong_function_name(self) -> None:
        made = kernel("matmul", form="c", name="planted")(lambda problem: "int other(void) { return 0; }")
        assert re.search(r"its library cannot be loaded: .*undefined symbol: planted__matmul", refusal(made))

    def test_argument_checks(self) -> None:
        honest = realize(loops, SMALL, MACHINE)
        wider = realize(loops, replace(SMALL, n=SMALL.n + 1), MACHINE)
        with pytest.raises(KernelError, match=r"'loops' is refused .*: at M=1 the launch raised: .*48"):
            check(replace(honest, func=wider.func), MACHINE)

    def test_one_term_too_few_of_many(self) -> None:
        """An error that drowns in the roundings of real numbers shows in integers."""
        made = c_kernel("out[i * N + j] = sum - (i == 3) * 1e-3f * x[i * K + 5] * w[j * K + 5];")
        assert re.search(
            r"at M=4 element \[3, \d\] is .* where .* is right", refusal(made, Matmul(n=4, k=30000))
        )

    def test_same_seed_same_words(self) -> None:
        made, _ = PLANTED["scaled"]
        assert refusal(made, seed=7) == refusal(made, seed=7) != refusal(made, seed=8)

    def test_does_not_compile(self) -> None:
        honest = realize(loops, SMALL, MACHINE)
        with pytest.raises(KernelError, match=r"'loops' cannot be compiled for matmul_n48_k64"):
            check(replace(honest, objects=(b"not an object file",)), MACHINE)


class TestRemembering:
    @pytest.fixture
    def no_process(self, monkeypatch: pytest.MonkeyPatch) -> NoProcess:
        def forbid() -> None:
            def run(*_: Any, **__: Any) -> None:
                raise AssertionError("a process was started")

            monkeypatch.setattr(subprocess, "run", run)

        return forbid

    @pytest.mark.parametrize("made", [built_in, c_kernel("out[i * N + j] = sum;"), scheduled])
    def test_second_check_starts_no_process(
        self, made: Kernel, no_process: NoProcess, own_cache: Path
    ) -> None:
        first = check(realize(made, SMALL, MACHINE), MACHINE)
        assert [path.read_text() for path in own_cache.iterdir()] == [first]
        again = realize(made, SMALL, MACHINE)
        no_process()
        assert check(again, MACHINE) == first

    def test_what_changed_is_checked_again(
        self, no_process: NoProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        honest = realize(loops, SMALL, MACHINE)
        check(honest, MACHINE)
        changed = [
            (replace(honest, objects=(b"",)), MACHINE),
            (replace(honest, kernel=replace(loops, sizes=Box.of(M=(1, 9)))), MACHINE),
            (replace(honest, func=realize(scheduled, SMALL, MACHINE).func), MACHINE),
            (realize(loops, replace(SMALL, k=65), MACHINE), MACHINE),
            (honest, replace(MACHINE, features=frozenset())),
        ]
        no_process()
        for made, where in changed:
            with pytest.raises(AssertionError, match="a process was started"):
                check(made, where)
        monkeypatch.setattr("tvm.__version__", "0.0")
        with pytest.raises(AssertionError, match="a process was started"):
            check(honest, MACHINE)

    def test_a_refused_kernel_is_not_remembered(self, own_cache: Path) -> None:
        made, _ = PLANTED["scaled"]
        assert refusal(made)
        assert refusal(made)
        assert not own_cache.exists()

    def test_a_damaged_note_is_not_believed(self, own_cache: Path) -> None:
        first = check(realize(loops, SMALL, MACHINE), MACHINE)
        (note,) = own_cache.iterdir()
        note.write_bytes(b"\xff")
        assert check(realize(loops, SMALL, MACHINE), MACHINE) == first == note.read_text()

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert check(realize(loops, SMALL, MACHINE), MACHINE).startswith("checked at")


def rows(first: int, last: int | None) -> list[int]:
    return [point["M"] for point in sizes(OPERATORS["matmul"], Box.of(M=(first, last)))]


class TestSizes:
    def test_all(self) -> None:
        assert rows(1, None) == [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 257]

    @pytest.mark.parametrize(("first", "last"), [(1, 8), (9, 64), (65, None), (300, 1000), (5, 5), (7, None)])
    def test_inside_with_boundaries(self, first: int, last: int | None) -> None:
        chosen = rows(first, last)
        assert chosen == sorted(set(chosen))
        assert chosen[0] == first
        assert chosen[-1] == last if last is not None else chosen[-1] >= max(257, first)
        assert first + 1 in chosen or last == first
        if last is None or last - first >= 7:  # every remainder of the smallest tile
            assert {m % 4 for m in chosen} == {0, 1, 2, 3}

    @pytest.mark.parametrize(
        "box",
        [
            Box(),
            Box.of(seq=1),
            Box.of(seq=(2, 40), kv_len=(1, 100)),
            Box.of(batch=(2, 2), seq=1, kv_len=(513, None)),
        ],
        ids=str,
    )
    def test_several_axes(self, box: Box) -> None:
        chosen = list(sizes(OPERATORS["attention"], box))
        assert 5 <= len(chosen) <= 64
        assert all(point in box and point["seq"] <= point["kv_len"] for point in chosen)
        assert len({tuple(point.values()) for point in chosen}) == len(chosen)
        for axis in ("seq", "kv_len"):
            first, last = box[axis]
            met = {point[axis] for point in chosen}
            assert max(first, box["seq"][0]) in met
            assert len(met) > 3 or last == first


class TestBound:
    """The bound against float32 itself: sums in any order lie within, and by no more than the argument allows."""

    @pytest.mark.parametrize("k", [1, 5, 64, 1536, 14336])
    @pytest.mark.parametrize("order", ["sequential", "pairwise", "sorted", "signs apart"])
    def test_any_order_of_summation(self, k: int, order: str) -> None:
        rng = np.random.default_rng(k)
        x = rng.standard_normal((5, k), np.float32)
        weight = rng.standard_normal((40, k), np.float32)
        right, bound = bounded(Matmul(n=40, k=k), {"x": x, "weight": weight}, exact=False)
        terms = x[:, None, :] * weight[None]
        if order == "pairwise":
            got = terms.sum(axis=-1, dtype=np.float32)
        else:
            if order == "sorted":
                terms = np.sort(terms, axis=-1)
            elif order == "signs apart":
                terms = np.take_along_axis(terms, np.argsort(terms < 0, axis=-1, kind="stable"), axis=-1)
            got = np.cumsum(terms, axis=-1, dtype=np.float32)[..., -1]
        assert (np.abs(got - right) <= bound).all()
        assert (np.abs(right) * 1e-3 > bound).any()  # an error of one in a thousand stands out

    @pytest.mark.parametrize("k", [1, 64, 14336, 100_000])
    def test_integers_are_exact_in_any_order(self, k: int) -> None:
        problem = Matmul(n=12, k=k, bias=True, residual=True)
        inputs = record._integers(problem, 3, np.random.default_rng(k))
        right, _ = bounded(problem, inputs, exact=True)
        terms = inputs["x"][:, None, :] * inputs["weight"][None]
        for ordered in (terms, np.sort(terms, axis=-1)):
            got = np.cumsum(ordered, axis=-1, dtype=np.float32)[..., -1] + inputs["bias"] + inputs["residual"]
            np.testing.assert_array_equal(got, right)


def test_columns_apart_are_the_whole() -> None:
    problem = Matmul(n=24, k=7, bias=True, activation="silu", gated=True, residual=True)
    inputs = record._reals(problem, 4, np.random.default_rng(0))
    right, bound = bounded(problem, inputs, exact=False)
    for columns in (slice(0, 5), slice(5, 12)):
        part_right, part_bound = bounded(*record._columns(problem, inputs, columns), exact=False)
        np.testing.assert_allclose(part_right, right[:, columns], rtol=1e-12)
        np.testing.assert_allclose(part_bound, bound[:, columns], rtol=1e-12)
