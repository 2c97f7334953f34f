from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import make_case
from torch import nn

from monai_adv.attacks import create
from monai_adv.data import scan
from monai_adv.inferers import GradientSlidingWindowInferer, ResampledInferer, SlicewiseInferer
from monai_adv.studies import Shard, cases, run_study, study_from
from monai_adv.studies.config import DataConfig
from monai_adv.studies.cost import Passes, header_shape, passes, windows
from monai_adv.studies.plan import study_settings
from monai_adv.studies.runner import make_plan
from monai_adv.studies.units import read_checked
from monai_adv.victims import MirrorInferer, Victim

# of the version before there were plans: a run folder of then is still finished
KEYS = {
    ("clean", 0.0): "1826744df925ea97044e2fbdc959b0a60e6fd1d96fb1aeaedf8085cacae836c9",
    ("noise", 0.2): "f26f6e32fd2a9af17aaa045a179016c80916cf4a7b1dad0b141374ab4a646a65",
    ("noise", 0.8): "9f6a33d1d6a012153c87fb91a836d91257cf9bea4900e08a0d7e83045d2e4aed",
    ("ifgsm", 0.2): "489e434345dfcfcad5f094a0e763b513e89400fec8083453580a2bf258df48bb",
    ("ifgsm", 0.8): "76766e603031e09a70f1c3075c7001958259aef53d288f2f9577d67b211118fd",
    ("hide", 0.2): "83b36a5a59aa0a9ada6a1b7206b5912009a92976792cee426ebac7a0be31ae3d",
    ("hide", 0.8): "77a1f8bbb53fb24a68fab7ac24d44ee186ba5800a64af6e27ee62d65b89014b3",
    ("bias_field", 0.2): "310d70a0b431059bfaaee573cd91d2fd7b985473348dd5ae8e4089fb058cdc1d",
}


def test_the_keys_of_units_have_not_changed() -> None:
    study = study_from(
        {
            "data": {"root": "cohort", "crop": 1, "subjects": ["s"]},
            "victims": [{"name": "tiny", "checkpoint": "tiny.pt"}],
            "attacks": [
                {"name": "noise"},
                {"name": "ifgsm", "steps": 3, "only": ["tiny"]},
                {"name": "targeted_ifgsm", "label": "hide", "loss": "ce"},
                {"name": "bias_field", "eps": [0.2]},
            ],
            "budgets": {"eps": [0.2, 0.8], "units": "std", "support": "all"},
            "seed": 3,
            "output": "run",
        }
    )
    groups = study_settings(study, {"tiny": None}, {"tiny": "v" * 64}, {"hide": "m" * 64})
    found = {(s.attack, s.eps): s.key("BraTS2021_00001", "c" * 64, study.seed) for group in groups for s in group}
    assert found == KEYS
    assert list(found) == list(KEYS)  # and stand in the order of the study


def test_units_and_what_is_stored_of_them(content: dict[str, Any], tmp_path: Path) -> None:
    plan = make_plan(study_from(content))
    assert not (tmp_path / "run").exists()  # it was only looked at
    assert plan.total == 21
    plan.read_keys()
    units = [unit for _, groups in plan.units() for group in groups for unit in group]
    assert len({unit.key for unit in units}) == 21
    assert [u.setting.attack for u in units[:7]] == ["clean", *["noise"] * 2, *["fgsm"] * 2, *["ifgsm"] * 2]
    run_study(study_from(content))
    stored = {path.stem: read_checked(path)["key"] for path in (tmp_path / "run" / "units").rglob("*.json")}  # type: ignore[index]
    assert set(stored.values()) == {unit.key for unit in units}


def test_shards_have_one_plan_and_each_unit_once(content: dict[str, Any]) -> None:
    study = study_from(content)
    plans = [make_plan(study, Shard(index, 3)) for index in (1, 2, 3)]
    assert len({plan.digest for plan in plans}) == 1
    found = []
    for plan in plans:
        plan.read_keys()
        found += [unit.key for _, groups in plan.units() for group in groups for unit in group]
    assert len(found) == len(set(found)) == 21
    changed = study_from({**content, "attacks": [*content["attacks"][:-1], {"name": "ifgsm", "steps": 4}]})
    assert make_plan(changed).digest != plans[0].digest


class _Counted(nn.Module):
    def __init__(self, dims: int = 3) -> None:
        super().__init__()
        self.layer = (nn.Conv3d if dims == 3 else nn.Conv2d)(4, 4, 1)
        self.windows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.windows += len(x)
        return self.layer(x)


@pytest.mark.parametrize("shape", [(14, 16, 12), (8, 8, 8), (5, 20, 9)])
@pytest.mark.parametrize("kind", ["windows", "whole", "resampled", "mirrored", "slices"])
def test_windows_are_those_the_network_sees(kind: str, shape: tuple[int, int, int]) -> None:
    network = _Counted(2 if kind == "slices" else 3)
    inferer: Any = GradientSlidingWindowInferer((8, 8) if kind == "slices" else (8, 8, 8), 2, overlap=0.25)
    if kind == "resampled":
        inferer = ResampledInferer(inferer, (1.0, 1.0, 1.0), (2.0, 1.0, 0.5))
    elif kind == "mirrored":
        inferer = MirrorInferer(inferer, axes=(0, 1))
    elif kind == "slices":
        inferer = SlicewiseInferer(inferer)
    victim = Victim(network, None if kind == "whole" else inferer)
    with torch.no_grad():
        victim(torch.randn(1, 4, *shape))
    assert windows(victim, shape) == network.windows


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("noise", {}),
        ("noise", {"repeats": 3}),
        ("fgsm", {}),
        ("ifgsm", {"steps": 4}),
        ("pgd", {"steps": 3, "restarts": 2}),
        ("pgd", {"steps": 3, "draws": 2}),
        ("apgd", {"steps": 6}),
        ("sea", {"steps": 6}),
        ("ensemble", {"attacks": ["fgsm", {"name": "pgd", "steps": 3}]}),
        ("square", {"queries": 20}),
        ("gamma", {"steps": 3}),
        ("vafa", {"steps": 3}),
        ("asma", {"steps": 4, "target": "background"}),
    ],
)
def test_declared_passes_are_about_those_taken(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    victim = Victim(nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 1)))
    image = torch.rand(1, 4, 8, 8, 8) + 0.1
    label = torch.randint(0, 4, (1, 1, 8, 8, 8))
    attack = create(name, eps=0.1, **options)
    cost = attack(victim, image, label).cost
    declared, taken = passes(attack).total, cost.forwards + cost.backwards
    assert 0.8 <= declared / taken <= 1.25, (declared, taken)


def test_a_forward_is_one_pass_and_a_gradient_two() -> None:
    assert passes(create("ifgsm", eps=0.1, steps=10)) == Passes(2, 10)
    assert Passes(2, 10).total == 22


def test_the_shape_of_the_header_is_that_of_the_loaded_image(tmp_path: Path) -> None:
    axes = nib.orientations.axcodes2ornt(tuple("PIR"))
    affine = nib.orientations.inv_ornt_aff(axes, (14, 16, 12)) @ np.diag([2.0, 1.5, 3.0, 1.0])
    make_case(tmp_path, "BraTS2021_00000", affine=affine)
    item = scan(tmp_path).items[0]
    for codes in ("RAS", "LSP", None):
        case = cases.load(item, DataConfig(root=tmp_path, crop=None, orientation=codes))
        found = header_shape(item, codes)
        assert found is not None
        assert found[0] == tuple(case.image.shape[2:])
        assert found[1] == pytest.approx(case.spacing)
    Path(item["image"][0]).write_bytes(b"")
    assert header_shape(item, "RAS") is None
