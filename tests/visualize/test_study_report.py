"""The report of a real run: every figure and table with its data, the order of the study, hostile names, the checks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_run import HOSTILE

from monai_adv.studies import read_records
from monai_adv.studies.check import Check
from monai_adv.studies.probes import _about, _row
from monai_adv.studies.units import write_json
from monai_adv.visualize import study_report
from monai_adv.visualize.study_figures import _modalities
from monai_adv.visualize.study_report import write_study_report
from monai_adv.visualize.study_tables import mean_table, subject_table


def test_figures_and_tables_have_their_data_beside_them(run: Path) -> None:
    figures = {p.stem for p in (run / "figures").iterdir()}
    assert {"dice_drop", "dice_curves", "paired_zeta", "paired_alpha"} < figures
    assert sum(name.startswith("montage_") for name in figures) == 2 * 2  # victims x attacks but noise, one subject
    for name in figures:
        kinds = sorted(p.suffix for p in (run / "figures").glob(f"{name}.*"))
        assert kinds == [".csv", ".png", ".svg"], name
        assert not pd.read_csv(run / "figures" / f"{name}.csv").empty
    tables = {p.stem for p in (run / "tables").iterdir()}
    wanted = {"means", "sizes", "subjects", "checks", "ordering", "comparison_zeta", "comparison_between_victims"}
    assert wanted <= tables
    for name in tables:
        assert sorted(p.suffix for p in (run / "tables").glob(f"{name}.*")) == [".csv", ".md", ".tex"], name
    assert "\\begin{tabular}" in (run / "tables" / "means.tex").read_text()


def test_victims_and_attacks_are_in_the_order_of_the_study(run: Path) -> None:
    """The study lists zeta before alpha, and ifgsm before the attack with the hostile name."""
    for name in ("means", "sizes"):
        table = pd.read_csv(run / "tables" / f"{name}.csv")
        assert list(dict.fromkeys(table["victim"])) == ["zeta", "alpha"], name
    settings = list(table["setting"][: len(table) // 2])
    assert [s.split()[0] for s in settings] == ["noise", "noise", "ifgsm", "ifgsm", HOSTILE.split()[0]] + [
        HOSTILE.split()[0]
    ]
    drops = pd.read_csv(run / "figures" / "dice_drop.csv")
    assert list(dict.fromkeys(drops["victim"])) == ["zeta", "alpha"]
    assert list(drops["region"][:4]) == ["WT", "TC", "ET", "mean"]
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["comparisons"]) == ["zeta", "alpha"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.index("zeta, 2 subjects") < page.index("alpha, 2 subjects")
    assert page.index("<dt>attack ifgsm") < page.index("<dt>attack &lt;")
    subjects = pd.read_csv(run / "tables" / "subjects.csv")
    assert list(dict.fromkeys(subjects["victim"])) == ["zeta", "alpha"]


def test_names_in_the_page_are_escaped(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "http://" not in page.split('id="niivue-script"')[0].replace("http-equiv", "")


def test_the_viewer_holds_the_drawn_subject(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="viewer-data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert [(s["subject"], s["victim"]) for s in data["scenes"]] == [
        ("BraTS2021_00000", "zeta"), ("BraTS2021_00000", "alpha")]  # fmt: skip
    names = [s["name"] for s in data["scenes"][0]["settings"]]
    assert [n.split()[0] for n in names] == ["ifgsm", HOSTILE.split()[0], "noise"]
    count = len(re.findall(r'<script type="text/plain" id="volume-\d+">', page))
    assert count == 1 + max(m["volume"] for s in data["scenes"] for x in s["settings"] for m in x["changes"])


def test_a_budget_of_nothing_leaves_the_viewer_out_and_stored_checks_are_shown(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for figures in ("study_figures", "montages"):  # they are drawn by the other tests
        monkeypatch.setattr(study_report, figures, lambda *content: iter(()))
    check = Check("a probe of <b>", "WARN", "0.5 > 0.1", "zeta")
    stored = json.loads((copy / "study.json").read_text())["study"]
    write_json(copy / "checks.json", [_row(check, "", "", _about(stored))])
    _, path = write_study_report(copy, viewer_budget=0)
    page = path.read_text(encoding="utf-8")
    assert 'id="viewer-panel"' not in page
    assert 'id="niivue-script"' not in page
    assert "Left out to keep" not in page
    assert page.count("a probe of &lt;b&gt;") == 2  # in the summary and among the checks
    assert vars(check) in json.loads((copy / "summary.json").read_text())["checks"]
    assert "a probe of" in (copy / "tables" / "checks.csv").read_text()


def test_the_table_of_subjects_has_every_unit(run: Path) -> None:
    records = read_records(run)
    table = subject_table(records)
    assert len(table) == 2 * 2 * 7
    row = table[(table["victim"] == "alpha") & (table["setting"] == "ifgsm 0.8 std")].iloc[0]
    own = records[(records["subject"] == row["subject"]) & (records["victim"] == "alpha")]
    dice = own[own["setting"] == "ifgsm 0.8 std"].set_index("region")["dice"]
    clean = own[own["setting"] == "clean"]["dice"].mean()
    assert [row[f"Dice {r}"] for r in ("WT", "TC", "ET")] == [dice[r] for r in ("WT", "TC", "ET")]
    assert row["drop"] == pytest.approx(clean - dice.mean())
    lost = (records["subject"] == "BraTS2021_00001") & (records["setting"] == "ifgsm 0.8 std")
    lost &= records["victim"] == "alpha"
    failed = records[lost].head(1).assign(region=np.nan, dice=np.nan, status="failed")
    shown = subject_table(pd.concat([records[~lost], failed]))
    assert len(shown) == len(table)
    (bad,) = shown[shown["status"] == "failed"].to_dict("records")
    assert (bad["subject"], bad["setting"]) == ("BraTS2021_00001", "ifgsm 0.8 std")
    assert np.isnan(bad["mean Dice"])


def test_tables_need_no_timings(run: Path) -> None:
    records = read_records(run)
    assert mean_table(records.drop(columns="seconds")).equals(mean_table(records))


def test_modalities_are_shown_where_the_run_has_them(run: Path, tmp_path: Path) -> None:
    assert list(_modalities(run)) == []
    rows = [
        {"modality": m, "region": r, "drop_mean": 0.1 * i, "noise_drop_mean": 0.01}
        for i, m in enumerate(("T1", "all"))
        for r in ("WT", "TC")
    ]
    (tmp_path / "universal").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "universal" / "modality_table.csv")
    (figure,) = _modalities(tmp_path)
    labels = [t.get_text() for t in figure.figure.axes[0].get_yticklabels()]
    assert labels == ["T1", "T1, noise", "all", "all, noise"]
