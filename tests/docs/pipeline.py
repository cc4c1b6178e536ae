"""What docs/pipeline.md takes from the passes' docstrings; `python -m tests.docs.pipeline` writes it anew."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import TYPE_CHECKING

from relax_llm.compiler.pipeline import name_of, pipeline
from tests.docs.markdown import ROOT

if TYPE_CHECKING:
    from relax_llm.compiler.pipeline import Entry

DOCUMENT = ROOT / "docs" / "pipeline.md"
BEGIN, END = "<!-- written by `python -m tests.docs.pipeline` -->\n", "<!-- end -->\n"

TVM = {
    "LegalizeOps": "Operators that no kernel of ours serves become plain loops.",
    "AnnotateTIROpPattern": "Says of each loop nest whether it is elementwise, a reduction, ...: what fusion goes by.",
    "FuseOps": "Groups neighbouring loop nests.",
    "FuseTIR": "Makes one function of each group.",
    "ToNonDataflow": "Dataflow blocks become ordinary bindings.",
    "RemovePurityChecking": "Calls of impure functions need no wrapping any more.",
    "CallTIRRewrite": "Outputs are allocated explicitly; a launch becomes a call that writes into them.",
    "StaticPlanBlockMemory": "Tensors whose lives do not overlap share memory.",
    "LowerAllocTensor": "A tensor is a view of a storage object.",
    "LowerRuntimeBuiltin": "What is left of Relax's own operators becomes calls of the virtual machine's.",
    "ComputePrimValue": "Arithmetic on sizes becomes functions of its own.",
    "VMShapeLower": "Symbolic sizes are read from the arguments, checked, and kept in a small table.",
    "CheckOnce": "Ours: weights and caches were checked when they were made, and are not compared again in every call.",
    "ShareValues": "Ours: a shape, or a tensor over a place of planned memory, is made once, and not in every layer.",
    "AttachGlobalSymbol": "Functions get the names they are called by.",
    "HideInternal": "Ours: kernels that only a dispatcher calls lose theirs.",
}
"""TVM's own passes, each in a sentence."""


def generated() -> str:
    """Both lists of passes as Markdown."""
    to_launches, to_instructions = pipeline().parts()
    ours = [_section(number, step) for number, step in enumerate(to_launches, 1)]
    theirs = [f"| `{name}` | {TVM[name]} |\n" for name in to_instructions.names()]
    table = "".join(["| pass | what it does |\n|---|---|\n", *theirs])
    return "\n".join(["## From operators to launches\n", *ours, "## From launches to instructions\n", table])


def written() -> str:
    """What the document says in this place."""
    _, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    return rest.partition(END)[0]


def _section(number: int, step: Entry) -> str:
    name = name_of(step)
    if name in TVM:
        return f"### {number}. {name} (TVM's)\n\n{TVM[name]}\n"
    kind = getattr(step, "kind", None)
    assert isinstance(kind, type), name
    file = inspect.getfile(kind)
    link = f"../relax_llm/{file.rpartition('/relax_llm/')[2]}"
    return f"### {number}. [{name}]({link})\n\n{_markdown(inspect.getdoc(kind) or '')}"


def _markdown(docstring: str) -> str:
    """A docstring's text, its indented blocks fenced; without the list of attributes."""
    text = docstring.partition("\nAttributes:\n")[0].strip() + "\n"
    fenced = re.sub(
        r"^(.*)::\n\n((?:(?: {4}.*)?\n)+)",
        lambda found: f"{found[1]}:\n\n```tvmscript\n{textwrap.dedent(found[2]).strip()}\n```\n\n",
        text,
        flags=re.MULTILINE,
    )
    return fenced.rstrip() + "\n"


if __name__ == "__main__":
    source = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(source.replace(BEGIN + written() + END, BEGIN + generated() + END), encoding="utf-8")
