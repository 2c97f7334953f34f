"""The machine-readable summary of a real run keeps to its published schema, and what is broken does not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
from recorded_run import HOSTILE

from monai_adv import __version__
from monai_adv.studies import read_records, study_from
from monai_adv.studies.analysis import Analysis
from monai_adv.studies.check import Check
from monai_adv.studies.summary import SCHEMA_ID, machine_summary, mean_dice, summary_schema
from monai_adv.studies.units import read_json


@pytest.fixture(scope="module")
def summary(recorded: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((recorded / "summary.json").read_text(), parse_constant=_never)
    return found


def _never(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def validate(content: Any) -> None:
    jsonschema.Draft202012Validator(summary_schema()).validate(content)


def test_the_schema_is_one_and_describes_every_field() -> None:
    schema = summary_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == SCHEMA_ID
    for place, part in _parts(schema):
        if "properties" in part:
            assert part["additionalProperties"] is False, place
            for name, field in part["properties"].items():
                assert field.get("description") or "$ref" in field, f"{place}.{name}"


def _parts(schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        yield place, schema
        for name, part in schema.items():
            yield from _parts(part, f"{place}.{name}")


def test_a_real_run_keeps_to_it(summary: dict[str, Any], recorded: Path) -> None:
    validate(summary)
    stored = read_json(recorded / "study.json")
    assert summary["package"] == {"name": "monai_adv", "version": __version__}
    assert summary["provenance"]["fingerprint"] == stored["fingerprint"]
    assert summary["provenance"]["versions"] == stored["versions"]
    merged = read_json(recorded / "merged.json")
    assert summary["provenance"]["records_sha256"] == merged["files"]["records.csv"]
    assert [(v["label"], v["defense"], v["adaptive"], v["n_subjects"]) for v in summary["victims"]] == [
        ("tiny", "none", True, 2),
        ("filtered (NOT ADAPTIVE)", "purification", False, 2),
    ]
    assert {row["victim"] for row in summary["mean_dice"]} == {"tiny", "filtered (NOT ADAPTIVE)"}
    assert summary["units"]["scored"] == 2 * 2 * 3
    assert any("BraTS2021_00002" in line for line in summary["problems"])
    assert {check["status"] for check in summary["checks"]} >= {"PASS", "FAIL"}
    assert [row["p"] for row in summary["comparisons"]["tiny"]] == [None] * 6  # two subjects
    assert summary["between_victims"]
    assert summary["defenses"][0]["dice"].keys() >= {"clean", f"{HOSTILE} 0.8 std"}
    public = {name: part for name, part in summary.items() if name != "problems"}  # which say which file is bad
    assert str(recorded.parent) not in json.dumps(public)


def test_the_means_are_those_of_the_table(summary: dict[str, Any], recorded: Path) -> None:
    records = read_records(recorded)
    assert len(summary["mean_dice"]) == 2 * 3 * 3
    for row in summary["mean_dice"]:
        own = records[(records["victim"] == row["victim"].split()[0]) & (records["region"] == row["region"])]
        values = own[own["attack"] == row["attack"]].set_index("subject")["dice"]
        clean = own[own["attack"] == "clean"].set_index("subject")["dice"]
        assert (row["n"], row["pairs"]) == (2, 2)
        assert row["dice"] == pytest.approx(values.mean())
        assert row["drop"] == pytest.approx((clean - values).mean())


def test_a_drop_is_over_the_subjects_that_have_both() -> None:
    rows = [("a", "clean", 0.0, 0.9), ("b", "clean", 0.0, 0.5), ("a", "x", 1.0, 0.6), ("c", "x", 1.0, 0.2)]
    records = pd.DataFrame(rows, columns=["subject", "attack", "eps", "dice"])
    records = records.assign(
        victim="v", method="m", units="std", norm="linf", region="WT", status="ok", setting=records["attack"],
        truth_empty=[False, True, False, False],
    )  # fmt: skip
    clean, attacked = mean_dice(records).to_dict("records")
    assert (attacked["n"], attacked["pairs"]) == (2, 1)
    assert attacked["dice"] == pytest.approx(0.4)
    assert attacked["drop"] == pytest.approx(0.3)
    assert clean["dice_nonempty"] == pytest.approx(0.9)
    assert clean["truth_empty"] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(extra=1),
        lambda s: s.pop("threat_model"),
        lambda s: s.update(schema="urn:monai_adv:schema:summary:2"),
        lambda s: s["mean_dice"][0].update(dice=1.5),
        lambda s: s["mean_dice"][0].update(dice="0.5"),
        lambda s: s["mean_dice"][0].pop("n"),
        lambda s: s["checks"][0].update(status="OK"),
        lambda s: s["victims"][0].update(sha256="abc"),
        lambda s: s["victims"][0].update(defense="prayer"),
        lambda s: s["comparisons"]["tiny"][0].update(p=-0.1),
        lambda s: s["threat_model"].update(units="mm"),
        lambda s: s["provenance"].pop("fingerprint"),
        lambda s: s.update(problems=[1]),
    ],
)
def test_what_is_broken_does_not_keep_to_it(summary: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> None:
    broken = copy.deepcopy(summary)
    change(broken)
    with pytest.raises(jsonschema.ValidationError):
        validate(broken)


def test_hashes_of_victims_stand_there_where_the_run_stored_them(recorded: Path, tmp_path: Path) -> None:
    stored = read_json(recorded / "study.json")
    study = study_from(stored["study"])
    empty = Analysis({}, None, pd.DataFrame())
    records = read_records(recorded)
    (tmp_path / "study.json").write_text(json.dumps({**stored, "hashes": {"tiny": "ab" * 32}}))
    found = machine_summary(study, records, empty, [Check("c", "PASS", "d")], [], folder=tmp_path)
    validate(found)
    assert [v["sha256"] for v in found["victims"]] == ["ab" * 32, None]
    assert found["provenance"]["records_sha256"] is None


def test_what_is_not_a_number_or_has_no_bound_is_null(recorded: Path) -> None:
    study = study_from(read_json(recorded / "study.json")["study"])
    records = read_records(recorded).astype({"eps": float})
    records.loc[records["attack"] == "noise", "eps"] = np.inf
    found = machine_summary(study, records, Analysis({}, None, pd.DataFrame()), [], [], folder=recorded)
    validate(found)
    json.dumps(found, allow_nan=False)
    assert {row["eps"] for row in found["mean_dice"]} == {0.0, None, 0.8}
