"""What randomized smoothing proves: the tests behind it, and the certified segmentation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom, norm
from torch import Tensor

from monai_adv.data import save_nifti
from monai_adv.errors import ConfigError
from monai_adv.metrics import region_scores
from monai_adv.stats import rejected
from monai_adv.victims import Head

Correction = Literal["holm", "bonferroni"]
CORRECTIONS: tuple[Correction, ...] = ("holm", "bonferroni")
ABSTAIN = 255
"""Value of abstaining voxels in the NIfTI of a certified segmentation."""


def radius(sigma: float, tau: float) -> float:
    """The certified L2 radius ``sigma * Phi^-1(tau)`` in the units of sigma.

    Example:
        >>> [round(radius(0.25, tau), 3) for tau in (0.75, 0.85, 0.95, 0.99)]
        [0.169, 0.259, 0.411, 0.582]
    """
    return float(sigma * norm.ppf(tau))


def count_pvalues(samples: int, tau: float) -> NDArray[np.float64]:
    """p-values of all possible counts ``0..samples`` for the hypothesis that a hit has a probability of at most tau.

    Returns:
        ``(samples + 1,)``: P(Binomial(samples, tau) >= count), falling.

    Example:
        >>> count_pvalues(2, 0.5).tolist()
        [1.0, 0.75, 0.25]
    """
    # binom.sf loses the last digits where it is one
    values = binom.sf(np.arange(samples + 1) - 1, samples, tau)
    return np.asarray(np.clip(values, 0, 1), dtype=np.float64)


def adjusted_pvalues(
    histogram: NDArray[Any], pvalues: NDArray[np.float64], correction: str = "holm"
) -> NDArray[np.float64]:
    """Holm's or Bonferroni's adjusted p-values of the counts of many voxels, exact, from their histogram.

    Voxels with equal counts have equal p-values, and Holm's step-down procedure gives them one adjusted value: that of
    the first of them in the order. It is :func:`monai_adv.stats.holm` of the voxels' p-values without sorting them.

    Args:
        histogram: voxels per count ``0..n``, ``(n + 1,)``.
        pvalues: p-value per count, falling, same shape.
        correction: "holm" or "bonferroni".

    Returns:
        Adjusted p-value per count, at most 1; NaN for a count that no voxel has.

    Raises:
        ConfigError: for another correction.

    Example:
        >>> adjusted_pvalues(np.array([0, 2, 1]), np.array([1.0, 0.04, 0.01])).round(6).tolist()
        [nan, 0.08, 0.03]
    """
    if correction not in CORRECTIONS:
        raise ConfigError(f"correction {correction!r} is unknown: use one of {', '.join(CORRECTIONS)}")
    tests = int(histogram.sum())
    # from the largest count, the smallest p: how many tests are left when its turn comes
    before = tests - np.cumsum(histogram)
    left = tests - before if correction == "holm" else np.full_like(before, tests)
    steps = np.where(histogram > 0, left * pvalues, 0.0)
    adjusted = np.minimum(1.0, np.maximum.accumulate(steps[::-1])[::-1])
    return np.where(histogram > 0, adjusted, np.nan)


def samples_needed(voxels: int, tau: float, alpha: float = 1e-3) -> int:
    """Fewest samples with which a unanimous voxel can be certified among so many (Holm and Bonferroni alike).

    Example:
        >>> samples_needed(240 * 240 * 155, 0.75), samples_needed(240 * 240 * 155, 0.95)
        (80, 447)
    """
    return max(1, math.ceil(math.log(alpha / voxels) / math.log(tau) - 1e-9))


@dataclass(frozen=True)
class Certificate:
    """A segmentation of which every voxel is either certified or abstains.

    With probability at least ``1 - alpha`` over the samples, for all certified voxels at once: the smoothed
    segmentation (the majority under Gaussian noise of ``sigma`` on the network's input) is ``prediction`` for every
    network's input closer than ``radius`` in the L2 norm over all its voxels and channels, in its own units (after the
    z-score). It says nothing about the victim without noise.

    Attributes:
        prediction: class indices ``(1, 1, *spatial)`` or bits ``(1, K, *spatial)``, the mode of the first draws, also
            where the voxel abstains.
        hits: how many of ``samples`` further draws agree with it, uint16, same shape.
        foreground: voxels of the image that are not background, ``(1, 1, *spatial)`` bool.
        head: head of the prediction.
        sigma: standard deviation of the noise, in units of the network's input.
        tau: probability that a certified voxel exceeds.
        samples: draws that were tested.
        draws0: draws that chose the prediction.
        alpha: family-wise error over all voxels (and channels of a sigmoid head).
        correction: "holm" or "bonferroni".
    """

    prediction: Tensor
    hits: Tensor
    foreground: Tensor
    head: Head
    sigma: float
    tau: float
    samples: int
    draws0: int
    alpha: float
    correction: str

    @property
    def radius(self) -> float:
        """Certified L2 radius ``sigma * Phi^-1(tau)``, in units of the network's input."""
        return radius(self.sigma, self.tau)

    @cached_property
    def adjusted(self) -> NDArray[np.float64]:
        """Adjusted p-value of every count ``0..samples``."""
        histogram = np.bincount(self._hits.ravel(), minlength=self.samples + 1)
        return adjusted_pvalues(histogram, count_pvalues(self.samples, self.tau), self.correction)

    @property
    def pvalues(self) -> Tensor:
        """Adjusted p-value of every voxel, float64, shape of the prediction."""
        return torch.from_numpy(self.adjusted[self._hits])

    @cached_property
    def abstained(self) -> Tensor:
        """Voxels without a certificate, bool, shape of the prediction."""
        return torch.from_numpy(~rejected(self.adjusted, self.alpha)[self._hits])

    @property
    def abstention(self) -> float:
        """Share of voxels (of a sigmoid head: of channels of voxels) that abstain."""
        return float(self.abstained.float().mean())

    @property
    def foreground_abstention(self) -> float:
        """The same inside the foreground of the image; NaN if it is empty."""
        inside = self.abstained[self.foreground.expand_as(self.abstained)]
        return float(inside.float().mean()) if inside.numel() else float("nan")

    def scores(self, label: Tensor, truth_outside: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """Dice of every region, with and without the certificate.

        Args:
            label: of the head's kind, shape of the prediction.
            truth_outside: true voxels of each region that lie outside the image's crop (they count as missed).

        Returns:
            Per region: ``region``; ``smoothed_dice`` of the prediction as it is; ``certified_dice`` with every
            abstaining voxel wrong, missed where it is true and false alarm where it is not: what is left in the worst
            case within the radius; ``certified_dice_missed`` with abstaining voxels in no region, as a class of their
            own (Fischer et al.); ``abstained_true``, the share of the region's true voxels that abstain (NaN if none).
            Dice of two empty masks is 1.
        """
        truths = self.head.regions_of(label.cpu())
        predictions = self.head.regions_of(self.prediction)
        rows = []
        for index, (name, truth) in enumerate(truths.items()):
            silent = self.abstained[:, 0 if self.head.exclusive else index]
            predicted = predictions[name]
            masks = {
                "smoothed_dice": predicted,
                "certified_dice": torch.where(silent, ~truth, predicted),
                "certified_dice_missed": predicted & ~silent,
            }
            row: dict[str, Any] = {"region": name}
            for column, mask in masks.items():
                row[column] = _dice(mask, truth, (truth_outside or {}).get(name, 0))
            row["abstained_true"] = float(silent[truth].float().mean()) if truth.any() else float("nan")
            row["truth_voxels"] = int(truth.sum())
            rows.append(row)
        return rows

    def segmentation(self) -> Tensor:
        """Canonical class indices ``(1, 1, *spatial)`` uint8; :data:`ABSTAIN` (255) where the voxel abstains.

        A voxel of a sigmoid head abstains if one of its channels does.

        Raises:
            ConfigError: if there are 255 classes or more, or the regions of a sigmoid head are not BraTS WT, TC, ET.
        """
        if self.head.exclusive and int(self.prediction.max()) >= ABSTAIN:
            raise ConfigError(f"class {int(self.prediction.max())} cannot be told from abstention, which is {ABSTAIN}")
        classes = self.head.classes_from_prediction(self.prediction)
        return classes.masked_fill(self.abstained.any(1, keepdim=True), ABSTAIN)

    def save(
        self,
        folder: str | Path,
        like: Any | str | os.PathLike[str],
        stem: str = "certified",
        restore: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Path, Path]:
        """Write the certified segmentation and the abstention map as NIfTI.

        Args:
            folder: where to.
            like: file or MetaTensor that has the grid, see :func:`monai_adv.data.save_nifti`.
            stem: the files are ``<stem>_segmentation.nii.gz`` (:meth:`segmentation`, 255 abstains) and
                ``<stem>_abstention.nii.gz`` (1 abstains).
            restore: brings ``(1, *spatial)`` to the grid of ``like``, where the image was cropped or turned.

        Returns:
            The two paths.
        """
        segmentation = self.segmentation()[0]
        paths = []
        for name, data in (("segmentation", segmentation), ("abstention", (segmentation == ABSTAIN).to(torch.uint8))):
            data = data if restore is None else restore(data)
            paths.append(save_nifti(data[0], like, Path(folder) / f"{stem}_{name}.nii.gz", np.uint8))
        return paths[0], paths[1]

    def describe(self) -> dict[str, Any]:
        """The parameters and shares as plain values, for records."""
        names = ("sigma", "tau", "radius", "alpha", "correction", "samples", "draws0")
        return {
            **{name: getattr(self, name) for name in names},
            "tests": self.hits.numel(),
            "abstention": self.abstention,
            "foreground_abstention": self.foreground_abstention,
        }

    @property
    def _hits(self) -> NDArray[np.int64]:
        return self.hits.numpy().astype(np.int64)

    def __repr__(self) -> str:
        return (
            f"Certificate(radius={self.radius:.3g}, sigma={self.sigma:g}, tau={self.tau:g}, samples={self.samples}, "
            f"alpha={self.alpha:g}, {self.correction}, abstention={self.abstention:.3f})"
        )


def _dice(prediction: Tensor, truth: Tensor, missed: int) -> float:
    """Dice of two masks and of ``missed`` more true voxels where nothing was predicted."""
    p, t = (
        np.append(mask.numpy().ravel(), np.full(missed, value)) for mask, value in ((prediction, False), (truth, True))
    )
    return region_scores(p[None], t[None], 1.0, hd95=False)["dice"]
