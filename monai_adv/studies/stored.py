"""The study that a run folder belongs to, as it was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai_adv.errors import ConfigError
from monai_adv.studies.config import StudyConfig, study_from
from monai_adv.studies.units import read_json


def stored_study(folder: str | Path) -> tuple[StudyConfig, dict[str, Any]]:
    """Study of a run folder, and all that its ``study.json`` holds.

    Args:
        folder: as ``monai-adv run`` left it.

    Raises:
        ConfigError: if there is none, or it is none that this version reads.
    """
    file = Path(folder) / "study.json"
    stored = read_json(file)
    if not isinstance(stored, dict):
        raise ConfigError(f"{folder} holds no study.json: it is no run folder of `monai-adv run`")
    return study_from(stored.get("study"), str(file)), stored  # type: ignore[arg-type]
