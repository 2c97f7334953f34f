"""A volume that is loaded, changed and written lies where it lay, in the same numbers, for every reader."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from builders import LABEL_VALUES, LPS, MODALITIES, brain_volumes, case_file, write_itk
from readers import Seen, with_itk, with_nibabel, with_simpleitk

from monai_adv.data import LabelScheme, brats_datalist, load_case, save_nifti, stored_type

SHAPE = (12, 14, 13)
PLACE = (2, 9, 4)  # of the voxel that is changed; no axis is symmetric about it
CHANGE = 3  # by how many stored numbers (or units, of real numbers)


def turned(spacing: tuple[float, float, float]) -> np.ndarray:
    """An affine oblique in all three axes."""
    a, b = 0.3, 0.2
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing)
    affine[:3, 3] = (11.25, -22.5, 33.125)
    return affine


@dataclass(frozen=True)
class Source:
    """How the files of a case are written.

    ``agree``: whether every reader takes the affine the header means (none does without codes, and they differ where
    sform and qform differ).
    """

    affine: np.ndarray
    codes: tuple[int, int] = (1, 1)  # sform, qform
    qform: np.ndarray | None = None
    dtype: str = "<i2"
    label_dtype: str = "<u1"
    scale: tuple[float, float] = (1.0, 0.0)
    suffix: str = ".nii.gz"
    version: int = 1
    agree: bool = True
    more: dict[str, Any] = field(default_factory=dict)


RAS, LAS = np.diag([1.0, 1, 1, 1]), np.diag([-1.0, 1, 1, 1])
SOURCES = {
    "LPS": Source(LPS),
    "RAS": Source(RAS),
    "LAS": Source(LAS),
    "oblique": Source(turned((-1.0, -1.0, 1.0))),
    "oblique anisotropic": Source(turned((-0.5, 1.0, 3.0)), codes=(2, 2)),
    "anisotropic": Source(LPS @ np.diag([0.5, 1.0, 3.0, 1.0])),
    "permuted": Source(turned((-1.0, 1.5, 2.0))[:, [2, 0, 1, 3]]),
    "qform only": Source(turned((-1.0, -1.2, 3.0)), codes=(0, 1)),
    "sform only": Source(turned((-1.0, -1.2, 3.0)), codes=(4, 0)),
    "different codes": Source(turned((-1.0, -1.2, 3.0)), codes=(1, 2)),
    "no codes": Source(LPS, codes=(0, 0), agree=False),
    "sform and qform differ": Source(turned((-1.0, -1.0, 1.0)), codes=(4, 1), qform=LPS, agree=False),
    "float32 with negatives": Source(turned((-1.0, -1.0, 2.0)), dtype="<f4"),
    "float64": Source(LPS, dtype="<f8"),
    "uint16 label": Source(LAS, label_dtype="<u2"),
    "int16 with slope and intercept": Source(LPS, scale=(0.5, -100.0)),
    "uint8 with slope": Source(LPS, dtype="|u1", scale=(4.0, 0.0)),
    "big-endian": Source(turned((-1.0, -1.2, 3.0)), dtype=">i2", label_dtype=">u2"),
    "big-endian float32": Source(LPS, dtype=">f4"),
    "big-endian with slope": Source(LPS, dtype=">i2", scale=(0.25, 8.0)),
    "not compressed": Source(LPS, suffix=".nii"),
    "NIfTI-2": Source(turned((-1.0, -1.2, 3.0)), version=2),
    "NRRD": Source(turned((-1.0, -1.2, 3.0)), suffix=".nrrd"),
    "MHA float32": Source(turned((1.0, -1.2, 3.0)), dtype="<f4", suffix=".mha"),
    "MHD": Source(RAS, dtype="<u2", suffix=".mhd"),
}


def write_source(path: Path, numbers: np.ndarray, source: Source, dtype: str, scale: tuple[float, float]) -> None:
    if ".nii" not in source.suffix:
        write_itk(path, numbers.astype(dtype), source.affine)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {1: (nib.Nifti1Image, nib.Nifti1Header), 2: (nib.Nifti2Image, nib.Nifti2Header)}
    image_class, header_class = kinds[source.version]
    header = header_class(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(dtype)
    image = image_class(numbers.astype(dtype), None, header)
    image.header.set_data_shape(numbers.shape)
    qform = source.affine if source.qform is None else source.qform
    image.header.set_qform(qform, code=source.codes[1])
    image.header.set_sform(source.affine, code=source.codes[0])
    if scale != (1.0, 0.0):
        image.header.set_slope_inter(*scale)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"Jane Doe"
    nib.save(image, path)


@dataclass(frozen=True)
class Trip:
    """Files of one modality and of the label, before and after."""

    source: Path
    same: Path
    changed: Path
    by_tensor: Path
    label: Path
    label_copy: Path


@pytest.fixture(scope="module")
def trips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trip]:
    """Every source written, loaded with load_case, and written: as it was, and with one voxel changed."""
    found = {}
    for name, source in SOURCES.items():
        root = tmp_path_factory.mktemp("case")
        volumes = brain_volumes(SHAPE, seed=len(found))
        for modality in MODALITIES:
            values = volumes[modality].astype(np.float64)
            if source.dtype[1] == "f":
                values = values / 7 - 40
            elif source.dtype[1:] == "u1":
                values = values // 8
            file = case_file(root, "BraTS2021_00000", modality, suffix=source.suffix)
            write_source(file, values, source, source.dtype, source.scale)
        numbers = np.asarray(LABEL_VALUES["2021"])[volumes["label"]]
        label = case_file(root, "BraTS2021_00000", "label", suffix=source.suffix)
        write_source(label, numbers, source, source.label_dtype, (1.0, 0.0))
        (item,) = brats_datalist(root)
        case = load_case(item)
        path, image = Path(item["image"][1]), case["image"]
        storage = stored_type(path)
        changed = image[1].as_tensor().clone()
        changed[PLACE] += CHANGE * (storage.quantum or 1.0)
        classes = LabelScheme.get("brats2021").from_classes(case["label"])
        found[name] = Trip(
            path,
            save_nifti(image[1], path, root / "out" / "same.nii.gz", storage=storage),
            save_nifti(changed, path, root / "out" / "changed.nii", storage=storage),
            save_nifti(changed, image, root / "out" / "tensor.nii.gz", storage=storage),
            label,
            save_nifti(classes, label, root / "out" / "label.nii.gz", storage=stored_type(label)),
        )
    return found


@pytest.fixture(scope="module")
def itk_saw(trips: dict[str, Trip], tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Seen]:
    written = [file for trip in trips.values() for file in (trip.changed, trip.by_tensor, trip.label_copy)]
    sources = [trip.source for name, trip in trips.items() if SOURCES[name].version == 1]
    return with_itk(written + sources, tmp_path_factory.mktemp("itk"))


def is_nifti(file: Path) -> bool:
    return ".nii" in file.name


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("which", ["same", "changed", "by_tensor"])
def test_header_and_numbers_survive(trips: dict[str, Trip], name: str, which: str) -> None:
    source, trip = SOURCES[name], trips[name]
    written = nib.load(getattr(trip, which))
    assert np.allclose(written.affine, source.affine, atol=1e-5) or name == "no codes"
    assert written.get_data_dtype() == np.dtype(source.dtype).newbyteorder("=")
    assert (written.dataobj.slope, written.dataobj.inter) == source.scale
    assert bytes(written.header["descrip"]).strip(b"\0") == b""
    assert not isinstance(written, nib.Nifti2Image)  # ITK reads none
    if is_nifti(trip.source):
        was = nib.load(trip.source)
        close = 0 if source.version == 1 else 1e-5  # bit for bit, but for the 64 bits of NIfTI-2
        assert np.allclose(written.affine, was.affine, rtol=0, atol=close)
        for field_name in ("sform_code", "qform_code", "xyzt_units"):
            assert int(written.header[field_name]) == int(was.header[field_name]), field_name
        assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == source.codes
        assert np.allclose(written.header.get_sform(), was.header.get_sform(), rtol=0, atol=close)
        assert np.allclose(written.header.get_qform(), was.header.get_qform(), rtol=0, atol=close)
        if not (name == "sform and qform differ" and which == "by_tensor"):
            assert np.allclose(written.header.get_zooms(), was.header.get_zooms(), rtol=0, atol=close)
        before = was.dataobj.get_unscaled().astype(np.float64)
    else:
        before = with_simpleitk(trip.source).array.astype(np.float64)
        assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 1)
    difference = written.dataobj.get_unscaled().astype(np.float64) - before
    expected = np.zeros(SHAPE)
    if which != "same":
        expected[PLACE] = CHANGE
    exact = source.dtype[1] != "f" or (which == "same" and source.dtype[2] == "4")
    assert np.allclose(difference, expected, atol=0 if exact else 1e-4, rtol=0)


@pytest.mark.parametrize("name", SOURCES)
def test_labels_survive(trips: dict[str, Trip], name: str) -> None:
    trip = trips[name]
    written = nib.load(trip.label_copy)
    before = with_nibabel(trip.label) if is_nifti(trip.label) else with_simpleitk(trip.label)
    assert written.get_data_dtype() == np.dtype(SOURCES[name].label_dtype).newbyteorder("=")
    assert np.array_equal(np.asarray(written.dataobj), before.array)
    assert np.allclose(written.affine, before.affine, atol=1e-5)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("reader", ["nibabel", "SimpleITK", "itk"])
def test_every_reader_sees_the_same_place_and_values(
    trips: dict[str, Trip], itk_saw: dict[Path, Seen], name: str, reader: str
) -> None:
    source, trip = SOURCES[name], trips[name]
    if reader == "nibabel" and not is_nifti(trip.source):
        pytest.skip("nibabel does not read the source")
    reads_source = reader == "nibabel" or source.version == 1

    def read(file: Path) -> Seen:
        if reader == "itk":
            return itk_saw[file]
        return with_simpleitk(file) if reader == "SimpleITK" else with_nibabel(file)

    before = read(trip.source) if reads_source else with_nibabel(trip.source)
    for file in (trip.changed, trip.by_tensor):
        after = read(file)
        assert np.allclose(after.affine[:3, 3], before.affine[:3, 3], atol=1e-4)
        assert np.allclose(after.affine[:3, :3], before.affine[:3, :3], atol=1e-5)
        if source.agree:
            assert np.allclose(after.affine, source.affine, atol=1e-4)
        difference = np.asarray(after.array, dtype=np.float64) - before.array
        rounding = 1e-4 if source.dtype[1] == "f" else 0
        unit = source.scale[0]
        assert abs(difference[PLACE] - CHANGE * unit) <= rounding
        difference[PLACE] = 0
        assert np.abs(difference).max() <= rounding
        flipped = [np.abs(np.flip(after.array, axis) - before.array).max() for axis in range(3)]
        assert min(flipped) > 10 * unit  # a flip would be seen: the volume has no symmetry
    assert np.allclose(read(trip.label_copy).affine, before.affine, atol=1e-4)
