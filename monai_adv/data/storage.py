"""What numbers a file can hold: its type, and the scale between stored numbers and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_adv.errors import DataError


@dataclass(frozen=True)
class Storage:
    """How the voxels of a file are stored: ``value = slope * stored + inter``.

    Attributes:
        dtype: type of the stored numbers, integer or real.
        slope: value of one step of the stored number, not 0.
        inter: value of a stored 0.

    Raises:
        DataError: if the type is no integer or real number, or slope and inter are not finite or the slope is 0.

    Example:
        >>> stored = Storage("int16", slope=0.5, inter=-100)
        >>> stored.quantum, stored.levels()
        (0.5, (-16484.0, 16283.5))
        >>> stored.encode([0.0, 0.7]).tolist(), stored.nearest([0.0, 0.7]).tolist()
        ([200, 201], [0.0, 0.5])
    """

    dtype: np.dtype[Any]
    slope: float = 1.0
    inter: float = 0.0

    def __post_init__(self) -> None:
        dtype = np.dtype(self.dtype).newbyteorder("=")
        if dtype.kind not in "iuf":
            raise DataError(f"voxels of type {dtype}; expected integer or real numbers")
        if not np.isfinite([self.slope, self.inter]).all() or self.slope == 0:
            raise DataError(f"slope {self.slope} and intercept {self.inter}: both must be finite, the slope not 0")
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "slope", float(self.slope))
        object.__setattr__(self, "inter", float(self.inter))

    @property
    def identity(self) -> bool:
        """Whether the stored numbers are the values."""
        return self.slope == 1 and self.inter == 0

    @property
    def quantum(self) -> float:
        """Distance of neighbouring values, in units of the values; 0 for real numbers, which have no fixed one."""
        return abs(self.slope) if self.dtype.kind in "iu" else 0.0

    def levels(self) -> tuple[float, float]:
        """Smallest and largest value that can be stored, in units of the values."""
        limits = np.iinfo(self.dtype) if self.dtype.kind in "iu" else np.finfo(self.dtype)
        ends = self.slope * float(limits.min) + self.inter, self.slope * float(limits.max) + self.inter
        return min(ends), max(ends)

    def encode(self, values: Any, where: str = "") -> np.ndarray:
        """The numbers to store for values: the nearest ones.

        Args:
            values: array in units of the values, any shape.
            where: file, for the message of an error.

        Returns:
            Array of type ``dtype``, same shape. Real numbers stored as they are keep their bits.

        Raises:
            DataError: if a value is not finite or beyond :meth:`levels`.
        """
        array, prefix = np.asarray(values), f"{where}: " if where else ""
        broken = int(array.size - np.isfinite(array).sum())
        if broken:
            raise DataError(f"{prefix}{broken} of {array.size} voxels are NaN or Inf; nothing was written")
        if not self.identity:
            array = (array.astype(np.float64) - self.inter) / self.slope
        if self.dtype.kind in "iu" and array.dtype.kind == "f":
            array = np.rint(array)
        if array.size and array.dtype != self.dtype:
            limits = np.iinfo(self.dtype) if self.dtype.kind in "iu" else np.finfo(self.dtype)
            low, high = array.min(), array.max()
            if low < limits.min or high > limits.max:
                scale = "" if self.identity else f" with slope {self.slope:g} and intercept {self.inter:g}"
                ends = self.levels()
                raise DataError(
                    f"{prefix}values from {np.min(values):g} to {np.max(values):g} do not fit {self.dtype}{scale} "
                    f"({ends[0]:g} to {ends[1]:g}). Choose a wider type, such as float32 or float64."
                )
        return array.astype(self.dtype)

    def decode(self, stored: Any) -> np.ndarray:
        """The values of stored numbers: float64 when there is a scale, else the numbers themselves."""
        array = np.asarray(stored, dtype=self.dtype)
        return array if self.identity else array.astype(np.float64) * self.slope + self.inter

    def nearest(self, values: Any) -> np.ndarray:
        """What a reader finds after values were stored; same arguments and errors as :meth:`encode`."""
        return self.decode(self.encode(values))
