"""Threads of a library: every task of every loop is run once, whoever is late, and whoever else launches."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from relax_llm.kernels import builder as b, threads
from relax_llm.kernels.generate import generate
from relax_llm.kernels.machine import machine


def _count_up() -> None:
    """Each task adds one to its own element: a task that is run twice, or not at all, is seen."""
    n = b.size("n")
    counts = b.argument("counts", (n,), "int32")

    def task(index: b.Expr) -> None:
        b.put(counts, counts[index] + 1, index)

    b.tasks(n, task)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads") / "loops.so"
    functions = {"count_up": b.prim_func("count_up", _count_up)}
    threads.link(generate(functions, machine()), path)
    return path


def _run(library: Path, code: str, count: int, seconds: float = 60) -> str:
    """Run code in a process of its own, with a number of threads; what it prints."""
    prologue = f"""
        import os, threading
        import numpy as np
        from relax_llm import ffi
        runtime = ffi.runtime()
        library = runtime.load_module({str(library)!r})
        count_up = library["count_up"]

        def check(times, sizes):
            for n in sizes:
                counts = np.zeros(n, np.int32)
                tensor = runtime.from_dlpack(counts)
                for _ in range(times):
                    count_up(tensor)
                assert (counts == times).all(), (n, np.unique(counts))

        def running():
            return len(os.listdir("/proc/self/task"))
    """
    environment = {**os.environ, "TVM_NUM_THREADS": str(count)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prologue) + textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SIZES = "[1, 2, 3, 31, 32, 33, 63, 64, 65, 1000]"


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_task_is_run_once(library: Path, count: int) -> None:
    """With more threads than cores, too."""
    assert _run(library, f"check(3000, {SIZES}); print('done')", count) == "done\n"


def test_threads_sleep_between_launches_and_wake_up(library: Path) -> None:
    code = f"""
        import time
        for _ in range(30):
            check(1, {SIZES})
            time.sleep(0.002)
        began = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - began < 0.1, "they spin"
        print("done")
    """
    assert _run(library, code, 2) == "done\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinities")
def test_threads_that_were_woken_may_run_anywhere(library: Path) -> None:
    """They are kept off the core of the one who wakes them, but only until they wake; one core is enough for all."""
    code = """
        import time
        def places():
            return [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
        check(20, [1000])
        for allowed in (os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}):
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), allowed)
            for _ in range(20):
                time.sleep(0.02)  # they sleep
                check(20, [1000])
            end = time.monotonic() + 30
            while set(map(frozenset, places())) != {frozenset(allowed)}:  # some may be waking up still
                assert time.monotonic() < end, places()
    """
    _run(library, code, 3)


def test_several_threads_of_the_host_launch_at_once(library: Path) -> None:
    code = f"""
        failed = []
        def work():
            try:
                check(500, {SIZES})
            except AssertionError as error:
                failed.append(error)
        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failed, failed
        print("done")
    """
    assert _run(library, code, 2) == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_has_threads_of_its_own(library: Path) -> None:
    code = f"""
        check(100, {SIZES})
        child = os.fork()
        if child == 0:
            check(100, {SIZES})
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        check(100, {SIZES})
        print("done")
    """
    assert _run(library, code, 2) == "done\n"


def test_neighbours_do_not_stop_it(library: Path) -> None:
    """With every core taken by somebody else, loops still end."""
    spin = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        assert _run(library, f"check(2000, {SIZES}); print('done')", 2, 120) == "done\n"
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def test_as_many_threads_as_are_asked_for(library: Path) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the system does not tell")
    for count in (1, 2, 5):
        code = "before = running(); check(1, [64]); print(running() - before)"
        assert _run(library, code, count) == f"{count - 1}\n"


def test_the_loader_of_tvm_leaves_them_in_place(library: Path) -> None:
    """The variable that generated code calls through is not one that the library shows."""
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=False)
    if symbols.returncode:
        pytest.skip("nm is not installed")
    assert "count_up" in symbols.stdout
    assert "TVMBackendParallelLaunch" not in symbols.stdout


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from relax_llm.errors import CompileError

    threads.threads_object.cache_clear()
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    with pytest.raises(CompileError, match=r"install g\+\+ or clang"):
        threads.threads_object()
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: sys.executable)
    with pytest.raises(CompileError, match=r"does not compile threads\.cpp"):
        threads.threads_object()
    monkeypatch.undo()
    assert threads.threads_object()[:4] == b"\x7fELF"
