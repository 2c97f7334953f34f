"""Fields of physical attacks as files: what ITK makes of the displacement is what the attack made of the image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import LPS, case_file, make_case, rewrite
from scipy.ndimage import binary_erosion
from scipy.spatial.transform import Rotation

from monai_adv.data import along_axes, load_displacement
from monai_adv.networks import SynthesisGenerator, save_generator
from monai_adv.studies.export import SUFFIX, attack_files

SUBJECT = "BraTS2021_00000"
SHAPE = (14, 16, 12)
DEFORMATION: dict[str, Any] = {"name": "deformation", "eps": 3.0, "steps": 1, "knot_mm": 12.0}
OBLIQUE = nib.affines.from_matvec(
    Rotation.from_euler("xyz", (10, -20, 35), degrees=True).as_matrix() * (-1, -1, 1.5), (9, 8, -7)
)
# the axes run to the front, downwards and to the left
PERMUTED = np.array([[0, 0, -1.2, 10], [0.9, 0, 0, -20], [0, -2.0, 0, 30], [0, 0, 0, 1]])


def attack(tmp_path: Path, checkpoint: Path, spec: dict[str, Any], **options: Any):
    (done,) = attack_files(tmp_path / "data", checkpoint, tmp_path / "out", spec, **options)
    assert done.error is None
    return done


def tiny_generator(path: Path) -> Path:
    """Without training, and with heads that say something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        effect = {"max_mm": 3.0, "knot_mm": 10.0, "residual_knot_mm": 10.0}
        generator = SynthesisGenerator(channels=(2, 2, 2), latent=1, effect=effect)
        for head in generator.heads.values():
            torch.nn.init.normal_(head.conv.weight, std=0.3)
    return save_generator(path, generator)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj, dtype=np.float64)


def written(done: Any, kind: str) -> np.ndarray:
    return np.stack([voxels(done.folder / f"{SUBJECT}_{ending}{kind}.nii.gz") for ending in SUFFIX.values()])


def clean(tmp_path: Path) -> np.ndarray:
    return np.stack([voxels(case_file(tmp_path / "data", SUBJECT, modality)) for modality in SUFFIX])


@pytest.mark.parametrize("affine", [LPS, OBLIQUE, PERMUTED], ids=["LPS", "oblique", "permuted and flipped"])
@pytest.mark.parametrize(
    "spec", [DEFORMATION, {"name": "affine", "steps": 1, "eps": 0.4}], ids=lambda spec: spec["name"]
)
def test_itk_warps_the_clean_image_to_the_moved_one(tmp_path, checkpoint, affine, spec):
    import SimpleITK as sitk

    make_case(tmp_path / "data", SUBJECT, affine=affine, shape=SHAPE)
    done = attack(tmp_path, checkpoint, spec, store="float32")
    assert done.displacement == done.folder / f"{SUBJECT}_displacement.nii.gz"
    field = sitk.ReadImage(str(done.displacement), sitk.sitkVectorFloat64)
    assert field.GetDimension() == 3
    assert field.GetNumberOfComponentsPerPixel() == 3
    transform = sitk.DisplacementFieldTransform(field)
    moved = nib.load(done.folder / f"{SUBJECT}_t1.nii.gz")
    for modality, ending in SUFFIX.items():
        source = sitk.ReadImage(str(case_file(tmp_path / "data", SUBJECT, modality)), sitk.sitkFloat64)
        foreground = sitk.Cast(source != 0, sitk.sitkFloat64)
        grid = sitk.ReadImage(str(done.folder / f"{SUBJECT}_{ending}.nii.gz"), sitk.sitkFloat64)
        theirs, share = (
            sitk.GetArrayFromImage(sitk.Resample(image, grid, transform, sitk.sitkLinear, 0.0)).transpose(2, 1, 0)
            for image in (source, foreground)
        )
        ours = voxels(done.folder / f"{SUBJECT}_{ending}.nii.gz")
        inside = binary_erosion(share > 0.999)  # values come from the foreground alone
        assert inside.sum() > 300
        assert np.abs(theirs - ours)[inside].max() < 0.05
        before = voxels(case_file(tmp_path / "data", SUBJECT, modality))
        assert np.abs(before - ours)[inside].max() > 50  # it is a warp
    for path in done.folder.glob("*.nii.gz"):
        assert sitk.ReadImage(str(path)).GetSpacing() == grid.GetSpacing(), path.name
    header = nib.load(done.displacement).header
    assert header.get_data_shape() == (*SHAPE, 1, 3)
    assert header.get_data_dtype() == np.float32
    assert int(header["intent_code"]) == 1007
    assert np.array_equal(nib.load(done.displacement).affine, moved.affine)
    assert bytes(header["intent_name"]).strip(b"\0") == b""


def test_the_displacement_is_in_millimetres_along_the_scanners_axes(tmp_path, checkpoint):
    """A pure translation limit: every voxel moves by the same vector, whatever the axes of the file."""
    make_case(tmp_path / "data", SUBJECT, affine=PERMUTED, shape=SHAPE)
    spec = {"name": "affine", "steps": 1, "max_rotation": 0, "max_scaling": 0, "max_translation": 4.0, "control": True}
    done = attack(tmp_path, checkpoint, spec)
    field, affine = load_displacement(done.displacement)
    moving = np.abs(field).sum(0) > 0
    assert np.allclose(np.abs(field[:, moving]), 4.0, atol=1e-5)
    assert np.allclose(np.ptp(field[:, moving], axis=1), 0, atol=1e-5)
    own = along_axes(field, affine)
    assert np.allclose(own[0], field[1])  # the file's first axis runs to the front
    assert np.allclose(own[1], -field[2])
    assert np.allclose(own[2], -field[0])
    # the label has moved by whole voxels along the file's own axes
    label, seg = voxels(case_file(tmp_path / "data", SUBJECT, "label")), voxels(done.folder / f"{SUBJECT}_seg.nii.gz")
    shift = [int(np.rint(-v[moving][0] / s)) for v, s in zip(own, nib.affines.voxel_sizes(affine))]
    rolled = np.roll(label, shift, axis=(0, 1, 2))
    middle = (slice(5, -5), slice(5, -5), slice(5, -5))
    assert np.array_equal(rolled[middle], seg[middle])


@pytest.mark.parametrize("affine", [LPS, PERMUTED], ids=["LPS", "permuted and flipped"])
def test_the_bias_is_the_factor_of_the_image(tmp_path, checkpoint, affine):
    make_case(tmp_path / "data", SUBJECT, affine=affine, shape=SHAPE)
    for path in (tmp_path / "data").rglob("*.nii.gz"):  # more air than the margin of the crop
        rewrite(lambda array, affine: (np.pad(array, 6), affine))(path)
    done = attack(tmp_path, checkpoint, {"name": "bias_field", "steps": 2, "bounds": None}, store="float32")
    before, after, factor = clean(tmp_path), written(done, ""), written(done, "_bias")
    assert np.allclose(before * factor, after, rtol=1e-5)
    assert (factor[before == 0] == 1).all()
    assert 1.01 < factor.max() <= 1.3 * (1 + 1e-6)
    assert done.displacement is None
    assert not list(done.folder.glob("*_displacement*"))


def test_another_attack_leaves_no_file_of_the_one_before(tmp_path, checkpoint):
    make_case(tmp_path / "data", SUBJECT, shape=SHAPE)
    attack(tmp_path, checkpoint, {"name": "bias_field", "steps": 1})
    done = attack(tmp_path, checkpoint, DEFORMATION)
    assert (done.folder / f"{SUBJECT}_seg.nii.gz").is_file()
    assert not list(done.folder.glob("*_bias.nii.gz"))
    done = attack(tmp_path, checkpoint, {"name": "fgsm", "eps": 0.5})
    left = {path.name for path in done.folder.glob("*.nii.gz")}
    assert len(left) == 4 + 4 + 2
    assert f"{SUBJECT}_seg.nii.gz" not in left


def test_sources_are_not_written_over(tmp_path, checkpoint):
    make_case(tmp_path / "data", SUBJECT, shape=SHAPE)
    (done,) = attack_files(tmp_path / "data", checkpoint, tmp_path / "data", {"name": "fgsm", "eps": 0.5})
    assert "holds the source files: choose another output folder" in done.error
    assert case_file(tmp_path / "data", SUBJECT, "label").is_file()


@pytest.mark.parametrize("affine", [LPS, OBLIQUE], ids=["LPS", "oblique"])
def test_a_synthesised_image_is_its_fields_applied_to_the_clean_one(tmp_path, checkpoint, affine):
    """Warped by ITK, times the bias, plus the residual."""
    import SimpleITK as sitk

    make_case(tmp_path / "data", SUBJECT, affine=affine, shape=SHAPE)
    generator = tiny_generator(tmp_path / "generator.pt")
    spec = {"name": "synthesis", "generator": str(generator), "drop": 0.5, "s_max": 10, "bounds": None, "grid": 2}
    done = attack(tmp_path, checkpoint, spec, store="float32")
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(done.displacement), sitk.sitkVectorFloat64))
    after, factor, added = (written(done, kind) for kind in ("", "_bias", "_residual"))
    assert np.abs(factor - 1).max() > 0.05
    assert np.abs(added).max() > 5
    for channel, modality in enumerate(SUFFIX):
        source = sitk.ReadImage(str(case_file(tmp_path / "data", SUBJECT, modality)), sitk.sitkFloat64)
        moved, share = (
            sitk.GetArrayFromImage(sitk.Resample(image, source, transform, sitk.sitkLinear, 0.0)).transpose(2, 1, 0)
            for image in (source, sitk.Cast(source != 0, sitk.sitkFloat64))
        )
        inside = binary_erosion(share > 0.999)
        assert inside.sum() > 150
        assert np.abs(moved - voxels(case_file(tmp_path / "data", SUBJECT, modality)))[inside].max() > 5
        assert np.abs(moved * factor[channel] + added[channel] - after[channel])[inside].max() < 0.1
        empty = after[channel] == 0
        assert (factor[channel][empty] == 1).all()
        assert (added[channel][empty] == 0).all()
    told = json.loads((done.folder / f"{SUBJECT}_attack.json").read_text())
    assert told["attack"]["generator"] == str(generator)
    assert told["attack"]["drop"] == 0.5
    assert {"drop", "scale", "min_jacobian", "max_displacement_mm"} <= set(told["details"])
    assert told["details"]["max_displacement_mm"] == pytest.approx(
        np.linalg.norm(load_displacement(done.displacement)[0], axis=0).max(), rel=1e-4
    )
    assert {f"{SUBJECT}_displacement.nii.gz", f"{SUBJECT}_t2_residual.nii.gz"} <= set(told["files"])
