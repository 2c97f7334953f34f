"""The statistics of the certificate against SciPy and the stats layer; abstention, Dice and files."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.stats import binomtest

from monai_adv.defenses import ABSTAIN, Certificate
from monai_adv.defenses.certificate import adjusted_pvalues, count_pvalues, radius, samples_needed
from monai_adv.errors import ConfigError
from monai_adv.stats import holm
from monai_adv.victims import Head


@pytest.mark.parametrize(("samples", "tau"), [(1, 0.5), (17, 0.75), (100, 0.75), (60, 0.95), (447, 0.95)])
def test_pvalues_of_counts_are_scipys_binomial_test(samples: int, tau: float) -> None:
    found = count_pvalues(samples, tau)
    expected = [binomtest(k, samples, tau, alternative="greater").pvalue for k in range(samples + 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (np.diff(found) <= 0).all()


@pytest.mark.parametrize("seed", range(8))
def test_holm_on_the_histogram_is_holm_on_the_voxels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples, tau = 40, (0.5, 0.75, 0.9, 0.6)[seed % 4]
    chance = np.where(rng.random(500) < 0.5, 1.0, rng.random(500))
    hits = rng.binomial(samples, chance)
    pvalues, histogram = count_pvalues(samples, tau), np.bincount(hits, minlength=samples + 1)
    assert np.array_equal(adjusted_pvalues(histogram, pvalues)[hits], holm(pvalues[hits]))
    bonferroni = adjusted_pvalues(histogram, pvalues, "bonferroni")[hits]
    assert np.array_equal(bonferroni, np.minimum(1, 500 * pvalues[hits]))
    assert np.isnan(adjusted_pvalues(histogram, pvalues)[histogram == 0]).all()
    with pytest.raises(ConfigError, match="holm, bonferroni"):
        adjusted_pvalues(histogram, pvalues, "hochberg")


def test_the_published_radii_and_sample_sizes() -> None:
    assert [round(radius(0.25, tau), 3) for tau in (0.75, 0.85, 0.95, 0.99)] == [0.169, 0.259, 0.411, 0.582]
    assert radius(0.25, 0.5) == 0
    voxels = 240 * 240 * 155
    for tau, needed in ((0.75, 80), (0.95, 447)):
        assert samples_needed(voxels, tau) == needed
        assert voxels * count_pvalues(needed, tau)[-1] <= 1e-3 < voxels * count_pvalues(needed - 1, tau)[-1]


def certificate(head: str = "softmax", tau: float = 0.75, correction: str = "holm", samples: int = 60) -> Certificate:
    """Eight voxels; the hits fall from all to none."""
    hits = torch.tensor([60, 60, 58, 55, 50, 30, 10, 0]).view(1, 1, 2, 2, 2)
    if head == "softmax":
        prediction = torch.tensor([0, 1, 2, 3, 3, 0, 1, 2]).view(1, 1, 2, 2, 2)
    else:
        prediction = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool).view(1, 1, 2, 2, 2).expand(1, 3, 2, 2, 2)
        hits = torch.cat([hits, torch.full_like(hits, 60), hits.flatten().flip(0).view_as(hits)], 1)
    foreground = torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)
    foreground.view(-1)[:4] = True
    return Certificate(
        prediction=prediction, hits=hits.to(torch.uint16), foreground=foreground, head=Head(head), sigma=0.25, tau=tau,
        samples=samples, draws0=10, alpha=1e-3, correction=correction,
    )  # fmt: skip


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_who_abstains(head: str) -> None:
    for correction in ("holm", "bonferroni"):
        found = certificate(head, correction=correction)
        raw = np.array([binomtest(int(k), 60, 0.75, alternative="greater").pvalue for k in found.hits.flatten()])
        adjusted = holm(raw) if correction == "holm" else np.minimum(1, raw.size * raw)
        np.testing.assert_allclose(found.pvalues.flatten(), adjusted, rtol=1e-9)
        assert found.abstained.flatten().tolist() == (adjusted > 1e-3).tolist()
        assert found.abstention == pytest.approx((adjusted > 1e-3).mean())
    assert found.foreground_abstention == pytest.approx(found.abstained[:, :, 0].float().mean().item())
    # Holm rejects what Bonferroni does, and these hits show that it may be more
    assert certificate(head, correction="holm").abstention <= certificate(head, correction="bonferroni").abstention


def test_abstention_grows_with_tau() -> None:
    shares = [certificate(tau=tau).abstention for tau in (0.5, 0.75, 0.85, 0.9, 0.99)]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] < shares[-1] == 1


def test_certified_dice_counts_abstention_as_wrong() -> None:
    found = certificate()
    assert found.abstained.flatten().tolist() == [False] * 3 + [True] * 5
    truth = torch.tensor([0, 1, 2, 3, 1, 2, 0, 0]).view(1, 1, 2, 2, 2)
    rows = {row["region"]: row for row in found.scores(truth)}
    # WT: truth at 1-5, predicted at 1-4, 6, 7; certified at 1, 2; abstaining: 3, 4, 5 missed and 6, 7 false alarms
    assert rows["WT"]["smoothed_dice"] == pytest.approx(2 * 4 / (5 + 6))
    assert rows["WT"]["certified_dice"] == pytest.approx(2 * 2 / (5 + 4))
    assert rows["WT"]["certified_dice_missed"] == pytest.approx(2 * 2 / (5 + 2))
    assert rows["WT"]["abstained_true"] == pytest.approx(3 / 5)
    # ET: truth at 3 (abstains), four more abstain
    assert rows["ET"]["certified_dice"] == 0
    assert rows["ET"]["abstained_true"] == 1
    outside = {row["region"]: row for row in found.scores(truth, {"WT": 4})}
    assert outside["WT"]["certified_dice"] == pytest.approx(2 * 2 / (9 + 4))
    assert outside["ET"] == rows["ET"]
    # the worst that voxels without a certificate can do: no segmentation that keeps the certified ones scores lower
    worst = min(
        {r["region"]: r for r in _with(found, values).scores(truth)}["WT"]["smoothed_dice"]
        for values in np.ndindex(4, 4, 4, 4, 4)
    )
    assert worst == pytest.approx(rows["WT"]["certified_dice"])
    empty = {row["region"]: row for row in found.scores(torch.zeros_like(truth))}
    assert math.isnan(empty["ET"]["abstained_true"])


def _with(found: Certificate, values: tuple[int, ...]) -> Certificate:
    prediction = found.prediction.clone()
    prediction[found.abstained] = torch.tensor(values)
    return Certificate(**{**{n: getattr(found, n) for n in found.__dataclass_fields__}, "prediction": prediction})


def test_channels_of_a_sigmoid_head_abstain_for_themselves() -> None:
    found = certificate("sigmoid")
    truth = found.prediction.clone()
    rows = {row["region"]: row for row in found.scores(truth)}
    assert rows["WT"]["certified_dice"] == 1
    assert rows["TC"]["certified_dice"] < 1
    assert rows["TC"]["smoothed_dice"] == 1
    classes = found.segmentation()
    assert torch.equal(classes == ABSTAIN, found.abstained.any(1, keepdim=True))
    assert classes.dtype == torch.uint8


def test_the_files_hold_the_segmentation_and_where_it_abstains(tmp_path: Path) -> None:
    found = certificate()
    like = MetaTensor(torch.zeros(1, 2, 2, 4), affine=torch.diag(torch.tensor([-1.0, 2.0, 3.0, 1.0])))

    def restore(data: torch.Tensor) -> torch.Tensor:
        full = data.new_zeros(1, 2, 2, 4)
        full[..., 1:3] = data
        return full

    segmentation, abstention = (nib.load(p) for p in found.save(tmp_path, like, "case", restore))
    values = np.asarray(segmentation.dataobj)
    assert values.dtype == np.uint8
    assert values[:, :, 1:3].ravel().tolist() == [0, 1, 2] + [255] * 5
    assert (values[:, :, [0, 3]] == 0).all()
    assert np.array_equal(np.asarray(abstention.dataobj), (values == 255))
    assert np.array_equal(segmentation.affine, like.affine)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case_abstention.nii.gz", "case_segmentation.nii.gz"]
    assert found.save(tmp_path, MetaTensor(torch.zeros(1, 2, 2, 2)))[0].name == "certified_segmentation.nii.gz"
    with pytest.raises(ConfigError, match="class 255 cannot be told from abstention"):
        _with(found, (255, 0, 0, 0, 0)).segmentation()
    assert "radius=0.169" in repr(found)
    assert found.describe()["tests"] == 8
