"""Where the voxels of a simulated subject lie in the world."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from monai_adv.errors import ConfigError

HEAD_EXTENT = (160.0, 192.0, 168.0)
"""Field of view in mm (left-right, posterior-anterior, inferior-superior) that holds a simulated brain."""

HEAD_CENTRE = (0.0, -17.0, 7.5)
"""World point (RAS mm, MNI 152) in the middle of the field of view."""

HEAD_LIMITS = ((-84.0, 84.0), (-118.0, 84.0), (-80.0, 95.0))
"""World box (RAS mm) that holds every simulated brain; voxels outside it are background without being computed."""

_LPS = (-1.0, -1.0, 1.0)  # first index runs to the left, second to the back, third up: as BraTS files are stored
_MULTIPLE = 8  # three halvings in a U-Net without padding
_SPACINGS = (1.0, 4.0)


@dataclass(frozen=True)
class Geometry:
    """Voxel grid of a subject: isotropic, axis-aligned, stored LPS like the files of BraTS.

    Args:
        shape: number of voxels along each axis.
        spacing: edge of a voxel in mm, 1.0 to 4.0.
        centre: world point (RAS, mm, MNI 152) of the centre of the grid.

    Raises:
        ConfigError: the shape or the spacing is not usable.

    Example:
        >>> Geometry.from_spacing(2.0).shape
        (80, 96, 88)
        >>> Geometry.brats().shape
        (240, 240, 155)
    """

    shape: tuple[int, int, int]
    spacing: float
    centre: tuple[float, float, float] = HEAD_CENTRE

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "spacing", float(self.spacing))
        object.__setattr__(self, "centre", tuple(float(c) for c in self.centre))
        if len(self.shape) != 3 or min(self.shape) < 8:
            raise ConfigError(f"Geometry.shape must be three numbers of at least 8 voxels, not {self.shape}.")
        if not _SPACINGS[0] <= self.spacing <= _SPACINGS[1]:
            raise ConfigError(
                f"Geometry.spacing must lie between {_SPACINGS[0]} and {_SPACINGS[1]} mm, not {self.spacing}: the "
                "anatomy comes from a 1 mm template and a thin enhancing rim is lost beyond 4 mm."
            )
        if len(self.centre) != 3 or not all(math.isfinite(c) for c in self.centre):
            raise ConfigError(f"Geometry.centre must be three finite coordinates in mm, not {self.centre}.")

    @classmethod
    def from_spacing(cls, spacing: float = 2.0) -> Geometry:
        """The smallest grid with this voxel size that holds the brain, each axis a multiple of 8 voxels.

        Args:
            spacing: edge of a voxel in mm, 1.0 to 4.0.
        """
        if not spacing > 0:
            raise ConfigError(f"spacing must be positive (mm), not {spacing}.")
        x, y, z = (_MULTIPLE * math.ceil(round(e / spacing, 6) / _MULTIPLE) for e in HEAD_EXTENT)
        return cls(shape=(x, y, z), spacing=spacing)

    @classmethod
    def brats(cls) -> Geometry:
        """The grid of the BraTS challenge: 240 x 240 x 155 voxels of 1 mm."""
        return cls(shape=(240, 240, 155), spacing=1.0)

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) float64 matrix from voxel indices to RAS millimetres (nibabel's convention), LPS storage order."""
        sign = np.array(_LPS)
        affine = np.eye(4)
        affine[:3, :3] = np.diag(sign * self.spacing)
        affine[:3, 3] = np.array(self.centre) - sign * self.spacing * (np.array(self.shape) - 1) / 2
        return affine

    @property
    def axes(self) -> list[np.ndarray]:
        """World coordinate (RAS mm) of the voxel centres along each of the three axes, float64."""
        affine = self.affine
        return [affine[i, 3] + affine[i, i] * np.arange(self.shape[i]) for i in range(3)]

    def as_dict(self) -> dict[str, object]:
        """Plain data, as it is written into the metadata files."""
        return {"shape": list(self.shape), "spacing_mm": self.spacing, "centre_mm": list(self.centre)}
