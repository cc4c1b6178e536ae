"""The debugger over lines of text: commands from standard input, one in a line, and answers below them."""

from collections.abc import Callable, Iterable

from relax_llm.debugger import describe
from relax_llm.debugger.commands import Quit, execute
from relax_llm.debugger.session import Session
from relax_llm.errors import RelaxLLMError


def follow(
    session: Session,
    lines: Iterable[str],
    answer: Callable[[str], None],
    refuse: Callable[[str], None],
    *,
    interruptible: bool,
) -> int:
    """Carry out commands until one is to quit, or there are none left. One that is refused does not end it.

    Args:
        session: What they act on.
        lines: The commands.
        answer: Is given what there is to say.
        refuse: Is given why a command was not carried out.
        interruptible: Whether Ctrl-C ends only the command that is being carried out, as for a person.

    Returns:
        How many were refused.

    Raises:
        KeyboardInterrupt: Ctrl-C, and not interruptible.
    """
    refused = 0
    answer(describe.where(session))
    for line in lines:
        try:
            text = execute(session, line)
        except Quit:
            break
        except RelaxLLMError as error:
            refused += 1
            refuse(str(error))
            continue
        except KeyboardInterrupt:
            if not interruptible:
                raise
            session.interrupt()
            text = describe.where(session)
        if text:
            answer(text)
    session.close()
    return refused
