"""Signals are obeyed at the next step, also where the exception that they raise gets lost on the way."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress

import pytest

from relax_llm.cli.interrupts import InterruptibleBars, Termination


def swallow_ctrl_c() -> None:
    """Do what compiled code may do when Ctrl-C reaches Python that it called."""
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_that_compiled_code_swallows_ends_the_task() -> None:
    bars = InterruptibleBars()
    steps = []

    def work() -> None:
        with bars.listening(), bars.task("Passes", 3) as advance:
            for step in range(3):
                if step == 1:
                    swallow_ctrl_c()
                advance(1)
                steps.append(step)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_last_step_ends_the_task() -> None:
    bars = InterruptibleBars()

    def work() -> None:
        with bars.listening():
            with bars.task("Compiling", 1):
                swallow_ctrl_c()
            pytest.fail("the next task began")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_termination_unwinds_and_is_given_back() -> None:
    with Termination() as termination:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert termination.requested
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_others_do_with_the_signals_stays() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Termination() as termination:
            signal.raise_signal(signal.SIGTERM)
        assert not termination.requested
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_have_no_signals() -> None:
    done = []

    def work() -> None:
        with Termination(), InterruptibleBars().listening():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
