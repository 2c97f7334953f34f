"""Other programs' readers, for files this package has written: nibabel, SimpleITK, and itk in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

# Importing itk takes seconds, and where warnings are errors, as in this suite, it takes the process down: one process
# of its own reads all files. The pixel type is given, or itk loads every module it has.
_PROGRAM = """
import sys, numpy as np, itk
seen = {}
for number, path in enumerate(sys.stdin.read().splitlines()):
    image = itk.imread(path, itk.D)
    seen[f"{number} array"] = itk.array_from_image(image)
    seen[f"{number} direction"] = itk.array_from_matrix(image.GetDirection())
    seen[f"{number} spacing"] = np.asarray(image.GetSpacing())
    seen[f"{number} origin"] = np.asarray(image.GetOrigin())
np.savez(sys.argv[1], **seen)
"""


@dataclass(frozen=True)
class Seen:
    """What a reader finds: voxels (x, y, z) and the affine to RAS millimetres."""

    array: np.ndarray
    affine: np.ndarray


def _from_lps(array: np.ndarray, direction: np.ndarray, spacing: np.ndarray, origin: np.ndarray) -> Seen:
    affine = np.eye(4)
    affine[:3, :3] = direction @ np.diag(spacing)
    affine[:3, 3] = origin
    return Seen(array.transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1]) @ affine)


def with_nibabel(path: Path) -> Seen:
    """NIfTI only."""
    image = nib.load(path)
    return Seen(np.asarray(image.dataobj), image.affine)


def with_simpleitk(path: Path) -> Seen:
    import SimpleITK as sitk

    image = sitk.ReadImage(str(path))
    direction = np.reshape(image.GetDirection(), (3, 3))
    return _from_lps(sitk.GetArrayFromImage(image), direction, np.asarray(image.GetSpacing()), image.GetOrigin())


def with_itk(paths: Iterable[Path], folder: Path) -> dict[Path, Seen]:
    """All files by one process; ``folder`` takes what it finds."""
    files = list(paths)
    result = folder / "itk.npz"
    text = "\n".join(map(str, files))
    subprocess.run([sys.executable, "-c", _PROGRAM, str(result)], input=text, text=True, check=True, timeout=300)
    with np.load(result) as seen:
        return {
            path: _from_lps(*(seen[f"{number} {name}"] for name in ("array", "direction", "spacing", "origin")))
            for number, path in enumerate(files)
        }
