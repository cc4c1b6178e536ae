"""Every example of the documentation runs, as it stands, and prints what stands under it.

A document's examples run in order in a folder of their own, where `path/to/checkpoint` is SmolLM2. Python blocks share
their variables; one that begins with `# name.py` is written to a file of this name. Shell blocks run in bash. Where a
text block follows at once, it is the output, `...` standing for anything.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.docs.markdown import DOCUMENTS, ROOT, Block, blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_RUN = {
    "make demo": "makes an environment and fills it from the network",
    "make lint                        # format, lint, types, import contracts": "is what runs these tests",
    "make test": "is what runs these tests",
    "pip install .": "changes the environment that the tests run in",
    'pip install "relax-llm[hf] @ ."': "changes the environment that the tests run in",
    "relax-llm chat": "waits for a person",
    'relax-llm step path/to/checkpoint --prompt "The capital of France is"': "fills the screen",
    "python -m benchmarks.llm         # a whole model, beside llama.cpp, OpenVINO, PyTorch, ...": (
        "takes minutes, and measures a quiet machine"
    ),
}
"""First lines of blocks that are not run, and why."""

_FILE = re.compile(r"# (\w+\.py)\n")

WITH_EXAMPLES = [
    path for path in DOCUMENTS if any(block.language in ("python", "sh") for block in blocks(path))
]


@pytest.fixture
def folder(tmp_path: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a checkpoint, as the reader's is meant to be."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "checkpoint").symlink_to(smollm2_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.model
@pytest.mark.parametrize("document", WITH_EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples(document: Path, folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(document):
        if block.language not in ("python", "sh") or block.text.splitlines()[0] in NOT_RUN:
            continue
        named = _FILE.match(block.text)
        if block.language == "sh":
            printed = _shell(block)
        elif named:
            (folder / named[1]).write_text(block.text, encoding="utf-8")
            printed = ""
        else:
            printed = _python(block, namespace)
        if block.output is not None:
            assert _agree(printed, block.output), f"{block} prints:\n{printed}\nand not:\n{block.output}"


def test_what_is_not_run_is_there() -> None:
    lines = {
        block.text.splitlines()[0]
        for path in DOCUMENTS
        for block in blocks(path)
        if block.language in ("python", "sh")
    }
    assert set(NOT_RUN) <= lines


def _python(block: Block, namespace: dict[str, Any]) -> str:
    # Empty lines in front, so that a traceback shows the line of the document.
    code = compile("\n" * (block.line - 1) + block.text, str(block.document), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def _shell(block: Block) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{block} fails with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def _agree(printed: str, expected: str) -> bool:
    parts = [re.escape(part) for part in _plain(expected).split("...")]
    return re.fullmatch(".*".join(parts), _plain(printed), re.DOTALL) is not None


def _plain(text: str) -> str:
    """Without spaces at the end of lines, and without empty lines around."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
