"""Gathering the kernels of a compilation: given as objects, in files, or by installed packages."""

import os
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import entry_points

from relax_llm.compiler import user_file
from relax_llm.errors import KernelError
from relax_llm.plan.kernel import Kernel

ENTRY_POINTS = "relax_llm.kernels"
"""The entry point group in which a package names its kernels, each a `Kernel` object."""


def gather(given: Iterable[Kernel | str | os.PathLike[str]]) -> list[Kernel]:
    """All kernels in the order of their precedence: given ones, then those of installed packages.

    Args:
        given: Kernels, or Python files with kernels at their top level.

    Raises:
        KernelError: A file has none, something is not a kernel, or two have the same name.
    """
    found: list[tuple[Kernel, str]] = []
    for item in given:
        if isinstance(item, Kernel):
            found.append((item, f"the file of {item.make.__qualname__}"))
        elif isinstance(item, str | os.PathLike):
            found += [(kernel, os.fspath(item)) for kernel in _in_file(item)]
        else:
            raise KernelError(f"{item!r} is not a kernel; decorate a function with relax_llm.kernel(...).")
    for point in entry_points(group=ENTRY_POINTS):
        kernel = point.load()
        if not isinstance(kernel, Kernel):
            raise KernelError(
                f"The entry point {point.name!r} of {ENTRY_POINTS} is {kernel!r}, not a kernel."
            )
        package = point.dist.name if point.dist else point.value
        found.append((replace(kernel, package=package), f"the package {package}"))
    origins: dict[str, str] = {}
    for kernel, origin in found:
        if kernel.name in origins:
            raise KernelError(
                f"Two kernels have the name {kernel.name!r}, one from {origins[kernel.name]} and one from {origin}; "
                "give one of them another with name=."
            )
        origins[kernel.name] = origin
    return [kernel for kernel, _ in found]


def _in_file(path: str | os.PathLike[str]) -> list[Kernel]:
    module = user_file.run(path, "kernel", KernelError)
    kernels = [value for value in vars(module).values() if isinstance(value, Kernel)]
    if not kernels:
        raise KernelError(
            f"The kernel file {os.fspath(path)} defines no kernel; decorate one with relax_llm.kernel(...)."
        )
    return kernels
