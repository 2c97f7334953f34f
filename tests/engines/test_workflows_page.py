"""The examples of docs/workflows.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from builders import make_cohort
from workflows import ANISOTROPIC_LPS, SHAPE

PAGE = Path(__file__).parents[2] / "docs" / "workflows.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_cohort(tmp_path / "BraTS2021", 6, shape=SHAPE, affine=ANISOTROPIC_LPS)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert "| pgd" in capsys.readouterr().out
    assert pd.read_csv("records.csv")["subject"].nunique() == 6
    for pattern in ("clean/*_pred.nii.gz", "pgd/*_pred.nii.gz", "adversarial/*_pgd.nii.gz"):
        files = sorted(tmp_path.glob(pattern))
        assert len(files) == 6
        for file in files:
            image = nib.load(file)
            assert image.shape[:3] == SHAPE
            assert np.array_equal(image.affine, ANISOTROPIC_LPS)
