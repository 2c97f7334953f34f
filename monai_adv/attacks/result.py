"""What an attack gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from monai_adv.victims import Victim


@dataclass
class Cost:
    """What an attack cost: whole-volume forward and backward passes, and wall time."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forwards + other.forwards, self.backwards + other.backwards, self.seconds + other.seconds
        )  # fmt: skip


@dataclass
class AttackResult:
    """What an attack found.

    Attributes:
        image: adversarial image ``(B, C, *spatial)``, of the type that was given (MetaTensor keeps its affine).
        perturbation: ``image - clean``.
        prediction: the victim's segmentation of ``image``, class indices or bits; of a random victim that of the
            attack's own passes, see :meth:`predicted_by`.
        label: what ``prediction`` has to be scored against, of the head's kind: the label of the call (or the clean
            prediction), warped with the image by geometric attacks.
        success: ``(B,)`` bool. Untargeted: mean Dice fell, to at most ``goal`` times the clean mean Dice. Targeted:
            the agreement with the target reached ``goal``.
        score: ``(B,)`` the metric the best iterate was kept by: mean Dice over regions (untargeted, lower is
            stronger) or agreement with the target (targeted, higher is stronger).
        clean_score: the same metric of the clean image.
        best_step: ``(B,)`` step whose image is returned; counts through restarts.
        trace: per evaluated step ``{"step", "restart", "loss": (B,), "score": (B,), "zero_gradient": (B,)}``;
            ``zero_gradient`` is the share of support voxels whose gradient is exactly zero (NaN where none was taken).
        cost: forwards, backwards, seconds.
        parameters: what a physical attack found, tensors ``(B, ...)`` that its transform takes; empty for others.
        details: what else a method has to say, per sample, e.g. ``{"winner": ["apgd", ...]}``.
    """

    image: Tensor
    perturbation: Tensor
    prediction: Tensor
    label: Tensor
    success: Tensor
    score: Tensor
    clean_score: Tensor
    best_step: Tensor
    trace: list[dict[str, Any]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, list[Any]] = field(default_factory=dict)

    def predicted_by(self, victim: Victim, affine: Tensor | None = None) -> Tensor:
        """The segmentation of ``image`` that a victim deploys: what a Dice is reported of.

        Of a deterministic victim it is ``prediction``, without another pass. A random one was attacked pass by pass and
        is asked what it deploys (a smoothed one gives its majority vote).

        Args:
            victim: the one that was attacked.
            affine: voxel to world, see :class:`monai_adv.victims.Victim`.
        """
        return victim.predict(self.image, affine) if victim.random else self.prediction
