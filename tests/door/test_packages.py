"""Kernels of installed packages, found by their entry points."""

from pathlib import Path

import pytest

from relax_llm.compiler.planner import Planner
from relax_llm.compiler.user_kernels import gather
from relax_llm.errors import KernelError
from relax_llm.kernels.machine import machine
from relax_llm.kernels.matmul import Matmul
from tests.door.kernels import in_script
from tests.machines import PLAINER

MODULE = """
from tests.door.kernels import in_script

packaged = in_script()
number = 7
"""


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, *points: str) -> None:
    """A package "fast-kernels" with these entry points, as pip would leave it."""
    (directory / "fast_kernels.py").write_text(MODULE)
    info = directory / "fast_kernels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fast-kernels\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[relax_llm.kernels]\n" + "\n".join(points) + "\n")
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(__import__("sys").modules, "fast_kernels", raising=False)


def test_a_packaged_kernel_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "packaged = fast_kernels:packaged")
    (kernel,) = gather([])
    assert kernel.package == "fast-kernels"
    problem = Matmul(48, 32)
    planner = Planner(machine(PLAINER), [kernel], check=lambda realized, machine: "not tried")
    assert kernel.name in planner.choose(problem, "layers.0.mlp.down_proj").realized


def test_a_clash_of_names_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "packaged = fast_kernels:packaged")
    with pytest.raises(KernelError, match=r"'in_script', one from .* and one from the package fast-kernels"):
        gather([in_script()])


def test_what_is_no_kernel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "number = fast_kernels:number")
    with pytest.raises(KernelError, match=r"entry point 'number' of relax_llm\.kernels is 7, not a kernel"):
        gather([])


def test_one_for_processors_does_not_stop_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "packaged = fast_kernels:packaged")
    planner = Planner(machine("cuda"), gather([]))
    planner.choose(Matmul(48, 32), "layers.0.mlp.down_proj")
    (entry,) = planner.plan().entries
    (said,) = [candidate.reason for candidate in entry.candidates if candidate.kernel == "in_script"]
    assert "is no kernel for a GPU" in said
    assert "binds no loop to threads" in said
