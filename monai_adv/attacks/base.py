"""The contract of an attack, its result, and the loop that gradient attacks share."""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from monai.data import MetaTensor
from torch import Generator, Tensor

from monai_adv.errors import ConfigError, NonFiniteError
from monai_adv.losses import AttackLoss, as_loss, make_target, target_agreement
from monai_adv.threats import Ball, Threat
from monai_adv.victims import Victim, mean_dice


@dataclass
class Cost:
    """What an attack cost: whole-volume forward and backward passes, and wall time."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


@dataclass
class AttackResult:
    """What an attack found.

    Attributes:
        image: adversarial image ``(B, C, *spatial)``, of the type that was given (MetaTensor keeps its affine).
        perturbation: ``image - clean``.
        prediction: the victim's segmentation of ``image``, class indices or bits.
        success: ``(B,)`` bool. Untargeted: mean Dice fell, to at most ``goal`` times the clean mean Dice. Targeted:
            the agreement with the target reached ``goal``.
        score: ``(B,)`` the metric the best iterate was kept by: mean Dice over regions (untargeted, lower is
            stronger) or agreement with the target (targeted, higher is stronger).
        clean_score: the same metric of the clean image.
        best_step: ``(B,)`` step whose image is returned; counts through restarts.
        trace: per evaluated step ``{"step", "restart", "loss": (B,), "score": (B,), "zero_gradient": (B,)}``;
            ``zero_gradient`` is the share of support voxels whose gradient is exactly zero (NaN where none was taken).
        cost: forwards, backwards, seconds.
    """

    image: Tensor
    perturbation: Tensor
    prediction: Tensor
    success: Tensor
    score: Tensor
    clean_score: Tensor
    best_step: Tensor
    trace: list[dict[str, Any]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


class Attack(ABC):
    """Searches a perturbation that a threat allows and that raises a loss of a victim.

    Args:
        threat: what may change.
        loss: "ce", "dice", "dice_ce", "margin" or an :class:`monai_adv.losses.AttackLoss`.
        label_source: "truth" (attack the given label) or "prediction" (attack the victim's clean prediction).
        goal: what counts as success: for untargeted attacks the share of the clean mean Dice that may be left, for
            targeted ones the agreement with the target to reach; in [0, 1].
        seed: of the attack's own random numbers where a call gives no generator.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    targeted: ClassVar[bool] = False

    def __init__(
        self,
        threat: Threat,
        loss: str | AttackLoss = "dice_ce",
        *,
        label_source: str = "truth",
        goal: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not isinstance(threat, Threat):
            raise ConfigError(f"{type(self).__name__} needs a threat such as LInf(eps=0.1), got {threat!r}")
        if label_source not in ("truth", "prediction"):
            raise ConfigError(f"label_source {label_source!r} is unknown: use 'truth' or 'prediction'")
        if not 0 <= goal <= 1:
            raise ConfigError(f"goal must be in [0, 1], got {goal}")
        self.threat = threat
        self.loss = as_loss(loss)
        self.label_source = label_source
        self.goal = goal
        self.seed = seed

    def __call__(
        self,
        victim: Victim,
        image: Tensor,
        label: Tensor | None = None,
        *,
        support: Tensor | None = None,
        weight: Tensor | None = None,
        target: Tensor | None = None,
        generator: Generator | None = None,
    ) -> AttackResult:
        """Attack a batch; every sample is attacked for itself.

        Args:
            victim: the pipeline to fool.
            image: clean ``(B, C, *spatial)``, tensor or MetaTensor.
            label: ``(B, 1, *spatial)`` class indices for a softmax head, ``(B, K, *spatial)`` bits for a sigmoid head.
                May be left out with ``label_source="prediction"``.
            support: voxels that may change, ``(B, 1 or C, *spatial)`` bool; the threat's rule if None.
            weight: voxels that count in the loss and in the score, ``(B, 1, *spatial)``; all if None.
            target: target segmentation of a targeted attack; its rule if None.
            generator: random numbers; a generator seeded with ``seed`` if None. The global state is never touched.

        Returns:
            The best iterate by the metric and how it was found.

        Raises:
            NonFiniteError: if the image, a logit, the loss or the gradient is NaN or infinite.
            ConfigError: if label, support or target do not fit the image and the head.
        """
        return self.curve(
            victim, image, label, [self.threat.eps],
            support=support, weight=weight, target=target, generator=generator,
        )[0]  # fmt: skip

    @torch.inference_mode(False)  # whoever scores may be in inference mode; a gradient needs the normal one
    def curve(
        self,
        victim: Victim,
        image: Tensor,
        label: Tensor | None,
        eps: Sequence[float],
        *,
        support: Tensor | None = None,
        weight: Tensor | None = None,
        target: Tensor | None = None,
        generator: Generator | None = None,
    ) -> list[AttackResult]:
        """Attack once per budget; what the budgets share (the clean pass, a one-step gradient) is computed once.

        Args:
            eps: budgets in the threat's units.
            victim: see :meth:`__call__`, as the others.
            image: see :meth:`__call__`.
            label: see :meth:`__call__`.
            support: see :meth:`__call__`.
            weight: see :meth:`__call__`.
            target: see :meth:`__call__`.
            generator: see :meth:`__call__`.

        Returns:
            One result per budget, in the order given. Shared passes are counted in the first one's cost.
        """
        if target is not None and not self.targeted:
            raise ConfigError(f"{self.name} is untargeted and takes no target; use targeted_ifgsm")
        plain = _working(image)
        label, mask, weight, target = (None if t is None else _working(t) for t in (label, support, weight, target))
        if not plain.is_floating_point():
            raise ConfigError(f"an attack needs a floating point image, got {plain.dtype}")
        if not bool(torch.isfinite(plain).all()):
            raise NonFiniteError("the clean image holds NaN or infinite voxels: check the file (monai-adv check)")
        ball = self.threat.bind(plain, mask)
        if weight is not None and weight.shape != (len(plain), 1, *plain.shape[2:]):
            raise ConfigError(
                f"weight {tuple(weight.shape)} must be (B, 1, *spatial) of the image {tuple(plain.shape)}"
            )
        if generator is None:
            generator = Generator().manual_seed(self.seed)
        with victim.attacked(ball.mask, plain):
            run = Run(self, victim, ball, label, weight, target, generator)
            numbers = generator.get_state()
            results = []
            for value in eps:
                generator.set_state(numbers)  # every budget sees the same random numbers, alone or in a list
                run.start_budget(self.threat.with_eps(value).eps)
                self._search(run)
                results.append(run.result(image))
        return results

    @abstractmethod
    def _search(self, run: Run) -> None:
        """Offer images of ``run.ball`` to ``run.consider``."""

    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, for records and reports."""
        names = [n for c in type(self).__mro__ if "__init__" in vars(c) for n in inspect.signature(c).parameters]
        found = {n: getattr(self, n) for n in dict.fromkeys(names) if n not in ("self", "threat") and hasattr(self, n)}
        return {"threat": self.threat.describe(), **{k: _readable(v) for k, v in found.items()}}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.parameters().items() if k != "threat")
        return f"{type(self).__name__}({self.threat!r}, {arguments})"


class Run:
    """One attack on one batch: the objective, its gradient, and the best iterate so far.

    Attributes:
        ball: the allowed images of the current budget.
        clean: the clean image.
        generator: random numbers.
        shared: what an attack wants to keep from one budget to the next.
    """

    def __init__(
        self,
        attack: Attack,
        victim: Victim,
        ball: Ball,
        label: Tensor | None,
        weight: Tensor | None,
        target: Tensor | None,
        generator: Generator,
    ) -> None:
        self.attack, self.victim, self.ball, self.generator = attack, victim, ball, generator
        self.clean = ball.clean
        self.weight = None if weight is None else weight.to(ball.clean.device)
        self.shared: dict[str, Any] = {}
        self._support_voxels = ball.mask.flatten(1).sum(1).double()
        self._started = time.perf_counter()
        self._forwards = self._backwards = 0
        with torch.no_grad():
            logits = self._logits(self.clean)
        head = victim.head
        if attack.label_source == "prediction":
            label = head.predict(logits)
        elif label is None:
            raise ConfigError(f"{attack.name} needs a label, or label_source='prediction'")
        self.label = head.check_label(label, logits)
        self.target: Tensor | None = None
        if attack.targeted:
            rule = target if target is not None else attack.target  # type: ignore[attr-defined]
            rule = _working(rule) if isinstance(rule, Tensor) else rule
            self.target = make_target(rule, self.label, logits, head)
        self.clean_score = self._score(head.predict(logits))

    def start_budget(self, eps: float) -> None:
        """Forget the best iterate and go to another budget."""
        self.ball = self.ball.with_eps(eps)
        self.trace: list[dict[str, Any]] = []
        self._best: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        self._step = 0

    def gradient(self, image: Tensor, *, restart: int = 0, candidate: bool = True) -> Tensor:
        """Ascent direction of the objective at ``image``; the image is considered as a result on the way.

        Args:
            image: where.
            restart: index of the restart, for the trace.
            candidate: whether the image may be returned (the clean image may not).
        """
        image = image.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = self._logits(image)
            objective = self._objective(logits)
            # without any path to the image the objective has no graph, or one of other tensors only
            gradient = torch.autograd.grad(objective.sum(), image, allow_unused=True)[0] if objective.grad_fn else None
        if gradient is None:
            raise ConfigError(
                f"the logits of {self.victim.name} are not connected to the image by autograd: a step of the pipeline "
                "(preprocessing, inferer, network) detaches it; use a black-box attack or a differentiable step"
            )
        self._backwards += 1
        # a sum is finite unless an addend is not, short of an overflow: then every addend is looked at
        if not bool(torch.isfinite(gradient.sum())) and not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError("the gradient of the attack's loss is NaN or infinite")
        zero = (self._support_voxels - self._count_nonzero(gradient)) / self._support_voxels
        self._note(image.detach(), logits.detach(), objective.detach(), zero, restart, candidate)
        return gradient

    def clean_gradient(self) -> Tensor:
        """Ascent direction at the clean image, taken once for all budgets; the trace of each begins with it."""
        if "clean_gradient" not in self.shared:
            gradient = self.gradient(self.clean, candidate=False)
            self.shared["clean_gradient"] = gradient, self.trace[-1]
        else:
            gradient, entry = self.shared["clean_gradient"]
            self.trace.append({**entry, "step": self._step})
            self._step += 1
        return gradient

    def consider(self, image: Tensor, *, restart: int = 0) -> None:
        """Evaluate an image and keep it where it is better than what was seen before."""
        with torch.no_grad():
            logits = self._logits(image)
            objective = self._objective(logits)
        nothing = torch.full_like(self._support_voxels, float("nan"))
        self._note(image, logits, objective, nothing, restart, True)

    def result(self, given: Tensor) -> AttackResult:
        """The best iterate as an :class:`AttackResult`, of the type of ``given``."""
        assert self._best is not None, "an attack must consider at least one image"
        image, prediction, score, step, _ = self._best
        goal = self.attack.goal
        fell = (score <= goal * self.clean_score) & (score < self.clean_score)  # a clean Dice of 0 cannot fall
        success = score >= goal if self.attack.targeted else fell
        perturbation = image - self.clean
        cost = Cost(self._forwards, self._backwards, time.perf_counter() - self._started)
        self._forwards = self._backwards = 0
        self._started = time.perf_counter()
        if isinstance(given, MetaTensor):
            image, perturbation = (
                MetaTensor(x, meta=given.meta, applied_operations=given.applied_operations)
                for x in (image, perturbation)
            )
        return AttackResult(image, perturbation, prediction, success, score, self.clean_score, step, self.trace, cost)

    def _logits(self, image: Tensor) -> Tensor:
        self._forwards += 1
        return self.victim(image)

    def _objective(self, logits: Tensor) -> Tensor:
        """What is ascended, ``(B,)``."""
        head, loss = self.victim.head, self.attack.loss
        if self.target is None:
            return loss(logits, self.label, head, self.weight)
        return loss.towards(logits, self.target, head, self.weight)

    def _score(self, prediction: Tensor) -> Tensor:
        if self.target is None:
            return mean_dice(prediction, self.label, self.victim.head, self.weight)
        return target_agreement(prediction, self.target, self.label, self.weight)

    def _count_nonzero(self, gradient: Tensor) -> Tensor:
        inside = torch.logical_and(gradient, self.ball.mask)
        return torch.stack([torch.count_nonzero(sample) for sample in inside]).double()

    def _note(
        self, image: Tensor, logits: Tensor, objective: Tensor, zero: Tensor, restart: int, candidate: bool
    ) -> None:
        if not bool(torch.isfinite(objective).all()):
            raise NonFiniteError("the attack's loss is NaN or infinite")
        prediction = self.victim.head.predict(logits)
        score = self._score(prediction)
        self.trace.append(
            {"step": self._step, "restart": restart, "loss": objective, "score": score, "zero_gradient": zero}
        )
        step = torch.full_like(score, self._step, dtype=torch.long)
        self._step += 1
        if not candidate:
            return
        if self._best is None:
            self._best = (image, prediction, score, step, objective)
            return
        best_image, best_prediction, best_score, best_step, best_objective = self._best
        ahead = score > best_score if self.attack.targeted else score < best_score
        # the loss decides between equal scores, so that progress inside one Dice value is not lost
        better = ahead | ((score == best_score) & (objective > best_objective))
        if bool(better.all()):
            self._best = (image, prediction, score, step, objective)
        elif bool(better.any()):
            where = better.view(-1, *[1] * (image.dim() - 1))
            self._best = (
                torch.where(where, image, best_image),
                torch.where(where, prediction, best_prediction),
                torch.where(better, score, best_score),
                torch.where(better, step, best_step),
                torch.where(better, objective, best_objective),
            )


def _working(tensor: Tensor) -> Tensor:
    """A plain tensor that may take part in a graph."""
    tensor = (tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor).detach()
    return tensor.clone() if tensor.is_inference() else tensor


def _readable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"mask {tuple(value.shape)}"
    if isinstance(value, AttackLoss):
        return repr(value)
    return dict(value) if isinstance(value, Mapping) else value
