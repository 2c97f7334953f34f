"""One-step and iterative gradient attacks: noise control, FGSM, I-FGSM, targeted I-FGSM, PGD."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from monai_adv.attacks.base import Attack, Target, positive
from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses import AttackLoss
from monai_adv.threats import Threat


class Noise(Attack):
    """Random noise of the budget's size: the control that every attack is compared with.

    Args:
        threat: its budget is the size of the noise.
        kind: "sign" (every voxel moves by plus or minus eps; for L2 the same, scaled to the norm) or "gaussian"
            (L-inf: standard deviation eps, the RMS of sign noise, not clipped to eps; L2: scaled to the norm).
        repeats: draws; the mean case is wanted from a control, so one by default. With more the worst is kept.
        loss: only recorded in the trace.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "noise"
    reference: ClassVar[str] = "control"
    white_box: ClassVar[bool] = False
    modes: ClassVar[str] = "untargeted"

    def __init__(
        self, threat: Threat, kind: str = "sign", repeats: int = 1, loss: str | AttackLoss = "dice_ce", **options: Any
    ) -> None:
        super().__init__(threat, loss, **options)
        if kind not in ("sign", "gaussian"):
            raise ConfigError(f"noise kind {kind!r} is unknown: use 'sign' or 'gaussian'")
        self.kind = kind
        self.repeats = positive("repeats", repeats)

    def _search(self, run: Run) -> None:
        for repeat in range(self.repeats):
            run.consider(run.ball.noise(self.kind, run.generator), restart=repeat)


class FGSM(Attack):
    """Fast gradient sign method: one step of the whole budget along the steepest direction of the norm.

    Reference:
        Goodfellow et al., Explaining and harnessing adversarial examples, ICLR 2015.

    Args:
        threat: what may change; for L2 the step follows the normalised gradient.
        loss: what is ascended.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "fgsm"
    reference: ClassVar[str] = "Goodfellow et al. 2015"

    def __init__(self, threat: Threat, loss: str | AttackLoss = "dice_ce", **options: Any) -> None:
        super().__init__(threat, loss, **options)

    def _search(self, run: Run) -> None:
        run.consider(run.ball.step(run.clean, run.clean_gradient(), run.ball.eps))


class IFGSM(Attack):
    """Iterative FGSM (basic iterative method): steepest steps from the clean image, projected to the budget.

    Reference:
        Kurakin et al., Adversarial examples in the physical world, 2016; on brain tumours Liu et al. 2019
        (arXiv 1908.00656), whose own budgets and step counts are not public.

    Args:
        threat: what may change, L-inf or L2.
        loss: what is ascended.
        steps: gradient steps.
        step_size: step in the threat's units; None is ``2.5 eps / steps`` (Madry et al.).
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "ifgsm"
    reference: ClassVar[str] = "Kurakin et al. 2016"

    def __init__(
        self,
        threat: Threat,
        loss: str | AttackLoss = "dice_ce",
        steps: int = 10,
        step_size: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, **options)
        self.steps = positive("steps", steps)
        if step_size is not None and not (isinstance(step_size, (int, float)) and 0 < step_size < math.inf):
            raise ConfigError(f"step_size must be > 0 and finite, got {step_size!r}")
        self.step_size = step_size

    def _search(self, run: Run) -> None:
        self._ascend(run, run.clean)

    def _ascend(self, run: Run, image: Tensor, restart: int = 0) -> None:
        """All steps from one start."""
        if self.step_size is None and math.isinf(run.ball.eps):
            raise ConfigError(f"{self.name} without a finite eps needs a step_size")
        size = self.step_size if self.step_size is not None else 2.5 * run.ball.eps / self.steps
        direction: Tensor | None = None
        for step in range(self.steps):
            # the start is not a result: a failed attack must not return the clean image
            gradient = run.gradient(image, loss=self._step_loss(step), restart=restart, candidate=step > 0)
            direction = self._direction(run, gradient, direction)
            image = run.ball.step(image, direction, size)
        run.consider(image, restart=restart)

    def _step_loss(self, step: int) -> AttackLoss | None:
        """The loss of a step, counted from 0; None is the attack's."""
        return None

    def _direction(self, run: Run, gradient: Tensor, before: Tensor | None) -> Tensor:
        """Where a step goes, from the gradient and the direction of the step before (None at the start)."""
        return gradient


class PGD(IFGSM):
    """Projected gradient descent: steepest steps from a random start, projected to the budget, best of the restarts.

    Reference:
        Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018.

    Args:
        threat: what may change, L-inf or L2.
        loss: what is ascended.
        steps: gradient steps per restart.
        step_size: step in the threat's units; None is ``2.5 eps / steps`` (Madry et al.).
        random_start: start at a random point of the ball instead of the clean image.
        restarts: independent starts; per sample the best one is kept, as a whole.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "pgd"
    reference: ClassVar[str] = "Madry et al. 2018"

    def __init__(
        self,
        threat: Threat,
        loss: str | AttackLoss = "dice_ce",
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool = True,
        restarts: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, steps, step_size, **options)
        self.random_start = bool(random_start)
        self.restarts = check_restarts(restarts, self.random_start)

    def _search(self, run: Run) -> None:
        for restart in range(self.restarts):
            self._ascend(run, run.ball.random(run.generator) if self.random_start else run.clean, restart)


def check_restarts(restarts: int, random_start: bool) -> int:
    """The number of restarts.

    Raises:
        ConfigError: if it is none, or the restarts would all be the same search.
    """
    restarts = positive("restarts", restarts)
    if restarts > 1 and not random_start:
        raise ConfigError("restarts from the same point repeat one search: set random_start")
    return restarts


class TargetedIFGSM(IFGSM):
    """Targeted iterative FGSM: steps that lower the loss towards a target segmentation.

    This is the TI-FGSM of Liu et al. (arXiv 1908.00656); elsewhere that abbreviation means *translation-invariant*
    FGSM, which is another attack.

    Args:
        threat: what may change.
        target: rule of the target, see :func:`monai_adv.losses.make_target`; a mask may be given in the call.
        loss: what is descended towards the target.
        steps: gradient steps.
        step_size: step in the threat's units; None is ``2.5 eps / steps``.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "targeted_ifgsm"
    reference: ClassVar[str] = "Liu et al. 2019"
    modes: ClassVar[str] = "targeted"

    def __init__(
        self,
        threat: Threat,
        target: Target = "background",
        loss: str | AttackLoss = "ce",
        steps: int = 10,
        step_size: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, steps, step_size, target=target, **options)
