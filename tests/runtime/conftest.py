"""What runs is compiled for a plainer machine, and so in less time."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def on_a_plainer_machine(plainer_machine: None) -> None:
    """For every test of this folder."""
