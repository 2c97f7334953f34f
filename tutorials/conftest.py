"""Notebooks under nbmake: small settings, simulated data, and nothing left beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The kernel inherits this environment; it is the tests' own only while a notebook runs."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        environment.setenv("MONAI_ADV_TUTORIAL_SMALL", "1")
        environment.setenv("MONAI_ADV_TUTORIAL_OUT", folder)
        environment.setenv("OMP_NUM_THREADS", "1")  # as tests/conftest.py
        for name in ("MONAI_ADV_TUTORIAL_DATA", "MONAI_ADV_TUTORIAL_CHECKPOINT", "MONAI_ADV_TUTORIAL_BUNDLE"):
            environment.delenv(name, raising=False)
        return (yield)
