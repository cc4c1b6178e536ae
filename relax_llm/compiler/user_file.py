"""Running a Python file of the user's: one with an architecture, or one with kernels."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from relax_llm.errors import RelaxLLMError


def run(path: str | os.PathLike[str], what: str, refuse: type[RelaxLLMError]) -> ModuleType:
    """Run a file as a module.

    Args:
        path: The file.
        what: What it is for, in messages: "architecture", "kernel".
        refuse: The error to raise.

    Raises:
        refuse: The file does not exist, is no Python, or fails.
    """
    file = Path(path)
    if not file.is_file():
        raise refuse(f"The {what} file {file} does not exist.")
    name = f"relax_llm_user_{what}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise refuse(f"The {what} file {file} cannot be read as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise refuse(f"The {what} file {file} fails: {type(error).__name__}: {error}.") from error
    return module
