"""Listings: every function of a library as its source, TVMScript, LLVM IR and assembly."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import tvm

import relax_llm as rl
from relax_llm.artifact.listings import Listings
from relax_llm.artifact.machine_code import MachineCode
from relax_llm.errors import ArtifactError, InputError
from tests.recording.conftest import DOWN, IDS

if TYPE_CHECKING:
    from pathlib import Path


def test_every_function_has_every_form(artifact: rl.Artifact) -> None:
    listings = artifact.listings
    assert set(listings.functions) == set(listings.index.parameters)
    assert set(artifact.manifest.kernels) <= set(listings.functions)
    for symbol in listings.functions:
        found = artifact.listing(symbol)
        assert f"def {symbol}(" in found.tir
        assert "define " in found.llvm
        assert "ret" in found.assembly


INLINED = """
define internal fastcc void @sum_compute_(ptr %x) {
  %0 = call i32 %launch(ptr @__tvm_parallel_lambda, ptr %x), !dbg !3
  ret void, !dbg !4
}

define private i32 @__tvm_parallel_lambda(ptr %x) {
    #dbg_value(ptr %x, !9, !DIExpression(), !5)
  ret i32 0, !dbg !5
}

define internal void @other(ptr %x) {
  ret void, !dbg !4
}

!1 = distinct !DISubprogram(name: "tiled__sum", scope: !0)
!2 = distinct !DISubprogram(name: "sum_compute_", scope: !0)
!3 = !DILocation(line: 0, scope: !6, inlinedAt: !4)
!4 = !DILocation(line: 0, scope: !2)
!5 = !DILocation(line: 0, scope: !1)
!6 = !DILexicalBlock(scope: !1, file: !0, line: 0)
"""


def test_a_kernel_that_was_inlined_is_found_by_where_its_instructions_come_from() -> None:
    code = MachineCode(INLINED)
    assert code.names("tiled__sum") == ["__tvm_parallel_lambda", "sum_compute_"]
    assert code.names("sum") == ["sum_compute_", "__tvm_parallel_lambda"]
    found = code.llvm("tiled__sum")
    assert found.startswith("; tiled__sum was inlined into sum_compute_.\ndefine private")
    assert "dbg" not in found
    assert code.llvm("nothing") == ""


def test_kernels_behind_a_dispatcher_have_code_of_their_own(artifact: rl.Artifact) -> None:
    site = "layers.0.self_attn.o_proj"
    tiled, blocked = (artifact.kernel(name, site=site) for name in ("tiled", "blocked"))
    assert tiled.llvm != blocked.llvm
    assert tiled.assembly != blocked.assembly
    whole = artifact.listing(tiled.symbol + "__open").llvm
    for kernel in (tiled, blocked):
        assert "@__tvm_parallel_lambda" in kernel.llvm
        assert "#dbg_" not in kernel.llvm
        assert ".cfi_" not in kernel.assembly
        assert kernel.llvm.split("define ", 2)[1] in whole


def test_assembly_is_that_of_the_library(artifact: rl.Artifact) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    name = "last_token_hidden24_compute_"
    symbols = _objdump("--syms", str(artifact.library))
    (row,) = (line.split() for line in symbols.splitlines() if line.endswith(f" {name}"))
    begin, size = int(row[0], 16), int(row[-2], 16)  # an address, flags, the section, a size, the name
    span = [f"--start-address={begin}", f"--stop-address={begin + size}"]
    body = _objdump("-d", "--no-show-raw-insn", *span, str(artifact.library))
    there = [line.split("\t")[1].split()[0] for line in body.splitlines() if line.count("\t") == 1]
    lines = [line.split() for line in artifact.listing("last_token_hidden24").assembly.splitlines()]
    ours = [
        words[0] for words in lines if words and not words[0].startswith(".") and not words[0].endswith(":")
    ]
    padding = ("nop", "nopl", "nopw", "xchg", "data16", "cs")
    assert ours
    assert [_plain(name) for name in there if name not in padding] == [_plain(name) for name in ours]


def _objdump(*arguments: str) -> str:
    return subprocess.run(["objdump", *arguments], capture_output=True, text=True, check=True).stdout


def _plain(instruction: str) -> str:
    """Without the letters for the operands' width, which not every disassembler writes."""
    return instruction.rstrip("lqwb")


def test_sources(artifact: rl.Artifact) -> None:
    mine = artifact.kernel("few_rows").source
    assert mine is not None
    assert (mine.language, mine.file, mine.files) == (
        "c",
        "few_rows.c",
        {"sizes.h": "typedef int64_t Size;\n"},
    )
    assert "void few_rows(" in mine.text
    assert "-DN=24" in mine.flags
    shipped = artifact.kernel("streaming").source
    assert shipped is not None
    assert shipped.file.startswith("relax_llm/kernels/")
    assert shipped.text.startswith("def ")
    assert artifact.kernel(site=DOWN).source is None


def test_launches_have_listings(runner: rl.Runner) -> None:
    with runner.steps("prefill", runner.start(), IDS) as steps:
        launch = steps.run_until(site=DOWN)
        assert launch is not None
        assert launch.source == runner.artifact.kernel("few_rows").source
        assert "few_rows" in launch.tir
        assert launch.llvm
        assert "few_rows" in launch.assembly


def test_tvmscript_is_read_back(artifact: rl.Artifact) -> None:
    """Vectors of three, intrinsics, C, and what it follows; repros do the same with micro-kernels."""
    listings = artifact.listings
    alone = [name for name in artifact.manifest.kernels if name not in artifact.manifest.dispatchers]
    roots = [*alone, artifact.kernel("any_rows").listing.symbol]
    names = list(dict.fromkeys(name for root in roots for name in listings.reached(root)))
    module = tvm.script.from_source(listings.module(names).partition("tirx as T\n")[2])
    assert {var.name_hint for var in module.get_global_vars()} == set(names)


def test_no_compiler_is_imported_for_assembly(artifact: rl.Artifact) -> None:
    code = (
        "import sys, relax_llm as rl\n"
        f"found = rl.load({str(artifact.path)!r}).listing('last_token_hidden24')\n"
        "print(bool(found.tir and found.llvm and found.assembly), 'tvm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_what_is_not_there_is_refused(artifact: rl.Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no function 'last_token'; it has .* last_token_hidden24"):
        artifact.listing("last_token")
    files = {name: file for name, file in artifact.manifest.files.items() if name != "listings.zip"}
    older = rl.Artifact(artifact.path, replace(artifact.manifest, files=files))
    with pytest.raises(ArtifactError, match="no listings"):
        older.listing("last_token_hidden24")
    assert older.kernel("any_rows")(*older.kernel("any_rows").random(M=2)).any()
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4")
    with pytest.raises(ArtifactError, match="compile the artifact again"):
        Listings(tmp_path / "bad.zip")["x"]
