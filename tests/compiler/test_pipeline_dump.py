"""`dump_ir`: every module is written, what lies between two of them is a diff that leads from one to the other."""

from __future__ import annotations

import ast
import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import relax_llm as rl
from relax_llm import cpu
from relax_llm.cli import main
from relax_llm.compiler.dump import difference, dumping
from relax_llm.errors import CompileError

from ..artifact.checkpoints import LLAMA, write
from . import passes_of_a_user as users
from .modules import stages

if TYPE_CHECKING:
    from collections.abc import Callable


PLAIN = "x86-64" if cpu.architecture() == "x86_64" else None
"""Its kernels are quick to generate."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dump") / "tiny", LLAMA)


@pytest.fixture(scope="module")
def dump(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of a compilation that the cache could have answered."""
    rl.compile(checkpoint, target=PLAIN)
    directory = tmp_path_factory.mktemp("dump") / "ir"
    rl.compile(checkpoint, target=PLAIN, dump_ir=directory)
    return directory


def test_every_pass_has_a_module_and_a_diff(dump: Path) -> None:
    names = [name for name in rl.pipeline().names() if name != "Launches"]
    stems = ["00_export", *(f"{number:02}_{name}" for number, name in enumerate(names, 1))]
    found = sorted(path.name for path in dump.iterdir())
    assert found == sorted([*(f"{s}.py" for s in stems), *(f"{s}.diff" for s in stems[1:]), "index.html"])


def test_modules_are_python_with_the_model_s_functions(dump: Path) -> None:
    for path in dump.glob("*.py"):
        (module,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
        names = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        assert names >= {"prefill", "decode", "logits", "hidden"}, path.name


def _apply(lines: list[str], diff: str) -> list[str]:
    """What a unified diff makes of lines; a reader of our own, which checks every line that the diff claims."""
    result: list[str] = []
    at = 0
    for line in diff.splitlines()[2:]:
        if heading := re.fullmatch(r"@@ -(\d+),(\d+) \+(\d+),(\d+) @@", line):
            start, count, new, _ = map(int, heading.groups())
            start -= count > 0
            result += lines[at:start]
            at = start
            assert len(result) == new - (int(heading[4]) > 0)
            continue
        if line[0] in " -":
            assert lines[at] == line[1:]
            at += 1
        if line[0] in " +":
            result.append(line[1:])
    return result + lines[at:]


def test_diffs_lead_from_each_module_to_the_next(dump: Path) -> None:
    modules = sorted(dump.glob("*.py"))
    assert len(modules) > 20
    for before, after in itertools.zip_longest(modules[:-1], modules[1:]):
        diff = after.with_suffix(".diff").read_text()
        assert diff.splitlines()[:2] == [f"--- {before.name}", f"+++ {after.name}"]
        assert _apply(before.read_text().splitlines(), diff) == after.read_text().splitlines(), after.name


@pytest.mark.skipif(shutil.which("patch") is None, reason="patch is not installed")
def test_diffs_are_what_patch_reads(dump: Path, tmp_path: Path) -> None:
    copied = shutil.copyfile(dump / "04_Legalize.py", tmp_path / "module.py")
    diff = dump / "06_SelectKernels.diff"
    subprocess.run(["patch", "-s", str(copied), str(diff)], check=True)
    assert copied.read_text() == (dump / "06_SelectKernels.py").read_text()


class _Page(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img"), tag
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_counts_lines(dump: Path) -> None:
    source = (dump / "index.html").read_text()
    page = _Page()
    page.feed(source)
    assert page.links
    assert all((dump / link).is_file() for link in page.links)
    changed = [
        path.stem for path in dump.glob("*.diff") if re.search("SelectKernels|CallTIRRewrite", path.stem)
    ]
    assert len(changed) == 2
    for stem in changed:
        diff = (dump / f"{stem}.diff").read_text().splitlines()[2:]
        added, removed = (sum(line.startswith(sign) for line in diff) for sign in "+-")
        assert (
            f'{stem}.py</a></td><td class="n plus">+{added}</td><td class="n minus">-{removed}</td>' in source
        )
    assert "nothing changes" in page.text
    assert "did not end" not in page.text
    assert "R.call_tir(cls.matmul_" in page.text


def test_a_dump_replaces_a_dump_and_nothing_else(tmp_path: Path, checkpoint: Path) -> None:
    with dumping(tmp_path / "ir", stages("llama")[0][1]) as write_module:
        write_module("first", stages("llama")[1][1])
    assert (tmp_path / "ir" / "01_first.py").is_file()
    with dumping(tmp_path / "ir", stages("llama")[0][1]) as write_module:
        write_module("<lambda>", stages("llama")[1][1])
    found = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert found == ["00_export.py", "01_lambda.diff", "01_lambda.py", "index.html"]
    (tmp_path / "ir" / "thesis.py").write_text("years of work")
    with pytest.raises(CompileError, match=r"holds thesis\.py, which is no part of a dump"):
        rl.compile(checkpoint, dump_ir=tmp_path / "ir")
    assert (tmp_path / "ir" / "thesis.py").read_text() == "years of work"
    with pytest.raises(CompileError, match=r"cannot take the IR: (Not a directory|File exists)"):
        rl.compile(checkpoint, dump_ir=tmp_path / "ir" / "thesis.py")


def test_where_a_pass_fails_the_modules_before_it_are_there(tmp_path: Path, checkpoint: Path) -> None:
    passes = rl.pipeline()
    passes.insert_after("FuseMatmul", users.divides_by_zero)
    with pytest.raises(CompileError, match="divides_by_zero"):
        rl.compile(checkpoint, pipeline=passes, dump_ir=tmp_path / "ir")
    assert sorted(path.name for path in (tmp_path / "ir").glob("*.py")) == [
        "00_export.py",
        "01_HoistLastToken.py",
        "02_CombineProjections.py",
        "03_FuseMatmul.py",
    ]
    assert (
        "did not end.</strong> The pass divides_by_zero fails" in (tmp_path / "ir" / "index.html").read_text()
    )


def test_the_command_line_says_where_to_look(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-o", str(tmp_path / "out"), "--dump-ir", str(tmp_path / "ir")]
    options += ["--target", PLAIN] if PLAIN else []
    code = main(["compile", str(checkpoint), *options])
    assert code == 0
    assert f"What each pass changed: {tmp_path / 'ir' / 'index.html'}" in re.sub(
        r"\s*\n", "", capsys.readouterr().err
    )
    assert len(list((tmp_path / "ir").glob("*_HideInternal.py"))) == 1


def _module(*functions: str) -> list[str]:
    return ["class Module:", *(line for f in functions for line in (f"    @R.function\n{f}").splitlines())]


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        (["    def a():", "    def b():"], ["    def a():", "    def b():"], ()),
        (["    def a():", "    def b():"], ["    def b():"], ("a",)),
        (["    def b():"], ["    def a():", "    def b():", "    def c():"], ("a", "c")),
        (["    def a():", "    def b():"], ["    def c():", "    def b():\n        x = 1"], ("a", "c", "b")),
        ([], ["    def a():"], ("a",)),
        (["    def a():"], [], ("a",)),
        (["    def a():", "    def b():"], ["    def b():", "    def a():"], ("b", "b")),
    ],
    ids=["same", "gone", "new", "both", "from nothing", "to nothing", "moved"],
)
def test_functions_are_compared_by_name(
    before: list[str], after: list[str], changed: tuple[str, ...]
) -> None:
    old, new = _module(*before), _module(*after)
    found = difference(old, new)
    assert found.functions == changed
    assert _apply(old, "\n".join(["---", "+++", *found.lines])) == new


def test_changes_far_apart_are_hunks_of_their_own() -> None:
    old = [f"line {number}" for number in range(100)]
    new = [line if index not in (3, 50, 55, 99) else "other" for index, line in enumerate(old)]
    found = difference(old, new)
    headings = [line for line in found.lines if line.startswith("@@")]
    assert headings == ["@@ -1,7 +1,7 @@", "@@ -48,12 +48,12 @@", "@@ -97,4 +97,4 @@"]
    assert (found.added, found.removed) == (4, 4)
    assert _apply(old, "\n".join(["---", "+++", *found.lines])) == new


def test_long_messages_are_cut_and_nothing_else(tmp_path: Path) -> None:
    from relax_llm.compiler.dump import Dump

    class Spoken:
        def script(self) -> str:
            quoted = r"a \"quoted\" word " * 30
            return f'R.call("f", R.str("ErrorContext(fn=decode, {quoted})"), R.str("{quoted}"))'

    run: Callable[..., None] = Dump(tmp_path)
    run("cut", Spoken())
    text = (tmp_path / "00_cut.py").read_text()
    assert re.match(r'R\.call\("f", R\.str\("ErrorContext\(fn=decode, a  ?\.\.\."\), R\.str\("a \\"', text)
    assert text.endswith(r'\"quoted\" word "))' + "\n")
