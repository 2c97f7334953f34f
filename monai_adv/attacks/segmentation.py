"""PGD made for segmentation: SegPGD and CosPGD weigh the voxels of the cross entropy by how far they are fooled."""

from __future__ import annotations

from typing import Any, ClassVar

from monai_adv.attacks.sign import PGD
from monai_adv.losses import AttackLoss, CosPGDCrossEntropy, CrossEntropy, SegPGDCrossEntropy, Tracked
from monai_adv.threats import Threat


class SegPGD(PGD):
    """PGD on cross entropy that first pushes voxels not fooled yet and later also keeps the fooled ones fooled.

    At step t of T voxels that are still right weigh ``1 - lambda`` and fooled ones ``lambda = (t - 1) / (2 T)``;
    targeted, voxels at the target are the fooled ones. The trace holds the plain cross entropy, which can be compared
    from step to step.

    Reference:
        Gu et al., SegPGD: an effective and efficient adversarial attack for evaluating and boosting segmentation
        robustness, ECCV 2022. Theirs: untargeted, L-inf. Ours: L2, the targeted mode, sigmoid heads bit by bit, the
        step size of :class:`PGD`, and the best iterate.

    Args:
        threat: what may change, L-inf or L2.
        steps: T, gradient steps per restart; lambda ends just below 1/2 whatever T is.
        step_size: step in the threat's units; None is ``2.5 eps / steps``.
        random_start: start at a random point of the ball instead of the clean image.
        restarts: independent starts.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "segpgd"
    reference: ClassVar[str] = "Gu et al. 2022"
    fixed_loss: ClassVar[bool] = True

    def __init__(
        self,
        threat: Threat,
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool = True,
        restarts: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(threat, "ce", steps, step_size, random_start, restarts, **options)

    def _step_loss(self, step: int) -> AttackLoss:
        return Tracked(SegPGDCrossEntropy(step / (2 * self.steps)), by=CrossEntropy())


class CosPGD(PGD):
    """PGD on cross entropy weighted per voxel by the cosine of prediction and label, so that fooled voxels fade out.

    The cosine is ``p_y / ||p||_2``, a constant for the gradient; targeted the weight is one minus the cosine with the
    target. The trace holds the plain cross entropy, which can be compared from step to step.

    Reference:
        Agnihotri et al., CosPGD: an efficient white-box adversarial attack for pixel-wise prediction tasks, ICML 2024.
        Theirs: L-inf and L2, targeted and not, softmax heads, and 20 steps or more to show its strength; with few steps
        it can be weaker than PGD. Ours: sigmoid heads bit by bit, the step size of :class:`PGD`, the best iterate.

    Args:
        threat: what may change, L-inf or L2.
        steps: gradient steps per restart, best 20 or more.
        step_size: step in the threat's units; None is ``2.5 eps / steps``.
        random_start: start at a random point of the ball instead of the clean image.
        restarts: independent starts.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "cospgd"
    reference: ClassVar[str] = "Agnihotri et al. 2024"
    fixed_loss: ClassVar[bool] = True

    def __init__(
        self,
        threat: Threat,
        steps: int = 20,
        step_size: float | None = None,
        random_start: bool = True,
        restarts: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(threat, "ce", steps, step_size, random_start, restarts, **options)

    def _step_loss(self, step: int) -> AttackLoss:
        return Tracked(CosPGDCrossEntropy(), by=CrossEntropy())
