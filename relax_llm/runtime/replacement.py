"""What computes a launch in place of the kernel that serves it: another kernel, or a function of yours."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relax_llm.errors import InputError

if TYPE_CHECKING:
    from relax_llm.runtime.launch import Launch

Replacement = str | Callable[..., Any]
"""A kernel's name, or a function of the inputs that returns the outputs."""


def compute(launch: "Launch", function: Callable[..., Any]) -> None:
    """Have a function of a launch's inputs compute its outputs.

    Raises:
        InputError: It cannot be called with the inputs, or what it returns does not fit the outputs.
    """
    _check_takes(launch, function)
    arrays = launch.fitting(function(*launch.inputs), "replacement")
    for array, output in zip(arrays, launch.outputs, strict=True):
        output[...] = array


def _check_takes(launch: "Launch", function: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with the inputs, by what it is called with."""
    if not callable(function):
        raise InputError(
            f"{launch} is replaced by the name of a kernel or by a function, not by an object of type "
            f"{type(function).__name__}."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions do not say
        return
    try:
        signature.bind(*launch.inputs)
    except TypeError as error:
        given = ", ".join(
            f"{o.role} {list(o.value.shape)}" for o in launch.arguments if o.role not in ("size", "output")
        )
        raise InputError(
            f"The replacement of {launch} is called with {len(launch.inputs)} arrays ({given}), which it does not "
            f"take: {error}."
        ) from None
