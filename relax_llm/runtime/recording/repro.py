"""A recorded launch as a directory that anyone with TVM can run: the kernel, its tensors, and some lines of Python."""

import ast
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
import numpy.typing as npt

from relax_llm.artifact.artifact import Artifact
from relax_llm.artifact.listings import COMPILERS, Listings, Source
from relax_llm.errors import RecordingError
from relax_llm.plan.python_kernel import PREFIX
from relax_llm.runtime.dispatch import CHOOSE, OPEN
from relax_llm.runtime.recording.replay import RecordedLaunch

Array = npt.NDArray[Any]

SCRIPT, KERNEL = "repro.py", "kernel.py"

_TEMPLATE = '''\
"""{title}

The kernel {kernel} as relax-llm {relax_llm} made it for {target}, on the tensors of one launch in a model.
This compiles kernel.py, runs it, compares with what it gave there, and times it.
It needs apache-tvm {tvm} and NumPy{compiler}.
"""

import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import tvm
from kernel import Module

TARGET = {target_options}
OPTIONS = {options}
FUNCTION = {function}
ARGUMENTS = {arguments}
EXPECTED = {expected}


def aligned(array):
    """A copy at a multiple of 64 bytes, which compiled code assumes."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


with tvm.transform.PassContext(config=OPTIONS):
    library = tvm.compile(Module, target=tvm.target.Target(TARGET))
{link}kernel = library[FUNCTION]

arrays = [aligned(np.load(HERE / one)) if isinstance(one, str) else one for one in ARGUMENTS]
tensors = [tvm.runtime.from_dlpack(one) if isinstance(one, np.ndarray) else one for one in arrays]
kernel(*tensors)
for position, file in EXPECTED.items():
    found, expected = arrays[position], np.load(HERE / file)
    apart = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    same = found.tobytes() == expected.tobytes()
    verdict = "equal bit for bit" if same else f"off by at most {{apart.max():.6g}}"
    print(f"{{file.removesuffix('.npy')}}: {{verdict}}")
seconds = []
for _ in range(50):
    begun = time.perf_counter()
    kernel(*tensors)
    seconds.append(time.perf_counter() - begun)
print(f"{{np.median(seconds) * 1e6:.1f}} us, the median of {{len(seconds)}} launches")
'''

_LINK = """\
import subprocess
import tempfile

COMMANDS = {commands}
directory = tempfile.mkdtemp()
objects = [f"{{directory}}/{{number}}.o" for number in range(len(COMMANDS))]
for command, file in zip(COMMANDS, objects):
    subprocess.run([*command, "-o", file], cwd=HERE, check=True)
library.export_library(f"{{directory}}/kernel.so", addons=objects)
library = tvm.runtime.load_module(f"{{directory}}/kernel.so")
"""


@dataclass(frozen=True)
class Script:
    """A kernel as a file of Python.

    Attributes:
        function: The function to call.
        text: TVMScript of it and of all that it calls.
        sources: C sources of what it calls.
    """

    function: str
    text: str
    sources: tuple[Source, ...]


def write_repro(
    launch: RecordedLaunch, directory: str | os.PathLike[str], artifact: Artifact | None = None
) -> Path:
    """Write a directory with which a launch can be made without this package.

    Args:
        launch: From `relax_llm.replay`.
        directory: A new or empty one, or an earlier repro, which is replaced.
        artifact: Has the listings, and the weights that are not in the recording; by default the one recorded.

    Returns:
        The script to run in it.

    Raises:
        RecordingError: The kernel cannot do without this package, the directory holds something else, or the disk is
            full.
        ArtifactError: The artifact has no listings.
    """
    target = Path(directory)
    origin = artifact or launch.artifact
    compiled = launch.compiled(origin)
    script = script_of(
        origin.listings, launch.made.symbol, launch.kernel, compiled.listing.symbol, compiled.index
    )
    inputs = launch.inputs(origin)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / SCRIPT).is_file()):
        raise RecordingError(f"{target} is there and is no repro; choose a new or an empty directory.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
            made = Path(name) / "repro"
            made.mkdir()
            _write(made, launch, origin, script, inputs)
            if target.exists():
                shutil.rmtree(target)
            made.rename(target)
    except OSError as error:
        reason = error.strerror or "there is no room for the tensors"  # which is all that NumPy does not tell
        raise RecordingError(f"{target} cannot be written: {reason}.") from error
    return target / SCRIPT


def script_of(listings: Listings, symbol: str, kernel: str, code: str, index: int | None) -> Script:
    """A kernel and all that it calls, to compile without this package.

    Args:
        listings: The artifact's.
        symbol: What the model calls.
        kernel: The kernel's name.
        code: The symbol of its own code.
        index: Its index among the kernels of what the model calls; None where it is that.

    Raises:
        RecordingError: It is written in Python, came as an object file, or has constants that TVMScript only names.
    """
    if index is None:
        text = listings.module(listings.reached(symbol))
        called = listings.reached(symbol)
    else:
        whole = textwrap.dedent(listings.functions[symbol + OPEN])
        own = with_choice(whole, symbol, index)
        called = listings.reached_from(own)
        text = listings.module(called, textwrap.indent(own, "    "))
    if PREFIX in text:
        raise RecordingError(
            f"The kernel {kernel} is a function in Python, which compiled code calls back; send the function itself."
        )
    if "metadata[" in text:
        raise RecordingError(f"The kernel {kernel} has constants that its TVMScript does not hold.")
    sources = []
    for name in called:
        source = listings.index.sources.get(name)
        if f'T.call_extern("int32", "{name}"' not in text:
            continue
        if source is None or source.language == "python":
            raise RecordingError(
                f"The kernel {kernel} came as an object file, without source; send that file."
            )
        sources.append(source)
    return Script(symbol, text, tuple(sources))


def with_choice(text: str, symbol: str, index: int) -> str:
    """An open dispatcher's TVMScript with one choice made.

    ::

        buffer = T.alloc_local((1,), "int32")                             tiled__matmul_n48_k64(x.data, ...)
        buffer[0] = T.Cast("int32", T.call_packed("relax_llm.choose", ...))
        if buffer[0] == 0:
            tiled__matmul_n48_k64(x.data, ...)
        else:
            ...

    Args:
        text: The function.
        symbol: What it is called without a choice to make.
        index: The choice.
    """
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    asking = next(step for step in function.body if CHOOSE in ast.unparse(step))
    asked = ast.unparse(asking).partition("[")[0]  # the variable that keeps the answer

    def kept(steps: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
        for step in steps:
            if step is asking or (isinstance(step, ast.Assign) and ast.unparse(step.targets[0]) == asked):
                continue
            if isinstance(step, ast.If) and ast.unparse(step.test).startswith(f"{asked}["):
                number = ast.unparse(step.test).rpartition("== ")[2]
                yield from kept(step.body if number in (str(index), f"T.int32({index})") else step.orelse)
            else:
                yield step

    function.body = list(kept(function.body))
    function.name = symbol
    return ast.unparse(function) + "\n"


def _write(
    directory: Path, launch: RecordedLaunch, artifact: Artifact, script: Script, inputs: dict[str, Any]
) -> None:
    arguments: list[Any] = []
    expected: dict[int, str] = {}
    for position, one in enumerate(launch.made.arguments):
        value = inputs.get(one.name)
        if one.role == "size":
            arguments.append(one.value)
            continue
        if value is None:
            value = np.zeros(one.shape, one.dtype)
        arguments.append(f"{one.name}.npy")
        np.save(directory / f"{one.name}.npy", value)
        if one.name in launch.results:
            expected[position] = f"expected_{one.name}.npy"
            np.save(directory / expected[position], launch.results[one.name])
    (directory / KERNEL).write_text(script.text, encoding="utf-8")
    for source in script.sources:
        for name, text in {**source.files, source.file: source.text}.items():
            (directory / name).write_text(text, encoding="utf-8")
    commands = [
        [COMPILERS[source.language][0], *source.flags, "-I.", "-c", source.file] for source in script.sources
    ]
    index = artifact.listings.index
    (directory / SCRIPT).write_text(
        _TEMPLATE.format(
            title=f"{launch.site}: {launch.operator}, {', '.join(f'{k} = {v}' for k, v in launch.sizes.items())}.",
            kernel=launch.kernel,
            relax_llm=artifact.manifest.versions["relax-llm"],
            tvm=artifact.manifest.versions["apache-tvm"],
            target=artifact.manifest.target,
            compiler=", and a C compiler" if script.sources else "",
            target_options=_literal(dict(index.target)),
            options=_literal(dict(index.options)),
            function=_literal(script.function),
            arguments=_literal(arguments),
            expected=_literal(expected),
            link=_LINK.format(commands=_literal(commands)) if commands else "",
        ),
        encoding="utf-8",
    )


def _literal(value: Any) -> str:
    """A value as Python has it, in lines that are not too long."""
    return pformat(value, width=100, compact=True, sort_dicts=False)
