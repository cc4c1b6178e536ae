"""The command line `relax-llm`. Nothing here computes; every command is a few calls of the public interface."""

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What follows the program's name; by default the process's own.

    Returns:
        0, or 2 for what the user can put right, 1 for a fault of this program, 130 after Ctrl-C, 141 when whoever
        read the output went away.
    """
    try:
        from relax_llm.cli.application import run

        return run(arguments)
    except KeyboardInterrupt:
        return 130
