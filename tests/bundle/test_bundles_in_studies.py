"""A bundle as the victim of a study: attacked on the files' voxels, through its own preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from zoo_bundle import make_bundle

from monai_adv.bundle import bundle_hash, load_bundle, scan_victim
from monai_adv.data import brats_datalist, load_case
from monai_adv.errors import ConfigError
from monai_adv.studies import load_study, run_study
from monai_adv.studies.config import study_from


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("study"))


def study(folder: Path, output: Path, **victim: Any) -> dict[str, Any]:
    entry = {"name": "zoo", "bundle": str(folder), "trust": bundle_hash(folder), **victim}
    return {
        "data": {"root": str(folder.parent / "data"), "orientation": None, "crop": None},
        "victims": [{k: v for k, v in entry.items() if v is not None}],
        "attacks": [{"name": "fgsm"}],
        "budgets": {"eps": [0.5]},
        "figures": {"montages": 1},
        "output": str(output),
    }


def test_the_victim_takes_scans_in_canonical_order(bundle: Path) -> None:
    found = load_bundle(bundle, bundle_hash(bundle))
    victim = scan_victim(found)
    case = load_case(brats_datalist(bundle.parent / "data")[0])
    image = case["image"][None]
    expected = found.logits(found.preprocessing(found.items()[0])["image"][None])
    torch.testing.assert_close(victim(image), expected, rtol=1e-4, atol=1e-4)
    data = found.preprocessing(found.items()[0])["image"][None].as_tensor()
    torch.testing.assert_close(victim.preprocessing(image), data, rtol=1e-5, atol=1e-5)  # type: ignore[misc]
    leaf = image.as_tensor().requires_grad_(True)
    (gradient,) = torch.autograd.grad(victim(leaf).square().sum(), leaf)
    assert gradient.any()
    assert victim.preprocessing is not None
    assert not victim.preprocessing.changes_grid  # type: ignore[attr-defined]
    support = torch.zeros_like(leaf, dtype=torch.bool)
    support[:, 1, 6:8] = True
    rule = victim.preprocessing.gradient_support  # type: ignore[attr-defined]
    corner = torch.zeros_like(support)
    corner[:, 1, 0, 0, 0] = True  # T1c in the background
    assert rule(leaf.detach(), corner)[0, :, 0, 0, 0].tolist() == [True, False, False, False]  # the network's first
    with victim.attacked(support, leaf.detach()):
        (restricted,) = torch.autograd.grad(victim(leaf).square().sum(), leaf)
    torch.testing.assert_close(restricted[support], gradient[support], rtol=1e-4, atol=1e-6)


def test_a_study_of_a_bundle(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study(bundle, tmp_path / "run")))
    result = run_study(load_study(file))
    assert (result.computed, result.problems) == (4, [])
    table = pd.read_csv(tmp_path / "run" / "records.csv")
    dice = table.groupby(["attack", "region"])["dice"].mean()
    assert all(dice["clean"] > 0.7)
    assert dice["fgsm"].sum() < dice["clean"].sum() - 0.1
    assert run_study(load_study(file)).reused == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "unet.pt"}, "either a checkpoint or a bundle"),
        ({"bundle": None, "trust": None}, "either a checkpoint or a bundle"),
        ({"bundle": None, "checkpoint": "unet.pt"}, "trust goes with a bundle"),
        ({"overlap": 0.25}, "overlap: a bundle says how it is deployed"),
        ({"resample": True}, "resample: a bundle says how it is deployed"),
    ],
)
def test_wrong_entries(bundle: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_from(study(bundle, tmp_path, **changes))


def test_a_bundle_without_trust_stops_the_study(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--trust"):
        run_study(study_from(study(bundle, tmp_path / "run", trust=None)))
    with pytest.raises(ConfigError, match="not the trusted"):
        run_study(study_from(study(bundle, tmp_path / "run", trust="0" * 64)))
