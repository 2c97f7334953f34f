"""Tissue maps of the average brain: ICBM 152 (2009a, nonlinear, symmetric), read from nilearn's files.

Fonov et al., "Unbiased average age-appropriate atlases for pediatric studies", NeuroImage 54 (2011). The files travel
in nilearn's wheel; nilearn itself is not imported (that takes seconds and needs scikit-learn).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from monai_adv.errors import DataError

CHANNELS = ("csf", "gm", "wm", "deep_gm", "ventricles", "depth")
"""Maps of a template: fractions of tissue (0..1), of them CSF in the ventricles, and depth below the surface (mm)."""

_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_CROP = ((20, 178), (20, 214), (0, 162))  # voxels around the head
_ZERO = (98, 134, 72)  # voxel of the anterior commissure, world (0, 0, 0)


@dataclass(frozen=True)
class Template:
    """Maps of the average brain on a regular grid.

    Args:
        maps: (6, X, Y, Z) float32, one map for each of `CHANNELS`.
        origin: world point (RAS mm) of the first voxel.
        step: distance between voxels in mm.
    """

    maps: Tensor
    origin: tuple[float, float, float]
    step: float


def template_folder() -> Path:
    """Folder of nilearn's template files, found without importing nilearn.

    Raises:
        DataError: nilearn is not installed, or ships without the files.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise DataError(
            "The simulated cohort is drawn from the ICBM 152 template inside nilearn, which is not installed: "
            'pip install "monai_adv[demo]"'
        )
    folder = Path(spec.origin).parent / "datasets" / "data"
    missing = [name for name in map(_FILE.format, ("t1", "gm", "wm")) if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"nilearn in {folder.parent.parent} lacks the template file(s) {', '.join(missing)}; "
            'install it again: pip install --force-reinstall "nilearn>=0.11"'
        )
    return folder


@lru_cache(maxsize=2)
def load_template(spacing: float) -> Template:
    """The template at 1 mm, smoothed for sampling at `spacing`; the last two are kept in memory.

    Args:
        spacing: voxel size (mm) at which the maps will be sampled.
    """
    full = _full_template()
    maps = full.maps
    if spacing > 1.2:  # anti-aliasing; at 1 mm the maps are smooth enough already
        maps = torch.stack([torch.from_numpy(ndimage.gaussian_filter(m.numpy(), 0.35 * spacing)) for m in maps])
    return Template(maps, full.origin, full.step)


@lru_cache(maxsize=1)
def load_growth_template() -> Template:
    """The template at 2 mm, on which tumours are placed and grown whatever the spacing of the images."""
    smooth = load_template(2.0)
    return Template(smooth.maps[:, ::2, ::2, ::2].contiguous(), smooth.origin, 2 * smooth.step)


@lru_cache(maxsize=1)
def _full_template() -> Template:
    folder = template_folder()
    crop = tuple(slice(low, high) for low, high in _CROP)
    t1, gm, wm = (_read(folder / _FILE.format(name))[crop] for name in ("t1", "gm", "wm"))
    brain = (t1 > 0) | (gm + wm > 0.3)
    brain = ndimage.binary_fill_holes(ndimage.binary_closing(brain, iterations=2)) | brain
    gm, wm = gm * brain, wm * brain
    csf = np.clip(brain - gm - wm, 0, 1)
    coarse = ndimage.distance_transform_edt(brain[::2, ::2, ::2], sampling=2)
    depth = ndimage.zoom(coarse, np.array(brain.shape) / np.array(coarse.shape), order=1)
    world = [np.arange(low, high, dtype=np.float64) - zero for (low, high), zero in zip(_CROP, _ZERO)]
    x, y, z = np.meshgrid(*world, indexing="ij", sparse=True)
    ventricles = _ventricles(csf, depth, z)
    basal = ((np.abs(x) - 18) / 20) ** 2 + ((y + 6) / 30) ** 2 + ((z - 4) / 18) ** 2 < 1  # basal ganglia, thalamus
    deep_gm = gm * ndimage.gaussian_filter(basal.astype(np.float32), 2.0)
    maps = np.stack([csf, gm - deep_gm, wm, deep_gm, ventricles, np.minimum(depth, 60.0)]).astype(np.float32)
    return Template(torch.from_numpy(maps), (float(world[0][0]), float(world[1][0]), float(world[2][0])), 1.0)


def _ventricles(csf: np.ndarray, depth: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Part of the CSF map inside the lateral and third ventricles."""
    parts, count = ndimage.label((csf > 0.5) & (depth > 22))
    sizes = ndimage.sum(np.ones_like(parts), parts, range(1, count + 1))
    inside = np.isin(parts, 1 + np.flatnonzero(np.asarray(sizes) > 300)) & (z > -14)
    grown = ndimage.binary_dilation(inside, iterations=2).astype(np.float32)
    return ndimage.gaussian_filter(grown, 1.0) * csf


def _read(path: Path) -> np.ndarray:
    try:
        return np.asanyarray(nib.load(path).dataobj).astype(np.float32) / 255  # type: ignore[attr-defined]
    except (OSError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise DataError(f"Cannot read the template file {path}: {error}. Install nilearn again.") from error
