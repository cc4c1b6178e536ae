# mypy: disable-error-code="no-untyped-def, untyped-decorator, valid-type"
"""The target cuda: kernels scheduled for a GPU, their source to read, and a plain refusal to run them here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tvm.script import tirx as T

import relax_llm as rl
from relax_llm.cli import main
from relax_llm.errors import ArtifactError, CompileError, KernelError, PlanError
from relax_llm.plan.plan import Range
from relax_llm.plan.sizes import Box

from ..artifact.checkpoints import GPT2, LLAMA, write
from ..door.kernels import in_c, in_script

if TYPE_CHECKING:
    from pathlib import Path

    from relax_llm.kernels.matmul import Matmul

NVCC = shutil.which("nvcc")
EPILOGUES = ("bias", "activation", "gate", "residual")


def schedule_rows(schedule: Any, problem: Matmul) -> None:
    """A block of threads for each row."""
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        row, column, *_ = schedule.get_loops(block)
        outer, inner = schedule.split(column, [None, 64])
        schedule.bind(row, "blockIdx.y")
        schedule.bind(outer, "blockIdx.x")
        schedule.bind(inner, "threadIdx.x")


def by_column(problem: Matmul) -> Any:
    """TVMScript whose loops are bound to threads."""
    if problem.bias or problem.activation or problem.gated or problem.residual:
        raise rl.Declined("takes products alone")
    n, k = problem.n, problem.k

    @T.prim_func(s_tir=True)
    def kernel(x_handle: T.handle, weight: T.Buffer((n, k), "float32"), out_handle: T.handle):
        M = T.int64()
        x = T.match_buffer(x_handle, (M, k), "float32")
        out = T.match_buffer(out_handle, (M, n), "float32")
        for i in T.thread_binding(M, thread="blockIdx.x"):
            for j in T.thread_binding(n, thread="threadIdx.x"):
                out[i, j] = T.float32(0)
                for r in T.serial(k):
                    out[i, j] = out[i, j] + x[i, r] * weight[j, r]

    return kernel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cuda") / "tiny", LLAMA)


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> rl.Artifact:
    """With kernels of a user's: one schedule for all down projections, TVMScript where there is a product alone."""
    kernels = [
        rl.kernel("matmul", name="by_rows", absorbs=EPILOGUES, sites="layers.*.mlp.down_proj")(schedule_rows),
        rl.kernel("matmul", name="by_column")(by_column),
    ]
    output = tmp_path_factory.mktemp("cuda") / "out"
    return rl.compile(checkpoint, target="cuda", kernels=kernels, output=output)


def source(artifact: rl.Artifact) -> str:
    return (artifact.path / "kernels.cu").read_text()


def functions(text: str) -> dict[str, str]:
    """The bodies of the functions that a host launches, by name."""
    found = re.findall(r"__global__ void __launch_bounds__\(\d+\) (\w+)\([^)]*\) \{\n(.*?)\n\}", text, re.S)
    return dict(found)


def assert_compiles(text: str, directory: Path) -> None:
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    (directory / "kernels.cu").write_text(text)
    command = [NVCC, "-w", "-arch=sm_80", "-cubin", "-o", "kernels.cubin", "kernels.cu"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (directory / "kernels.cubin").read_bytes()[:4] == b"\x7fELF"


def test_every_launched_kernel_is_in_the_source(made: rl.Artifact) -> None:
    names = functions(source(made)).keys()
    launched = {launch.kernel for calls in made.manifest.functions.values() for launch in calls}
    assert {"decode", "prefill"} <= made.manifest.functions.keys()
    for kernel in launched:
        assert any(re.fullmatch(rf"{kernel}_kernel(_\d+)?", name) for name in names), kernel


def test_the_users_kernels_are_in_it(made: rl.Artifact) -> None:
    bodies = functions(source(made))
    (down,) = (entry for entry in made.plan.entries if "layers.0.mlp.down_proj" in entry.sites)
    assert [part.kernel for part in down.ranges] == ["by_rows"]
    assert "blockIdx.y" in bodies[f"{down.problem}__by_rows_kernel"]
    (head,) = (
        entry
        for entry in made.plan.entries
        if "embed_tokens" in "".join(entry.sites) and entry.operator == "matmul"
    )
    assert [part.kernel for part in head.ranges] == ["by_column"]
    reasons = {candidate.kernel: candidate.reason for candidate in head.candidates}
    assert "not checked: made for another processor" in reasons["by_column"]
    assert "on a GPU one serves all sizes" in reasons["dlight"]
    others = [entry for entry in made.plan.entries if entry not in (down, head)]
    assert {part.kernel for entry in others for part in entry.ranges} == {"dlight"}


def test_nvcc_compiles_it(made: rl.Artifact, tmp_path: Path) -> None:
    assert_compiles(source(made), tmp_path)


def test_gpt2(tmp_path: Path) -> None:
    made = rl.compile(write(tmp_path / "tiny", GPT2), target="cuda", output=tmp_path / "out")
    assert functions(source(made))
    assert not made.manifest.dispatchers
    assert_compiles(source(made), tmp_path)


def test_weights_are_stored_once(made: rl.Artifact) -> None:
    """The embedding and the head share a table, which no kernel wants packed."""
    tables = [weight for weight in made.manifest.weights if "embed_tokens" in weight.name]
    assert [weight.shape for weight in tables] == [(37, 24)]


def test_running_takes_a_gpu(made: rl.Artifact) -> None:
    assert any("GPU" in note and "cannot run here" in note for note in made.manifest.notes)
    with pytest.raises(
        ArtifactError, match=r"compiled for cuda and cannot run here: that takes an NVIDIA GPU"
    ):
        rl.load(made.path)
    with pytest.raises(ArtifactError, match=r"NVIDIA GPU.*`Runner` runs on processors.*kernels\.cu"):
        rl.Runner(made)


def test_inspect_shows_the_source(
    made: rl.Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(made.path), "--cuda"]) == 0
    assert capsys.readouterr().out == source(made)
    manifest = json.loads((made.path / "manifest.json").read_text())
    del manifest["files"]["kernels.cu"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(tmp_path), "--cuda"]) != 0
    assert "has no CUDA source" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (in_c(), r"'in_c' is C, which does not run on a GPU"),
        (in_script(), r"'in_script' binds no loop to threads for matmul_"),
        (rl.kernel("matmul", m=(1, 8), name="few")(by_column), r"'few' is valid for .*8.*every size"),
        (rl.kernel("matmul", layout="tiled", name="packed")(by_column), r"'packed' reads the tiled layout"),
    ],
)
def test_what_no_gpu_can_launch_is_refused(
    checkpoint: Path, kernel: rl.Kernel, said: str, tmp_path: Path
) -> None:
    with pytest.raises(KernelError, match=said):
        rl.compile(checkpoint, target="cuda", kernels=[kernel], output=tmp_path / "out")


def test_other_weights_are_refused(checkpoint: Path) -> None:
    with pytest.raises(CompileError, match="cuda read weights as f32, not bf16"):
        rl.compile(checkpoint, target="cuda", weights="bf16")


def test_a_plan_cannot_divide_sizes(made: rl.Artifact, checkpoint: Path, tmp_path: Path) -> None:
    entries = [
        replace(entry, ranges=(Range(Box.of(M=(1, 8)), "dlight"), Range(Box.of(M=(9, None)), "by_column")))
        for entry in made.plan.entries
        if entry.operator == "matmul" and "by_column" in {part.kernel for part in entry.ranges}
    ]
    kernel = rl.kernel("matmul", name="by_column")(by_column)
    with pytest.raises(PlanError, match="one kernel serves all sizes"):
        rl.compile(
            checkpoint,
            target="cuda",
            kernels=[kernel],
            plan=replace(made.plan, entries=tuple(entries)),
            output=tmp_path / "out",
        )
