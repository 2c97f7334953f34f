from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from builders import case_file

from monai_adv.errors import ConfigError
from monai_adv.studies import Shard, merge_study, read_records, run_study, study_from
from monai_adv.studies.records import COSTS, FIRST, ROWS, UNIT, write_records
from monai_adv.visualize.study_report import write_study_report

TABLES = ("records.csv", "records.parquet")


@pytest.fixture
def content(content: dict[str, Any]) -> dict[str, Any]:
    """15 units and no montage."""
    return {**content, "attacks": content["attacks"][:2], "figures": {"montages": 0}}


def test_any_number_of_shards_gives_the_same_bytes(content: dict[str, Any], tmp_path: Path) -> None:
    run_study(study_from({**content, "output": str(tmp_path / "whole")}))
    tables = [(tmp_path / "whole" / name).read_bytes() for name in TABLES]
    for count in (1, 2, 3):
        run, computed = tmp_path / f"run{count}", 0
        study = study_from({**content, "output": str(run)})
        for index in range(count, 0, -1):
            result = run_study(study, shard=Shard(index, count))
            assert result.problems == []
            computed += result.computed
            assert (run / "records.csv").exists() == (count == 1)  # a shard writes units only
        assert computed == 15
        merged = merge_study(run)
        assert (merged.units, merged.missing, merged.problems) == (15, 0, [])
        assert [(run / name).read_bytes() for name in TABLES] == tables
    assert run_study(study).computed == 0  # a later run in one piece finds them all
    table = read_records(tmp_path / "whole")
    assert table.equals(table.sort_values([*UNIT, "region"], kind="stable"))


def test_missing_units_are_named_and_the_others_merged(content: dict[str, Any], tmp_path: Path) -> None:
    first = run_study(study_from(content), shard=Shard(1, 2))
    merged = merge_study(tmp_path / "run")
    assert merged.units == first.computed
    assert merged.missing == 15 - first.computed > 0
    assert f"{merged.missing} units have no result yet: BraTS2021_0" in merged.problems[-1]
    assert f"and {merged.missing - 5} more" in merged.problems[-1]
    assert json.loads((tmp_path / "run" / "problems.json").read_text()) == merged.problems
    # shards of another number: what the first one did stays, its list of keys goes
    assert sum(run_study(study_from(content), shard=Shard(i, 3)).computed for i in (1, 2, 3)) == merged.missing
    assert merge_study(tmp_path / "run").missing == 0


def test_a_study_that_changed_is_missing_what_its_shards_have_not_done_again(
    content: dict[str, Any], tmp_path: Path
) -> None:
    for index in (1, 2):
        run_study(study_from(content), shard=Shard(index, 2))
    content["attacks"][1]["loss"] = "ce"
    assert merge_study(tmp_path / "run").missing == 0  # nobody has been told yet
    run_study(study_from(content), shard=Shard(1, 2))
    assert merge_study(tmp_path / "run").missing > 0
    assert run_study(study_from(content), shard=Shard(2, 2)).computed > 0
    assert merge_study(tmp_path / "run").missing == 0


def test_a_subject_that_cannot_be_loaded_is_alike_in_shards_and_in_one_piece(
    content: dict[str, Any], tmp_path: Path
) -> None:
    bad = case_file(tmp_path / "data", "BraTS2021_00000", "T1c")
    bad.write_bytes(bad.read_bytes()[:100])
    whole = run_study(study_from({**content, "output": str(tmp_path / "whole")}))
    parts = [run_study(study_from(content), shard=Shard(i, 2)) for i in (1, 2)]
    merged = merge_study(tmp_path / "run")
    assert merged.problems == whole.problems
    assert len(merged.problems) == 1
    assert any(bad.name in line for part in parts for line in part.problems)
    one, other = ((tmp_path / n / "records.csv").read_bytes() for n in ("run", "whole"))
    assert one == other
    table = read_records(tmp_path / "run")
    status = table[table["subject"] == "BraTS2021_00000"].set_index("attack")["status"]
    assert status["clean"] == "failed"
    assert set(status.drop("clean")) == {"skipped"}


def test_the_report_of_a_merged_run(content: dict[str, Any], tmp_path: Path) -> None:
    for index in (1, 2):
        run_study(study_from(content), shard=Shard(index, 2))
        if index == 1:
            with pytest.raises(ConfigError, match=r"records\.csv does not exist"):
                write_study_report(tmp_path / "run")
            merge_study(tmp_path / "run")
    merge_study(tmp_path / "run")
    _, path = write_study_report(tmp_path / "run")
    assert path.stat().st_size > 10_000


def _unit(subject: str, dice: float | None, regions: tuple[str, ...] = ("WT", "TC", "ET")) -> dict[str, Any]:
    identity = {"subject": subject, "victim": "v", "attack": "fgsm", "method": "fgsm", "eps": 0.1, "units": "std",
                "norm": "linf", "setting": "fgsm 0.1 std"}  # fmt: skip
    if dice is None:
        return {"identity": identity, "status": "oom", "rows": []}
    row = {**identity, "status": "ok", "dice": dice, "hd95": float("nan"), "truth_voxels": 7, "truth_empty": False,
           "success": True, "psnr": float("inf"), "seconds": 1.5, "forwards": 3, "backwards": 1}  # fmt: skip
    return {"identity": identity, "status": "ok", "rows": [{**row, "region": region} for region in regions]}


def test_parquet_and_csv_hold_the_same_table(tmp_path: Path) -> None:
    number = 2 * ROWS // 3 + 5  # several pieces
    units = [_unit(f"s{k:04d}", None if k == 3 else 1 / (k + 3)) for k in range(number)]
    assert write_records(tmp_path, units) == 3 * number - 2
    csv = pd.read_csv(tmp_path / "records.csv", dtype={"subject": str})
    parquet = pd.read_parquet(tmp_path / "records.parquet")
    assert list(csv.columns) == list(parquet.columns) == list(FIRST)
    for name in FIRST:
        left, right = csv[name].to_numpy(), parquet[name].to_numpy()
        same = np.array([(a == b) or (pd.isna(a) and pd.isna(b)) for a, b in zip(left, right)])
        assert same.all(), name
    assert list(csv["region"][:3]) == ["ET", "TC", "WT"]  # sorted, whatever the unit's order
    assert csv["truth_voxels"].dropna().eq(7).all()
    assert b",7.0," not in (tmp_path / "records.csv").read_bytes()  # a whole number beside missing ones stays one


def test_what_a_unit_took_stands_beside_the_records_and_is_read_with_them(tmp_path: Path) -> None:
    slow, quick = _unit("=s1", 0.5), _unit("=s1", 0.5)
    for row in quick["rows"]:
        row |= {"seconds": 0.1, "forwards": 2}
    write_records(tmp_path / "a", [slow])
    write_records(tmp_path / "b", [quick])
    for name in TABLES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read_records(tmp_path / "a")["seconds"].tolist() == [1.5] * 3
    assert read_records(tmp_path / "b" / "records.csv")["forwards"].tolist() == [2] * 3
    assert read_records(tmp_path / "a")["subject"].tolist() == ["'=s1"] * 3
    old = tmp_path / "old"
    old.mkdir()
    table = read_records(tmp_path / "a")
    table.assign(seconds=9.0).to_csv(old / "records.csv", index=False)  # of a version with the seconds in it
    assert read_records(old)["seconds"].tolist() == [9.0] * 3
    table.drop(columns=list(COSTS)).to_csv(old / "records.csv", index=False)
    assert read_records(old)[list(COSTS)].isna().all(axis=None)
