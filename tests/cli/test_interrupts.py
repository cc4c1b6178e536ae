"""Signals are obeyed at the next step, also where the exception that they raise gets lost on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from relax_llm import programs
from relax_llm.cli.interrupts import InterruptibleBars, Termination


def press_ctrl_c() -> None:
    """As a terminal does, for the whole process, and go on until it has come."""
    os.kill(os.getpid(), signal.SIGINT)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.001)


def swallow_ctrl_c() -> None:
    """Do what compiled code may do when Ctrl-C reaches Python that it called."""
    with suppress(KeyboardInterrupt):
        press_ctrl_c()


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


UNSEEN = """
import ctypes, signal
from relax_llm.cli.interrupts import InterruptibleBars
from tests.cli.test_interrupts import press_ctrl_c

try:
    with InterruptibleBars().listening():
        ctypes.CDLL(None).signal(signal.SIGINT, ctypes.c_void_p(0))  # ends the process
        press_ctrl_c()
except KeyboardInterrupt:
    print("interrupted", signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_ctrl_c_comes_where_compiled_code_has_a_handler_of_its_own() -> None:
    """Behind Python's back, as a prover that is asked while a model is compiled."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", UNSEEN], capture_output=True, text=True, cwd=root, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "interrupted False\n"), done.stderr


def test_programs_can_be_ended() -> None:
    """They do not inherit that Ctrl-C is kept from the thread that runs them."""
    with InterruptibleBars().listening():
        done = programs.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"])
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr


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
