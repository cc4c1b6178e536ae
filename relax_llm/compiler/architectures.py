"""Finding the architecture of a checkpoint: built in, or a user's class or file."""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relax_llm.compiler import user_file
from relax_llm.errors import ArchitectureError
from relax_llm.layers import Decoder

Choice = type[Decoder] | str | Path | None


def builtin() -> dict[str, type[Decoder]]:
    """The architectures that ship, by the model_type they serve; the folder is the registry."""
    package = importlib.import_module("relax_llm.models")
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        for decoder in _decoders(importlib.import_module(f"{package.__name__}.{module.name}")):
            found.update(dict.fromkeys(decoder.model_types, decoder))
    return found


def find(config: Mapping[str, Any], choice: Choice = None) -> type[Decoder]:
    """The architecture for a config.

    Args:
        config: The checkpoint's config.json.
        choice: A `Decoder` subclass, the path of a Python file with one, the name of a built-in, or None to go by
            the config's model_type.

    Raises:
        ArchitectureError: There is none, or the file has none or several that fit.
    """
    if isinstance(choice, type):
        if not issubclass(choice, Decoder):
            raise ArchitectureError(f"{choice.__name__} is not a subclass of relax_llm.layers.Decoder.")
        return choice
    if choice is not None and str(choice).endswith(".py"):
        return _from_file(Path(choice), config)
    known = builtin()
    wanted = config.get("model_type") if choice is None else str(choice)
    if not isinstance(wanted, str) or wanted not in known:
        raise ArchitectureError(
            f"No architecture is known for model_type {wanted!r}; known: {', '.join(sorted(known))}. Write your own as "
            "a subclass of relax_llm.layers.Decoder and pass it: compile(..., architecture=MyModel), or "
            "--architecture path/to/file.py."
        )
    return known[wanted]


def _from_file(path: Path, config: Mapping[str, Any]) -> type[Decoder]:
    module = user_file.run(path, "architecture", ArchitectureError)
    found = _decoders(module)
    fitting = [decoder for decoder in found if config.get("model_type") in decoder.model_types] or found
    if len(fitting) != 1:
        listed = ", ".join(decoder.__name__ for decoder in found) or "none"
        raise ArchitectureError(
            f"{path} must define one subclass of relax_llm.layers.Decoder for model_type {config.get('model_type')!r}; "
            f"found: {listed}."
        )
    return fitting[0]


def _decoders(module: Any) -> list[type[Decoder]]:
    members = vars(module).values()
    return [
        value
        for value in members
        if inspect.isclass(value) and issubclass(value, Decoder) and value.__module__ == module.__name__
    ]
