"""Tuning is tested where kernels compile quickly."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def on_a_plainer_machine(plainer_machine: None) -> None:
    """For every test of this folder."""
