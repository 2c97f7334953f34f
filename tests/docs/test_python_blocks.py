"""Every Python block of README and docs runs as it stands, the blocks of a page one after the other.

A block whose first line is ``# fragment: why`` does not run by itself and is only compiled. What a page takes for
granted (files, and names of earlier steps) is prepared here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import markdown_pages as md
import nibabel as nib
import numpy as np
import pytest
import torch
from builders import LPS, make_cohort
from monai.networks.nets import UNet
from monai.transforms import Compose, NormalizeIntensity
from victims_on_disk import tiny_checkpoint

from monai_adv.attacks import ATTACKS
from monai_adv.data import brats_datalist, load_case, save_displacement
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.networks import SynthesisGenerator, build_network, save_generator
from monai_adv.victims import Victim, load_victim

# The same steps on less: what stands in a page and what is run instead.
SMALLER = {
    "quickstart.md": [("spacing=2.5", "spacing=4.0")],
    "attacks.md": [("steps=50", "steps=4")],
    "defenses.md": [("samples=100", "samples=60"), ("draws0=100", "draws0=4"), ("samples=50", "samples=4"),
                    ("steps=10, draws=8", "steps=2, draws=2")],
    "scaling.md": [("steps=40", "steps=2")],
    "simulated_cohort.md": [("subjects=12, spacing=2.0", "subjects=2, spacing=4.0"),
                            ("subjects=8", "subjects=1, spacing=4.0"),
                            ("Geometry.brats()", "Geometry.from_spacing(4.0)"),
                            ("from_spacing(2.5)", "from_spacing(4.0)")],
    "synthesis.md": [("minutes=30", "steps=1, epoch_steps=1, patch=(8, 8, 8)")],
    "my_network.md": [("roi_size=[96, 96, 96]", "roi_size=[16, 16, 16]"), ("(96, 96, 96)", "(16, 16, 16)")],
}  # fmt: skip
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
ELSEWHERE = {"workflows.md"}  # tests/engines/test_workflows_page.py runs it on a cohort that fits it
PAGES = [page for page in md.pages() if any(b.info == "python" for b in md.blocks(page.read_text(encoding="utf-8")))]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder with what the pages read, and the names that they have from "your" pipeline."""
    make_cohort(tmp_path / "BraTS2021", 3)
    tiny_checkpoint(tmp_path / "unet.pt", steps=20)
    monkeypatch.chdir(tmp_path)
    items = brats_datalist("BraTS2021")
    case = load_case(items[0])
    victim = load_victim("unet.pt")
    image, label = case["image"][None], case["label"][None].as_tensor()
    torch.save((image.as_tensor(), label), "case.pt")
    for name in ("victim.pt", "noise.pt"):
        Path(name).write_bytes(Path("unet.pt").read_bytes())
    segresnet = {"name": "SegResNet", "spatial_dims": 3, "in_channels": 4, "out_channels": 3, "init_filters": 16}
    torch.save(build_network(segresnet).state_dict(), "weights.pth")
    save_generator("generator.pt", SynthesisGenerator(3, 4, channels=(4, 4, 8)))
    nib.save(nib.load(items[0]["image"][0]), "t1.nii.gz")
    nib.save(nib.load(items[0]["image"][0]), "BraTS2021_00000_t1.nii.gz")
    nib.save(nib.Nifti1Image(case["label"][0].numpy(), LPS), "seg.nii.gz")
    save_displacement(np.zeros((3, *image.shape[2:])), items[0]["image"][0], "BraTS2021_00000_displacement.nii.gz")
    return {
        "__name__": "a_page",
        "items": items,
        "case": case,
        "image": image,
        "label": label,
        "victim": victim,
        "network": victim.network,
        "inferer": GradientSlidingWindowInferer((8, 8, 8), 2, 0.25),
        "Victim": Victim,
        "deployed_compose": Compose([NormalizeIntensity(nonzero=True, channel_wise=True)]),
        "show": lambda preview: None,
    }


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in ELSEWHERE], ids=lambda p: str(p.relative_to(md.ROOT))
)
def test_the_python_of_a_page_runs(page: Path, prepared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    text, names = page.read_text(encoding="utf-8"), prepared
    for large, small in SMALLER.get(page.name, []):
        assert large in text, f"{page.name} has no {large} any more"
        text = text.replace(large, small)
    if page.name == "preprocessing.md":  # one file, one channel
        names["network"] = UNet(3, 1, 4, (4, 8), (2,), norm="instance")
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value)) if page.name == "scaling.md" else None
    known = set(ATTACKS)
    try:
        for block in md.blocks(text):
            if block.info != "python":
                continue
            where = f"{page.name} from line {block.line}"
            code = compile("\n" * block.line + block.text, where, "exec")
            if not block.fragment:
                exec(code, names)
    finally:
        for name in set(ATTACKS) - known:
            del ATTACKS[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(md.ROOT)))
def test_fragments_say_why(page: Path) -> None:
    for block in md.blocks(page.read_text(encoding="utf-8")):
        assert not re.search(r"^#\s*fragment(?!: \w+)", block.text, flags=re.MULTILINE | re.IGNORECASE), block.line
