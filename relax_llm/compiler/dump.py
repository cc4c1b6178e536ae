"""`--dump-ir`: the module after every pass, as files that can be read, and what each pass changed."""

import html
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

from tvm import IRModule

from relax_llm.errors import CompileError

INDEX = "index.html"
_MARK = "<!-- relax-llm: the module after every pass -->"
_OURS = re.compile(r"\d\d_\w+\.(py|diff)")
_FUNCTION = re.compile(r"    def (\w+)\(")
_MESSAGE = re.compile(r'(R\.str\("ErrorContext\([^"\\]{1,120})[^"\\]*(?:\\.[^"\\]*)*')
"""What a check of an argument would say; TVM repeats the types of all weights in each of thousands."""

_CONTEXT = 3
_WIDEST = 400

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em; max-width: 110em; color: #222; background: #fff; }
table { border-collapse: collapse; } td, th { padding: .15em 1em .15em 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
details { margin: .6em 0; } summary { cursor: pointer; font-weight: 600; }
pre { font: 12px/1.4 ui-monospace, monospace; overflow-x: auto; background: #f7f7f7; padding: .6em; }
ins, .plus { color: #116329; text-decoration: none; } ins { background: #dafbe1; }
del, .minus { color: #82071e; text-decoration: none; } del { background: #ffebe9; }
b { color: #0550ae; font-weight: 600; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #111; } pre { background: #1b1b1b; }
  ins { background: #12361d; } del { background: #471a1d; } ins, .plus { color: #7ee08f; }
  del, .minus { color: #ff9b94; } b { color: #79b8ff; } a { color: #79b8ff; }
}
"""


@dataclass(frozen=True)
class Change:
    """What one pass did to the text of a module.

    Attributes:
        lines: A unified diff, without the names of the files.
        added: How many lines came.
        removed: How many went.
        functions: The functions that differ, in the order of the text.
    """

    lines: tuple[str, ...]
    added: int
    removed: int
    functions: tuple[str, ...]


@dataclass
class Dump:
    """Writes modules as they come, and at the end what lies between them.

    Attributes:
        directory: Where to.
        stages: What has come so far: the name of a file, without suffix, and its lines.
    """

    directory: Path
    stages: list[tuple[str, list[str]]] = field(default_factory=list)

    def __call__(self, name: str, mod: IRModule) -> None:
        """Write one module: `00_export.py`, `01_CombineProjections.py`, ..."""
        # Large constants are only named by TVMScript.
        text = _MESSAGE.sub(r"\1 ...", str(mod.script())) + "\n"
        stem = f"{len(self.stages):02}_{re.sub(r'[^0-9A-Za-z_]+', '', name) or 'pass'}"
        self.stages.append((stem, text.splitlines()))
        (self.directory / f"{stem}.py").write_text(text, encoding="utf-8")

    def finish(self, failure: str = "") -> None:
        """Write a diff for each pass, and a page with all of them.

        Args:
            failure: What ended the compilation early, if something did.
        """
        changes = []
        for (old, before), (new, after) in zip(self.stages, self.stages[1:], strict=False):
            found = difference(before, after)
            text = "\n".join([f"--- {old}.py", f"+++ {new}.py", *found.lines, ""])
            (self.directory / f"{new}.diff").write_text(text, encoding="utf-8")
            changes.append(found)
        stems = [stem for stem, _ in self.stages]
        (self.directory / INDEX).write_text(_page(stems, changes, failure), encoding="utf-8")


@contextmanager
def dumping(
    directory: str | os.PathLike[str] | None, traced: IRModule
) -> Iterator[Callable[[str, IRModule], None]]:
    """Write the module as traced, then those that what is given is called with; where a pass fails, those before it.

    Args:
        directory: Where to, or None to write nothing.
        traced: What the first pass gets.

    Raises:
        CompileError: The directory holds something else, or cannot be written.
    """
    if directory is None:
        yield lambda *_: None
        return
    dump = start(directory)
    dump("export", traced)
    failure = ""
    try:
        yield dump
    except BaseException as error:
        failure = str(error) or type(error).__name__
        raise
    finally:
        dump.finish(failure)


def start(directory: str | os.PathLike[str]) -> Dump:
    """Begin a dump in a new or empty directory, or in place of an earlier dump.

    Raises:
        CompileError: The directory holds something else, or cannot be written.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        index = path / INDEX
        earlier = index.is_file() and _MARK in index.read_text(encoding="utf-8", errors="replace")
        found = sorted(path.iterdir())
        other = [file for file in found if not (earlier and (file == index or _OURS.fullmatch(file.name)))]
        if other:
            raise CompileError(
                f"{path} holds {other[0].name}, which is no part of a dump; choose another or an empty directory."
            )
        for file in found:
            file.unlink()
        index.write_text(_page([], [], "It was interrupted."), encoding="utf-8")
    except OSError as error:
        raise CompileError(f"{path} cannot take the IR: {error.strerror or error}.") from error
    return Dump(path)


def difference(before: list[str], after: list[str]) -> Change:
    """What differs between two modules in TVMScript.

    Functions are matched by name: a pass that replaces one of hundreds costs the comparison of one.
    """
    old, new = _functions(before), _functions(after)
    edits: list[_Edit] = []
    names: list[str] = []

    def compare(name: str, a: tuple[int, int], b: tuple[int, int]) -> None:
        same = before[slice(*a)] == after[slice(*b)]
        names.extend([] if same else [name])
        edits.extend([(True, *a, *b)] if same else _edits(before, after, a, b))

    here = there = 0  # where the last function ended, before and after
    for kind, i, j, k, n in SequenceMatcher(None, list(old), list(new), autojunk=False).get_opcodes():
        if kind == "equal":
            for name in list(old)[i:j]:
                compare(name, old[name], new[name])
                here, there = old[name][1], new[name][1]
            continue
        for name in list(old)[i:j]:
            compare(name, old[name], (there, there))
            here = old[name][1]
        for name in list(new)[k:n]:
            compare(name, (here, here), new[name])
            there = new[name][1]
    lines = list(_unified(before, after, edits))
    added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    return Change(tuple(lines), added, removed, tuple(names))


_Edit = tuple[bool, int, int, int, int]
"""Whether lines are equal, their first and last before, and after."""


def _edits(before: list[str], after: list[str], a: tuple[int, int], b: tuple[int, int]) -> Iterator[_Edit]:
    old, new = before[slice(*a)], after[slice(*b)]
    for kind, i, j, k, n in SequenceMatcher(None, old, new, autojunk=len(old) + len(new) > 500).get_opcodes():
        yield kind == "equal", a[0] + i, a[0] + j, b[0] + k, b[0] + n


def _unified(before: list[str], after: list[str], edits: list[_Edit]) -> Iterator[str]:
    """Edits that cover both texts as hunks, with lines around them."""
    changes = [edit[1:] for edit in edits if not edit[0]]
    while changes:
        count = 1  # changes with less than two contexts between them share a hunk
        while count < len(changes) and changes[count][0] - changes[count - 1][1] <= 2 * _CONTEXT:
            count += 1
        hunk, changes = changes[:count], changes[count:]
        lead = min(_CONTEXT, hunk[0][0])
        trail = min(_CONTEXT, len(before) - hunk[-1][1])
        old = _span(hunk[0][0] - lead, hunk[-1][1] + trail)
        new = _span(hunk[0][2] - lead, hunk[-1][3] + trail)
        yield f"@@ -{old} +{new} @@"
        at = hunk[0][0] - lead
        for i, j, k, n in hunk:
            yield from (f" {line}" for line in before[at:i])
            yield from (f"-{line}" for line in before[i:j])
            yield from (f"+{line}" for line in after[k:n])
            at = j
        yield from (f" {line}" for line in before[at : at + trail])


def _span(first: int, last: int) -> str:
    """Lines as a unified diff counts them: from 1, and an empty span by the line before it."""
    return f"{first + (last > first)},{last - first}"


def _functions(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Where each function of a module begins and ends; what stands before the first one has no name."""
    starts = [index for index, line in enumerate(lines) if line.startswith("    @")]
    found = {"": (0, starts[0] if starts else len(lines))}
    for begin, end in zip(starts, [*starts, len(lines)][1:], strict=True):
        head = next((match for line in lines[begin:end] if (match := _FUNCTION.match(line))), None)
        found[head[1] if head else f"line {begin + 1}"] = (begin, end)
    return found


def _page(stems: list[str], changes: list[Change], failure: str) -> str:
    rows, parts = [], []
    for number, stem in enumerate(stems):
        link = f'<a href="{stem}.py">{stem}.py</a>'
        if number == 0:
            rows.append(
                f'<tr><td>{link}</td><td class="n"></td><td class="n"></td><td>the model as traced</td></tr>'
            )
            continue
        change = changes[number - 1]
        names = ", ".join(change.functions[:4]) + (
            f" and {len(change.functions) - 4} more" * (len(change.functions) > 4)
        )
        rows.append(
            f'<tr><td>{link}</td><td class="n plus">+{change.added}</td><td class="n minus">-{change.removed}</td>'
            f"<td>{html.escape(names) or 'nothing changes'}</td></tr>"
        )
        if change.lines:
            parts.append(
                f'<details><summary id="{stem}">{stem} <span class="plus">+{change.added}</span> '
                f'<span class="minus">-{change.removed}</span></summary>\n'
                f'<p><a href="{stem}.diff">{stem}.diff</a></p>\n<pre>{_coloured(change.lines)}</pre></details>'
            )
    note = f"<p><strong>The compilation did not end.</strong> {html.escape(failure)}</p>" if failure else ""
    return "\n".join(
        [
            "<!doctype html>",
            _MARK,
            '<html lang="en"><meta charset="utf-8"><title>The module after every pass</title>',
            f"<style>{_STYLE}</style>",
            "<h1>The module after every pass</h1>",
            note,
            "<table><tr><th>module</th><th>lines</th><th></th><th>functions that change</th></tr>",
            *rows,
            "</table>",
            "<h2>What each pass changes</h2>",
            *parts,
            "</html>\n",
        ]
    )


def _coloured(lines: tuple[str, ...]) -> str:
    tags = {"+": "ins", "-": "del", "@": "b"}
    found = []
    for line in lines:
        tag = tags.get(line[0])
        cut = f"{line[:_WIDEST]} ... {len(line) - _WIDEST} more" if len(line) > _WIDEST else line
        text = html.escape(cut, quote=False)
        found.append(f"<{tag}>{text}</{tag}>" if tag else text)
    return "\n".join(found)
