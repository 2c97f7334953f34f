"""What a notebook shows of one case, as checked arrays without a batch axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from monai_adv.attacks import AttackResult
from monai_adv.errors import ConfigError
from monai_adv.metrics import region_scores
from monai_adv.victims import Head

from .slices import as_array

Masks = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shown:
    """Everything that is drawn, as arrays without a batch axis.

    Attributes:
        clean: image (C, *spatial) in image units.
        adversarial: the same, attacked; None where nothing was attacked.
        truth: region -> mask (*spatial); None if unknown, as for all masks.
        moved_truth: the truth that belongs to the adversarial image, where an attack moved the anatomy.
        prediction: on the clean image.
        adversarial_prediction: on the adversarial image.
        affine: 4 x 4, voxel to RAS mm; None if unknown.
        modalities: name of each channel.
        units: of the perturbation: "std", "range" or "absolute".
        title: what stands on top.
    """

    clean: np.ndarray
    adversarial: np.ndarray | None
    truth: Masks | None
    moved_truth: Masks | None
    prediction: Masks | None
    adversarial_prediction: Masks | None
    affine: np.ndarray | None
    modalities: Sequence[str]
    units: str
    title: str

    @classmethod
    def of(
        cls,
        case: Mapping[str, Any],
        result: AttackResult | None,
        prediction: Any,
        adversarial: Any,
        adversarial_prediction: Any,
        head: Head | None,
        modalities: Sequence[str],
        units: str,
        title: str,
    ) -> Shown:
        """Check and unpack the arguments of :func:`volume_view`."""
        if "image" not in case:
            raise ConfigError(f"a case has an image, got the keys {sorted(case)}; make it with load_case(item)")
        affine = getattr(case["image"], "affine", None)
        clean = as_array(case["image"]).astype(np.float64)
        if clean.ndim not in (3, 4):
            raise ConfigError(f"the case's image has shape {clean.shape}; expected (C, X, Y, Z) without a batch axis")
        if len(modalities) != len(clean):
            raise ConfigError(f"{len(modalities)} modality names {tuple(modalities)} for {len(clean)} channels")
        if result is not None:
            if adversarial is not None or adversarial_prediction is not None:
                raise ConfigError("give a result, or an adversarial image and its prediction, not both")
            adversarial, adversarial_prediction = result.image, result.prediction
        attacked = None if adversarial is None else _unbatched(adversarial, clean.ndim, "adversarial image")
        if attacked is not None and attacked.shape != clean.shape:
            raise ConfigError(f"the adversarial image has shape {attacked.shape}, the case's image {clean.shape}")

        def masks(segmentation: Any, name: str) -> Masks | None:
            return None if segmentation is None else _masks(segmentation, head, clean.shape[1:], name)

        own = head if head is not None and head.exclusive else None  # a case's label is class indices for every head
        truth = None
        if "label" in case:
            label = torch.as_tensor(_unbatched(case["label"], clean.ndim, "label"))
            counted = label if own is None else own.label_from_classes(label[None])[0]
            truth = _masks(counted, own, clean.shape[1:], "label")
        moved = masks(result.label, "moved label") if result is not None and result.parameters else None
        if truth is not None and moved is not None:
            truth = {name: truth[name] for name in moved if name in truth} or truth
            if truth.keys() == moved.keys() and all(np.array_equal(truth[name], moved[name]) for name in truth):
                moved = None
        return cls(
            clean=clean,
            adversarial=None if attacked is None else attacked.astype(np.float64),
            truth=truth,
            moved_truth=moved,
            prediction=masks(prediction, "prediction"),
            adversarial_prediction=masks(adversarial_prediction, "adversarial prediction"),
            affine=None if affine is None else as_array(affine).astype(float),
            modalities=tuple(modalities),
            units=units,
            title=title or str(case.get("subject", "")),
        )

    def dice(self) -> dict[str, tuple[float, float]] | None:
        """Region -> Dice before and after, where truth and both predictions are known."""
        after_truth = self.truth if self.moved_truth is None else self.moved_truth
        if self.truth is None or after_truth is None or self.prediction is None or self.adversarial_prediction is None:
            return None
        return {
            name: (
                _dice(self.prediction[name], self.truth[name]),
                _dice(self.adversarial_prediction[name], after_truth[name]),
            )
            for name in self.truth
            if name in self.prediction and name in self.adversarial_prediction and name in after_truth
        }


def _unbatched(array: Any, dimensions: int, name: str) -> np.ndarray:
    """An array of so many dimensions, a leading batch axis of one taken off."""
    values = as_array(array)
    if values.ndim == dimensions + 1 and len(values) == 1:
        values = values[0]
    if values.ndim != dimensions:
        raise ConfigError(
            f"the {name} has shape {values.shape}; expected one case, {dimensions} axes without the batch"
        )
    return values


def _masks(segmentation: Any, head: Head | None, spatial: tuple[int, ...], name: str) -> Masks:
    """Region -> mask of class indices or bits."""
    values = torch.as_tensor(_unbatched(segmentation, len(spatial) + 1, name))
    if tuple(values.shape[1:]) != tuple(spatial):
        raise ConfigError(f"the {name} has the spatial shape {tuple(values.shape[1:])}, the image {tuple(spatial)}")
    head = head or Head("softmax" if len(values) == 1 else "sigmoid")
    return {region: mask[0].numpy() for region, mask in head.regions_of(values[None]).items()}


def _dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    return float(region_scores(prediction, truth, 1.0, hd95=False)["dice"])
