"""Tables, figures and the report of a run folder, made from its stored units alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from monai_adv.data.files import write_atomic
from monai_adv.data.labels import MODALITIES
from monai_adv.studies.analysis import Analysis, analyse, write_analysis
from monai_adv.studies.checks import check_run, checks_table
from monai_adv.studies.defended import Declared
from monai_adv.studies.model_card import model_card
from monai_adv.studies.records import read_records
from monai_adv.studies.stored import stored_study
from monai_adv.studies.summary import machine_summary
from monai_adv.studies.units import read_json, write_json
from monai_adv.visualize import study_words
from monai_adv.visualize.report import write_report
from monai_adv.visualize.study_figures import drawn_units, montages, study_figures
from monai_adv.visualize.study_tables import result_tables, subject_table, write_frames
from monai_adv.visualize.viewer import BUDGET, viewer_content


def write_study_report(folder: str | Path, *, viewer_budget: int = BUDGET) -> tuple[Analysis, Path]:
    """Write ``tables/``, ``figures/``, ``summary.json``, ``model_card.md`` and ``report.html`` of a run folder.

    Args:
        folder: as ``monai-adv run`` left it.
        viewer_budget: characters that the volumes of the embedded viewer may take; 0 leaves the viewer out.

    Returns:
        The comparisons and the path of the report.

    Raises:
        ConfigError: if the folder holds no run, or none of its units has a result.
    """
    folder = Path(folder)
    study, stored = stored_study(folder)
    declared = Declared.of(stored)
    stated = declared.sorted(read_records(folder))
    analysis = analyse(stated, study.compare, study.figures.eps, declared)
    records = declared.tagged(stated)
    problems = read_json(folder / "problems.json") or []
    checks = check_run(folder)
    problems += analysis.notes

    write_analysis(folder, analysis)
    tables = result_tables(analysis, records)
    subjects = subject_table(records)
    frames = {name: table for name, (_, table) in tables.items() if isinstance(table, pd.DataFrame)}
    write_frames(folder, {**frames, "subjects": subjects, "checks": checks_table(checks)})
    drawn = drawn_units(folder, stated, study)
    figures = [(f.caption, f.save(folder / "figures")) for f in study_figures(folder, records, analysis, study)]
    pictures = [(f.caption, f.save(folder / "figures")) for f in montages(drawn)]
    changed = [MODALITIES[c] for c in study.budgets.channels or () if c < len(MODALITIES)]
    path = folder / "report.html"
    write_report(
        path,
        title=study.title,
        summary=study_words.summary(records, analysis, checks, problems),
        threat=study_words.threat(folder, study, stated),
        tables=list(tables.values()),
        figures=figures,
        pictures=pictures,
        viewer=viewer_content(drawn, budget=viewer_budget, first=changed) if viewer_budget else None,
        subjects=subjects,
        provenance=study_words.provenance(study, stored),
        checks=_told(checks_table(checks)),
    )
    summary = machine_summary(study, records, analysis, checks, problems, folder=folder)
    write_json(folder / "summary.json", summary)
    write_atomic(folder / "model_card.md", model_card(summary).encode())
    return analysis, path


def _told(checks: pd.DataFrame) -> pd.DataFrame:
    """Checks without a column that says nothing."""
    return checks if checks["victim"].any() else checks.drop(columns="victim")
