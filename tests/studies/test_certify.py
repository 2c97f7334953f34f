"""The certificate of files: geometry, the table, and a bad subject that costs only itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from builders import case_file, make_case, make_cohort
from cli_caller import call

from monai_adv.data import brats_datalist
from monai_adv.defenses import certify
from monai_adv.errors import ConfigError
from monai_adv.studies import cases
from monai_adv.studies.certify import certify_files
from monai_adv.studies.config import DataConfig
from monai_adv.victims import Victim, load_victim, read_checkpoint, save_checkpoint

OPTIONS = {"sigma": 0.5, "samples": 60, "draws0": 10, "batch": 20}
OBLIQUE = np.array([[-1.9, 0.2, 0.1, 20], [0.2, -0.95, 0.3, 30], [0.1, -0.28, 1.4, -5], [0, 0, 0, 1]])


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_files_hold_the_certificate_on_the_scans_own_grid(tmp_path: Path, checkpoint: Path) -> None:
    subject = "BraTS2021_00000"
    truth = make_case(tmp_path / "data", subject, affine=OBLIQUE, shape=(16, 20, 14))
    (done,) = certify_files(tmp_path / "data", checkpoint, tmp_path / "out", seed=3, **OPTIONS)
    assert done.error is None
    folder = tmp_path / "out" / subject
    source = nib.load(case_file(tmp_path / "data", subject, "T1"))
    segmentation = voxels(folder / f"{subject}_certified_segmentation.nii.gz")
    abstention = voxels(folder / f"{subject}_certified_abstention.nii.gz")
    for name in ("segmentation", "abstention"):
        image = nib.load(folder / f"{subject}_certified_{name}.nii.gz")
        assert image.shape == source.shape
        np.testing.assert_allclose(image.affine, source.affine, atol=1e-6)
        assert image.get_data_dtype() == np.uint8
    assert np.array_equal(abstention == 1, segmentation == 255)
    assert set(np.unique(segmentation)) <= {0, 1, 2, 3, 255}
    # the same certificate by hand, and back from the crop
    (item,) = brats_datalist(tmp_path / "data")
    case, victim = cases.load(item, DataConfig(root=tmp_path)), load_victim(checkpoint)
    found = certify(victim, case.image, generator=torch.Generator().manual_seed(3), **OPTIONS)
    assert np.array_equal(segmentation, case.restore(found.segmentation()[0])[0].numpy())
    # each certified voxel where the truth of the file is: orientation and crop undone
    right = segmentation == truth["label"]
    assert right[(segmentation != 255) & (truth["label"] > 0)].mean() > 0.5
    table = pd.read_csv(tmp_path / "out" / "records.csv")
    assert table["region"].tolist() == ["ET", "TC", "WT"]
    expected = {row["region"]: row for row in found.scores(victim.head.label_from_classes(case.classes))}
    for row in table.to_dict("records"):
        for name in ("smoothed_dice", "certified_dice", "certified_dice_missed", "abstained_true"):
            assert row[name] == pytest.approx(expected[row["region"]][name])
        assert row["certified_dice"] <= row["certified_dice_missed"]
        assert 0.4 < row["dice"] <= 1
        assert row["radius"] == pytest.approx(found.radius)
        assert row["abstention"] == pytest.approx(found.abstention)
        assert row["foreground_abstention"] == pytest.approx(found.foreground_abstention)
    content = json.loads((folder / f"{subject}_certificate.json").read_text())
    assert (content["sigma"], content["samples"], content["seed"]) == (0.5, 60, 3)
    assert content["tests"] == case.classes.numel()
    assert len(content["files"]) == 2


def at_coarser_voxels(checkpoint: Path, path: Path, spacing: list[float] | None) -> Path:
    """The same network, said to be trained at a spacing."""
    victim, config = load_victim(checkpoint), read_checkpoint(checkpoint)[1]
    return save_checkpoint(path, victim.network, dataclasses.replace(config, spacing=spacing))


def test_a_network_of_coarser_voxels_is_certified_on_the_files_grid(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = "BraTS2021_00000"
    make_case(tmp_path / "data", subject, affine=OBLIQUE, shape=(16, 20, 14))
    coarse = at_coarser_voxels(checkpoint, tmp_path / "coarse.pt", [2.0, 2.0, 2.0])
    (item,) = brats_datalist(tmp_path / "data")
    case, victim = cases.load(item, DataConfig(root=tmp_path)), load_victim(coarse)
    arguments = [str(tmp_path / "data"), "--sigma", "0.5", "-o", str(tmp_path / "out"), "--checkpoint", str(coarse),
                 "--samples", "60", "--draws0", "10", "--batch", "20", "--seed", "3", "--resample"]  # fmt: skip
    assert call(monkeypatch, "certify", *arguments) == 0
    folder, source = tmp_path / "out" / subject, nib.load(case_file(tmp_path / "data", subject, "T1"))
    for name in ("segmentation", "abstention"):
        image = nib.load(folder / f"{subject}_certified_{name}.nii.gz")
        assert image.shape == source.shape
        np.testing.assert_allclose(image.affine, source.affine, atol=1e-6)
    # noise on the file's grid, then linear interpolation there and back around the network, by torch alone
    coarser = [round(n * s / 2) for n, s in zip(case.image.shape[2:], case.spacing)]
    assert coarser != list(case.image.shape[2:])

    def there_and_back(data: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
        small = F.interpolate(data, size=coarser, mode="trilinear", align_corners=False)
        logits = victim.inferer(small, network)
        return F.interpolate(logits, size=data.shape[2:], mode="trilinear", align_corners=False)

    by_hand = Victim(victim.network, there_and_back, victim.head, victim.preprocessing)
    found = certify(by_hand, case.image, generator=torch.Generator().manual_seed(3), **OPTIONS)
    written = voxels(folder / f"{subject}_certified_segmentation.nii.gz")
    assert np.array_equal(written, case.restore(found.segmentation()[0])[0].numpy())
    assert len(np.unique(written)) > 2
    content = json.loads((folder / f"{subject}_certificate.json").read_text())
    assert content["resampled"] is True
    assert "the file's own grid" in content["claim"]
    # the other setting is another row, and another certificate
    (plain,) = certify_files(tmp_path / "data", coarse, tmp_path / "out", seed=3, **OPTIONS)
    assert not torch.equal(plain.certificate.segmentation(), found.segmentation())
    assert pd.read_csv(tmp_path / "out" / "records.csv")["resampled"].tolist() == [False] * 3 + [True] * 3
    unknown = at_coarser_voxels(checkpoint, tmp_path / "unknown.pt", None)
    (done,) = certify_files(tmp_path / "data", unknown, tmp_path / "out", resample=True, **OPTIONS)
    assert "does not say at which spacing" in str(done.error)


def test_a_table_of_before_is_continued(tmp_path: Path, checkpoint: Path) -> None:
    make_cohort(tmp_path / "data", 1)
    (first,) = certify_files(tmp_path / "data", checkpoint, tmp_path / "out", **OPTIONS)
    path = tmp_path / "out" / "records.csv"
    before = pd.read_csv(path).drop(columns="resampled")
    before.to_csv(path, index=False)
    (again,) = certify_files(tmp_path / "data", checkpoint, tmp_path / "out", **OPTIONS)
    assert (first.error, again.error) == (None, None)
    assert len(pd.read_csv(path)) == 3


def test_the_table_keeps_other_settings_and_replaces_equal_ones(tmp_path: Path, checkpoint: Path) -> None:
    make_cohort(tmp_path / "data", 2)

    def run(**options: object) -> None:
        assert all(d.error is None for d in certify_files(tmp_path / "data", checkpoint, tmp_path / "out", **options))

    run(**OPTIONS)
    first = pd.read_csv(tmp_path / "out" / "records.csv")
    run(**OPTIONS)
    again = pd.read_csv(tmp_path / "out" / "records.csv")
    assert len(again) == 6
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), first.drop(columns="seconds"))
    run(**{**OPTIONS, "tau": 0.7}, subjects=["BraTS2021_00001"])
    assert len(pd.read_csv(tmp_path / "out" / "records.csv")) == 9


def test_a_bad_subject_costs_only_itself(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cohort(tmp_path / "data", 2)
    make_case(tmp_path / "data", "BraTS2021_00009", corrupt="nan")
    make_case(tmp_path / "data", "BraTS2021_00010", corrupt="missing")
    arguments = [str(tmp_path / "data"), "--checkpoint", str(checkpoint), "--sigma", "0.5", "-o", str(tmp_path / "out"),
                 "--samples", "60", "--draws0", "10", "--batch", "20"]  # fmt: skip
    assert call(monkeypatch, "certify", *arguments) == 1
    said = capsys.readouterr()
    assert "BraTS2021_00009" in said.err
    assert "BraTS2021_00010" in said.err
    assert "BraTS2021_00001: Certificate(radius=0.337" in said.out
    assert pd.read_csv(tmp_path / "out" / "records.csv")["subject"].nunique() == 2
    assert call(monkeypatch, "certify", *arguments, "--subject", "BraTS2021_00001") == 0
    assert call(monkeypatch, "certify", *arguments, "--subject", "nobody") == 1
    assert "nobody" in capsys.readouterr().err
    assert call(monkeypatch, "certify", *arguments, "--tau", "0.3") == 1
    assert "tau must be in" in capsys.readouterr().err


def test_too_few_samples_are_told(tmp_path: Path, checkpoint: Path) -> None:
    make_cohort(tmp_path / "data", 1)
    (done,) = certify_files(tmp_path / "data", checkpoint, tmp_path / "out", sigma=0.5, samples=20)
    assert "20 samples cannot certify" in str(done.error)
    with pytest.raises(ConfigError, match="sigma"):
        list(certify_files(tmp_path / "data", checkpoint, tmp_path / "out", sigma=-1.0))
