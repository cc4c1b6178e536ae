"""The symbolic sizes of an artifact's kernels, and the values that a person gives them."""

from collections.abc import Iterable

from relax_llm.artifact import formulas
from relax_llm.artifact.manifest import Manifest
from relax_llm.errors import InputError


def symbols(manifest: Manifest) -> frozenset[str]:
    """The sizes that the costs of an artifact's kernels depend on."""
    costs = (cost for kernel in manifest.kernels.values() for cost in (kernel.flops, kernel.bytes))
    return frozenset().union(*map(formulas.names, costs))


def parse_sizes(text: str, known: Iterable[str]) -> dict[str, int]:
    """The sizes in a text such as "batch=1,seq=1,kv_len=100".

    Raises:
        InputError: A name is not one of `known`, comes twice, or its value is not a positive whole number.
    """
    names = sorted(known)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in names:
            raise InputError(f"--at: there is no size {name!r} here; the sizes are {', '.join(names)}.")
        if not (value.isascii() and value.isdecimal() and len(value) <= 12 and int(value) > 0):
            raise InputError(f"--at: {name} is {value!r}; it must be a whole number, 1 or above.")
        if name in sizes:
            raise InputError(f"--at names {name} twice.")
        sizes[name] = int(value)
    if sizes.get("seq", 1) > sizes.get("kv_len", sizes.get("seq", 1)):
        raise InputError("--at: kv_len counts the tokens of this call too, so it is at least seq.")
    return sizes
