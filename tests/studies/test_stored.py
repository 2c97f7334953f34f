"""A run folder whose study.json was made by hand, or is of another program: one error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monai_adv import cli
from monai_adv.errors import ConfigError
from monai_adv.studies.stored import stored_study


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no study.json"),
        ("[1]", "holds no study.json"),
        ("{}", "study.json"),
        ('{"study": 5}', "study.json"),
        ('{"study": {"title": "x", "budgetz": {}}}', "unknown key"),
    ],
)
def test_what_is_no_study_is_an_error_that_names_the_file(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "study.json").write_text(content)
    (tmp_path / "records.csv").write_text("subject,victim\na,b\n")
    with pytest.raises(ConfigError, match=said):
        stored_study(tmp_path)
    for command in ("compare", "report"):
        result = CliRunner().invoke(cli.app, [command, str(tmp_path)])
        assert isinstance(result.exception, ConfigError), command


def test_a_study_is_read_back(tmp_path: Path) -> None:
    study = {
        "data": {"root": "data"}, "victims": [{"name": "v", "checkpoint": "v.pt"}], "attacks": [{"name": "fgsm"}],
        "budgets": {"eps": [0.1]}, "output": "run", "compare": {"alpha": 0.01},
    }  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps({"study": study, "fingerprint": "f"}))
    found, stored = stored_study(tmp_path)
    assert found.compare.alpha == 0.01
    assert stored["fingerprint"] == "f"
