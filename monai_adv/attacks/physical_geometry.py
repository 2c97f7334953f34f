"""Worst cases of moved anatomy: a diffeomorphic deformation, an affine motion. The ground truth moves along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from monai_adv.attacks.physical import PhysicalAttack
from monai_adv.attacks.run import Run
from monai_adv.threats import Threat
from monai_adv.transforms.physics import Affine, Deformation, Effect
from monai_adv.transforms.physics.effect import Parameters
from monai_adv.transforms.physics.geometry import (
    GeometricEffect,
    jacobian,
    jacobian_determinant,
    spatial_gradient,
)


class GeometricAttack(PhysicalAttack):
    """Moves image, label, target and weight together; what it found is scored against ``result.label``.

    The gradient is that of image and label together. With the label held still, every motion of a well segmented
    lesion looks like progress, although its truth moves along: the search would mostly chase that.

    All modalities move together and voxels come from anywhere, so the threat's ``channels`` and ``support`` do not
    apply; bounds do.
    """

    moves_voxels: ClassVar[bool] = True
    effect: GeometricEffect

    def _image(self, run: Run, parameters: Parameters, field: Tensor | None = None) -> Tensor:
        changed = self.effect.apply(run.clean, parameters, run.spacing, run.ball.mask, field)
        low, high = run.ball.low, run.ball.high  # voxels come from anywhere: only the bounds are kept
        changed = changed if low is None else torch.maximum(changed, low)
        return changed if high is None else torch.minimum(changed, high)

    def _warp(self, run: Run, parameters: Parameters, field: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        return self.effect.label_warp(run.clean.shape[2:], parameters, run.spacing, field)

    def _step(self, run: Run, parameters: Parameters, magnitude: float, restart: int) -> Parameters:
        return self.effect.step(parameters, self._slopes(run, parameters, restart), self._share(), magnitude)

    def _value(self, run: Run, logits: Tensor, warp: Callable[[Tensor], Tensor]) -> Tensor:
        """What is ascended, ``(B,)``, of the logits of an image that was moved as ``warp`` moves labels."""
        return run._objective(logits, None, warp)

    def _slopes(self, run: Run, parameters: Parameters, restart: int) -> Parameters:
        """Ascent direction in the parameters, through image and label; the image is considered on the way."""
        leaves = {k: v.detach().requires_grad_(True) for k, v in parameters.items()}
        with torch.enable_grad():
            field = self.effect.displacement(leaves, run.clean.shape[2:], run.spacing)
            image = self._image(run, leaves, field)
        warp = self._warp(run, parameters, field.detach())
        pulls: list[Tensor] = []

        def objective(logits: Tensor) -> Tensor:
            if logits.requires_grad:
                logits.register_hook(lambda slope: pulls.append(_pull(logits.detach(), slope, run.spacing)))
            return self._value(run, logits, warp)

        gradient = run.gradient(image, loss=objective, restart=restart, warp=warp, parameters=parameters)
        if not field.requires_grad:  # an effect whose anatomy may be held still
            return dict(zip(leaves, torch.autograd.grad(image, list(leaves.values()), gradient)))
        # moving the label's source by du moves the label by (I + grad u)^-1 du; over several draws the mean, as ever
        pull = torch.stack(pulls).mean(0).movedim(1, -1).unsqueeze(-1)
        pull = torch.linalg.solve(jacobian(field.detach(), run.spacing).mT, pull).squeeze(-1).movedim(-1, 1)
        slopes = torch.autograd.grad([image, field], list(leaves.values()), [gradient, pull])
        return dict(zip(leaves, slopes))


def _pull(logits: Tensor, slope: Tensor, spacing: Sequence[float]) -> Tensor:
    """Change of the objective per mm by which the label (target, weight) moves over the logits, ``(B, dims, ...)``.

    For the objective, a label taken from ``p + w`` is as good as logits taken from ``p - w``.

    Args:
        logits: ``(B, K, *spatial)``.
        slope: derivative of the objective in the logits.
        spacing: voxel size in mm.
    """
    return torch.stack([-(slope * change).sum(1) for change in spatial_gradient(logits, spacing)], dim=1)


class DeformationAttack(GeometricAttack):
    """Worst-case diffeomorphic deformation: the flow of a smooth velocity, label warped along.

    ``result.details["min_jacobian"]`` is the smallest Jacobian determinant of the deformation: above zero it does not
    fold.

    Reference:
        Chen et al., Enhancing MR image segmentation with realistic adversarial data augmentation (AdvChain), Medical
        Image Analysis 2022. Parametrisation in mm and defaults are ours.

    Args:
        threat: eps is the largest displacement in mm.
        knot_mm: distance of the velocity's control points in mm.
        squarings: see :class:`monai_adv.transforms.physics.Deformation`.
        **options: see :class:`PhysicalAttack`.
    """

    name: ClassVar[str] = "deformation"
    reference: ClassVar[str] = "Chen et al. 2022"
    units: ClassVar[str] = Deformation.units
    default_eps: ClassVar[tuple[float, ...]] = (Deformation.default_magnitude,)
    effect_class: ClassVar[type[Effect]] = Deformation

    def __init__(self, threat: Threat, knot_mm: float = 40.0, squarings: int = 7, **options: Any) -> None:
        super().__init__(threat, Deformation(knot_mm, squarings), **options)
        self.knot_mm = knot_mm
        self.squarings = squarings

    def _search(self, run: Run) -> None:
        super()._search(run)
        field = self.effect.displacement(run.best_parameters, run.clean.shape[2:], run.spacing)
        run.details["min_jacobian"] = jacobian_determinant(field, run.spacing).flatten(1).amin(1).tolist()


class AffineAttack(GeometricAttack):
    """Worst-case rotation, translation and scaling about the centre of the volume, label moved along.

    Reference:
        Chen et al., AdvChain, Medical Image Analysis 2022 (affine among its transformations). Limits and defaults are
        ours.

    Args:
        threat: eps is the share of the limits that may be used, 1 for all of them.
        max_rotation: limit of every angle in degrees.
        max_translation: limit along every axis in mm.
        max_scaling: largest relative change of size along every axis.
        **options: see :class:`PhysicalAttack`.
    """

    name: ClassVar[str] = "affine"
    reference: ClassVar[str] = "Chen et al. 2022"
    units: ClassVar[str] = Affine.units
    default_eps: ClassVar[tuple[float, ...]] = (Affine.default_magnitude,)
    effect_class: ClassVar[type[Effect]] = Affine

    def __init__(
        self,
        threat: Threat,
        max_rotation: float = 10.0,
        max_translation: float = 5.0,
        max_scaling: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(threat, Affine(max_rotation, max_translation, max_scaling), **options)
        self.max_rotation = max_rotation
        self.max_translation = max_translation
        self.max_scaling = max_scaling
