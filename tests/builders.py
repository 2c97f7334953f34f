"""Small cohorts of image files, sound or broken on purpose, for the tests of every folder."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

MODALITIES = ("T1", "T1c", "T2", "FLAIR")
ENDINGS = {
    "2021": {"T1": "_t1", "T1c": "_t1ce", "T2": "_t2", "FLAIR": "_flair", "label": "_seg"},
    "2023": {"T1": "-t1n", "T1c": "-t1c", "T2": "-t2w", "FLAIR": "-t2f", "label": "-seg"},
}
# canonical class index -> number in the file
LABEL_VALUES = {"2021": (0, 1, 2, 4), "2023": (0, 1, 2, 3), "msd": (0, 2, 1, 3)}
MSD_ORDER = ("FLAIR", "T1", "T1c", "T2")
LPS = np.array([[-1.0, 0, 0, 20], [0, -1.0, 0, 30], [0, 0, 1.0, -5], [0, 0, 0, 1]])


def brain_volumes(shape: tuple[int, int, int] = (14, 16, 12), seed: int = 0) -> dict[str, np.ndarray]:
    """Four int16 modalities with a zero background and ``"label"``, canonical classes of nested spheres (ED, NCR, ET).

    Every class is there for shapes of at least 12 voxels; each modality has its own contrast.
    """
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    brain = sum(axis**2 for axis in axes) < 0.9
    radius = np.sqrt(sum((axis - offset) ** 2 for axis, offset in zip(axes, (0.2, -0.1, 0.1))))
    label = np.zeros(shape, dtype=np.uint8)
    for size, index in ((0.6, 2), (0.42, 3), (0.25, 1)):
        label[radius < size] = index
    label[~brain] = 0
    contrast = {"T1": (400, 300, 350, 420), "T1c": (400, 320, 380, 900), "T2": (300, 700, 600, 500)}
    contrast["FLAIR"] = (300, 350, 800, 600)
    volumes = {"label": label}
    for modality in MODALITIES:
        values = np.asarray(contrast[modality])[label] + rng.normal(0, 30, shape)
        volumes[modality] = np.where(brain, np.maximum(values, 1), 0).astype(np.int16)
    return volumes


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray = LPS, sform: int = 1, qform: int = 1) -> Path:
    """Write with nibabel alone, so that the package's own writer is not its own judge."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.header.set_sform(affine, code=sform)
    image.header.set_qform(affine, code=qform)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray = LPS, compress: bool = True) -> Path:
    """Write NRRD or MetaImage with SimpleITK alone; the affine is RAS, three or four axes x, y, z(, channel)."""
    import SimpleITK as sitk

    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T), isVector=False)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing, direction = np.linalg.norm(lps[:3, :3], axis=0), np.eye(array.ndim)
    direction[:3, :3] = lps[:3, :3] / spacing
    more = [0.0] * (array.ndim - 3)
    image.SetSpacing([*map(float, spacing), *(1.0 for _ in more)])
    image.SetOrigin([*map(float, lps[:3, 3]), *more])
    image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(path), compress)
    return path


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray = LPS) -> Path:
    """Write in the format of the name."""
    return write_nifti(path, array, affine) if ".nii" in path.name else write_itk(path, array, affine)


def case_file(root: Path, subject: str, role: str, naming: str = "2021", suffix: str = ".nii.gz") -> Path:
    """Where a file of a case lies: role is a modality or ``"label"``."""
    if naming == "msd":
        return root / ("labelsTr" if role == "label" else "imagesTr") / f"{subject}{suffix}"
    return root / subject / f"{subject}{ENDINGS[naming][role]}{suffix}"


def make_case(
    root: Path,
    subject: str = "BraTS2021_00000",
    *,
    naming: str = "2021",
    shape: tuple[int, int, int] = (14, 16, 12),
    affine: np.ndarray = LPS,
    seed: int = 0,
    label: bool = True,
    label_dtype: Any = np.uint8,
    suffix: str = ".nii.gz",
    corrupt: str | None = None,
    role: str = "T1c",
) -> dict[str, np.ndarray]:
    """Write one case.

    Args:
        root: folder of the cohort.
        subject: case ID.
        naming: ``"2021"`` (also 2017-2020), ``"2023"`` or ``"msd"``: file names and label values.
        shape, affine, seed: of the volumes.
        label: whether a label is written.
        label_dtype: type of the label file.
        suffix: ``".nii.gz"``, ``".nii"``, ``".nrrd"``, ``".mha"`` or ``".mhd"``.
        corrupt: a key of :data:`CORRUPTIONS` (or :data:`ITK_CORRUPTIONS`, by the suffix) to apply to one file.
        role: the modality (or ``"label"``) whose file is corrupted.

    Returns:
        What was written before the corruption: modality -> int16 array, ``"label"`` -> canonical class indices.
    """
    volumes = brain_volumes(shape, seed)
    if naming == "msd":
        four = np.stack([volumes[name] for name in MSD_ORDER], axis=-1)
        write_volume(case_file(root, subject, "image", naming, suffix), four, affine)
        modality = {str(index): name for index, name in enumerate(("FLAIR", "T1w", "t1gd", "T2w"))}
        labels = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
        (root / "dataset.json").write_text(json.dumps({"modality": modality, "labels": labels}))
    else:
        for name in MODALITIES:
            write_volume(case_file(root, subject, name, naming, suffix), volumes[name], affine)
    if label:
        numbers = np.asarray(LABEL_VALUES[naming])[volumes["label"]].astype(label_dtype)
        write_volume(case_file(root, subject, "label", naming, suffix), numbers, affine)
    if corrupt is not None:
        broken = CORRUPTIONS if ".nii" in suffix else ITK_CORRUPTIONS
        broken[corrupt](case_file(root, subject, role, naming, suffix))
    return volumes


def make_cohort(root: Path, n: int = 3, *, naming: str = "2021", **kwargs: Any) -> list[str]:
    """Write ``n`` sound cases with different seeds; returns their subject IDs."""
    pattern = {"2021": "BraTS2021_{:05d}", "2023": "BraTS-GLI-{:05d}-000", "msd": "BRATS_{:03d}"}[naming]
    subjects = [pattern.format(index) for index in range(n)]
    for seed, subject in enumerate(subjects):
        make_case(root, subject, naming=naming, seed=seed, **kwargs)
    return subjects


def rewrite(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        image = nib.load(path)
        array, affine = change(np.asarray(image.dataobj), image.affine.copy())
        path.unlink()
        write_nifti(path, array, affine)

    return apply


def _rebytes(change: Callable[[bytes], bytes], unpacked: bool = False) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = path.read_bytes()
        packed = unpacked and path.suffix == ".gz"
        content = change(gzip.decompress(content) if packed else content)
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)

    return apply


def _claim(size: int) -> Callable[[bytes], bytes]:
    """A header whose three axes have the given size, in front of the voxels that were there."""
    return lambda content: content[:42] + np.array([size] * 3, "<i2").tobytes() + content[48:]


def _set(value: float, dtype: Any = np.float32) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def change(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        array = array.astype(dtype)
        array[tuple(size // 2 for size in array.shape)] = value
        return array, affine

    return change


def _shift(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    affine[0, 3] += 0.01
    return array, affine


CORRUPTIONS: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "truncated": _rebytes(lambda content: content[: len(content) // 2]),
    "checksum_cut": _rebytes(lambda content: content[:-4]),
    "bit_flip": _rebytes(lambda content: content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]),
    "short": _rebytes(lambda content: content[:-100], unpacked=True),
    "not_nifti": lambda path: path.write_bytes(gzip.compress(b"this is no image" * 100)),
    "insane_header": _rebytes(_claim(32000), unpacked=True),
    "boastful_header": _rebytes(_claim(200), unpacked=True),
    "four_axes": rewrite(lambda array, affine: (np.stack([array, array], -1), affine)),
    "shape": rewrite(lambda array, affine: (array[:-1], affine)),
    "affine": rewrite(_shift),
    "orientation": rewrite(lambda array, affine: (array, affine @ np.diag([-1.0, 1, 1, 1]))),
    "spacing": rewrite(lambda array, affine: (array, affine @ np.diag([1, 1, 1.01, 1]))),
    "nan": rewrite(_set(np.nan)),
    "inf": rewrite(_set(np.inf)),
    "zero": rewrite(lambda array, affine: (np.zeros_like(array), affine)),
    "constant": rewrite(lambda array, affine: (np.full_like(array, 7), affine)),
    "label_value": rewrite(_set(7, np.uint8)),
    "label_fraction": rewrite(_set(1.5)),
}
"""Ways to break one file: name -> function of its path."""


def rewrite_itk(
    change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Callable[[Path], None]:
    """As :func:`rewrite`, for NRRD and MetaImage."""

    def apply(path: Path) -> None:
        import SimpleITK as sitk

        image = sitk.ReadImage(str(path))
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
        affine[:3, 3] = image.GetOrigin()
        array, affine = change(sitk.GetArrayFromImage(image).T, np.diag([-1.0, -1, 1, 1]) @ affine)
        write_itk(path, array, affine)

    return apply


def _replace(old: bytes, new: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return apply


def _claim_itk(size: int) -> Callable[[Path], None]:
    """Another first size in the text header: of the builders' volumes, which are 14 voxels wide."""

    def apply(path: Path) -> None:
        name = b"sizes: " if path.suffix == ".nrrd" else b"DimSize = "
        _replace(name + b"14 ", name + b"%d " % size)(path)

    return apply


ITK_CORRUPTIONS: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "truncated": _rebytes(lambda content: content[: len(content) * 3 // 4]),
    "header_cut": _rebytes(lambda content: content[:60]),
    "checksum_cut": _rebytes(lambda content: content[:-2]),
    "bit_flip": _rebytes(lambda content: content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]),
    "not_an_image": lambda path: path.write_bytes(b"this is no image" * 100),
    "insane_header": _claim_itk(2_000_000_000),
    "boastful_header": _claim_itk(15),
    "four_axes": rewrite_itk(lambda array, affine: (np.stack([array, array], -1), affine)),
    "shape": rewrite_itk(lambda array, affine: (array[:-1], affine)),
    "affine": rewrite_itk(_shift),
    "orientation": rewrite_itk(lambda array, affine: (array, affine @ np.diag([-1.0, 1, 1, 1]))),
    "spacing": rewrite_itk(lambda array, affine: (array, affine @ np.diag([1, 1, 1.01, 1]))),
    "nan": rewrite_itk(_set(np.nan)),
    "zero": rewrite_itk(lambda array, affine: (np.zeros_like(array), affine)),
    "label_value": rewrite_itk(_set(7, np.uint8)),
}
"""The same for an NRRD or MetaImage file whose voxels are in it."""


def real_data(folder: str) -> Path:
    """A folder of the real volumes; the test is skipped when it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("MONAI_ADV_REAL_DATA", default)) / folder
    if not path.is_dir():
        pytest.skip(f"no real volumes: {path} is absent (set MONAI_ADV_REAL_DATA)")
    return path
