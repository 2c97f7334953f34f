"""Run the command line in this process."""

from __future__ import annotations

import sys

import pytest

from monai_adv import cli


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Call ``monai-adv`` with arguments; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["monai-adv", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)
