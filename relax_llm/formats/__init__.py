"""Weight formats: how the numbers of a matrix are kept, whatever order kernels want them in.

A format is one record with `encode` and `decode`; it knows NumPy and nothing of kernels. Which layouts hold it in
memory is the business of `relax_llm.kernels.layout`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from relax_llm.formats.blocks import Blocks
from relax_llm.formats.floats import Floats

__all__ = ["FORMATS", "Blocks", "Floats", "Format", "format_named"]

Format = Floats | Blocks

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        format.name: format
        for format in (
            Floats("f32"),
            Floats("bf16"),
            Floats("f16"),
            Blocks("q8", 8),
            Blocks("q6", 6),
            Blocks("q4", 4, minimum=True),
            Blocks("q4s", 4),
        )
    }
)
"""Every format by its name, the ones that keep most first."""


def format_named(name: str) -> Format:
    """The format of this name.

    Raises:
        KeyError: There is none.
    """
    return FORMATS[name]
