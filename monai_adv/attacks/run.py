"""One attack on one batch: the objective, its gradient, and the best iterate so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from monai_adv.attacks.result import AttackResult, Cost
from monai_adv.data.meta import like, plain
from monai_adv.errors import ConfigError, NonFiniteError
from monai_adv.losses import AttackLoss, make_target, target_agreement
from monai_adv.threats import Ball
from monai_adv.victims import Victim, mean_dice

if TYPE_CHECKING:
    from monai_adv.attacks.base import Attack

# a loss by name or object (targeted or not as the attack is), or any ascended number per sample of the logits
Objective = AttackLoss | Callable[[Tensor], Tensor]


_ITERATE = ("image", "prediction", "label", "score", "step")


@dataclass
class _Best:
    """The best iterate of every sample: all tensors have the batch first."""

    rank: Tensor
    tensors: dict[str, Tensor]

    def merge(self, other: _Best) -> _Best:
        """Per sample whichever ranks higher; the earlier one of equals."""
        better = _higher(other.rank, self.rank)
        if bool(better.all()):
            return other
        if not bool(better.any()):
            return self
        chosen = {}
        for name, mine in self.tensors.items():
            theirs = other.tensors[name]
            chosen[name] = torch.where(better.to(mine.device).view(-1, *[1] * (mine.dim() - 1)), theirs, mine)
        return _Best(torch.where(better[:, None], other.rank, self.rank), chosen)


def _higher(a: Tensor, b: Tensor) -> Tensor:
    """Rows of ``a`` that come after the rows of ``b`` in lexicographic order, ``(B,)``."""
    differs = a != b
    first = torch.argmax(differs.int(), dim=1, keepdim=True)  # the first column that differs, 0 if none does
    return (a.gather(1, first) > b.gather(1, first))[:, 0]


class Run:
    """One attack on one batch.

    Attributes:
        ball: the allowed images of the current budget.
        clean: the clean image ``(B, C, *spatial)``.
        label: the label that is attacked, of the head's kind.
        target: the target segmentation of a targeted attack, else None.
        weight: voxels that count, ``(B, 1, *spatial)``, or None.
        spacing: voxel size in mm, one per axis.
        affine: voxel to world of every image, ``(B, 4, 4)``, or None where it is not known.
        head: the victim's head.
        clean_logits: logits of the clean image, without a graph.
        generator: random numbers.
        shared: what an attack wants to keep from one budget to the next.
        details: per sample, copied into the result; cleared for every budget.
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
        spacing: tuple[float, ...],
        affine: Tensor | None = None,
        clean_logits: Tensor | None = None,
    ) -> None:
        self.attack, self.victim, self.ball, self.generator = attack, victim, ball, generator
        self.clean = ball.clean
        self.head = victim.head
        self.spacing = spacing
        self.affine = affine
        self.weight = None if weight is None else weight.to(ball.clean.device)
        self.shared: dict[str, Any] = {}
        self.details: dict[str, list[Any]] = {}
        self._kinds: dict[str, tuple[torch.dtype, torch.device]] = {}  # of the trace's numbers
        self._support_voxels = ball.mask.flatten(1).sum(1).double()
        self._started = time.perf_counter()
        self._forwards = self._backwards = 0
        with torch.no_grad():
            # given by a caller who has them, or has no use for them: a pass saved
            drawn = [] if clean_logits is None else [clean_logits]
            drawn = drawn or [self._logits(self.clean) for _ in range(attack.draws)]
        self.clean_logits = drawn[0] if len(drawn) == 1 else torch.stack(drawn).mean(0)
        if attack.label_source == "prediction":
            label = self.victim.discretise(self.clean_logits)
        elif label is None:
            raise ConfigError(f"{attack.name} needs a label, or label_source='prediction'")
        self.label = self.head.check_label(label, self.clean_logits)
        self.target: Tensor | None = None
        if attack.targeted:
            rule = target if target is not None else attack.target
            assert rule is not None
            rule = working(rule) if isinstance(rule, Tensor) else rule
            self.target = make_target(
                rule, self.label, self.clean_logits, self.head, spacing=spacing, support=ball.mask
            )
        # the mean of the draws' scores, as that of every iterate: the mean logits of a random victim score higher
        self.clean_score = torch.stack([self.score(self.victim.discretise(logits)) for logits in drawn]).mean(0)

    def start_budget(self, eps: float) -> None:
        """Forget the best iterate and go to another budget."""
        self.ball = self.ball.with_eps(eps)
        self.trace: list[dict[str, Any]] = []
        self.details = {}
        self._best: _Best | None = None
        self._step = 0

    # ------------------------------------------------------------------------------------------- evaluating
    def gradient(
        self,
        image: Tensor,
        *,
        loss: Objective | None = None,
        restart: int = 0,
        candidate: bool = True,
        warp: Callable[[Tensor], Tensor] | None = None,
        parameters: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Ascent direction of the objective at ``image``; the image is considered as a result on the way.

        The loss and score of the step are in ``self.trace[-1]``.

        Args:
            image: where.
            loss: what is ascended instead of the attack's loss: an :class:`AttackLoss` (towards the target if the
                attack is targeted), or a function of the logits that gives one number per sample.
            restart: index of the restart, for the trace.
            candidate: whether the image may be returned (the clean image may not).
            warp: moves label, target and weight with the image (nearest neighbour), for geometric attacks.
            parameters: of a physical attack, tensors ``(B, ...)`` that made the image; kept with the best iterate.
        """
        image = self.ball.store(image)  # the gradient passes straight through the rounding
        total: Tensor | None = None
        found: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.attack.draws):
            leaf = image.detach().requires_grad_(True)
            with torch.enable_grad():
                logits = self._logits(leaf)
                objective = self._objective(logits, loss, warp)
                # without any path to the image the objective has no graph, or one of other tensors only
                gradient = (
                    torch.autograd.grad(objective.sum(), leaf, allow_unused=True)[0] if objective.grad_fn else None
                )
            if gradient is None:
                raise ConfigError(
                    f"the logits of {self.victim.name} are not connected to the image by autograd: a step of the "
                    "pipeline (preprocessing, inferer, network) detaches it; use a black-box attack or a "
                    "differentiable step (monai_adv.victims.StraightThrough)"
                )
            self._backwards += 1
            total = gradient if total is None else total + gradient
            found.append((logits.detach(), objective.detach()))
        assert total is not None
        if len(found) > 1:  # the mean: attacks without a sign follow the gradient's size
            total = total / len(found)
        # a sum is finite unless an addend is not, short of an overflow: then every addend is looked at
        if not bool(torch.isfinite(total.sum())) and not bool(torch.isfinite(total).all()):
            raise NonFiniteError("the gradient of the attack's loss is NaN or infinite")
        zero = (self._support_voxels - self._count_nonzero(total)) / self._support_voxels
        self._note(image.detach(), found, zero, restart, candidate, warp, parameters)
        return total

    def clean_gradient(self) -> Tensor:
        """Ascent direction at the clean image, taken once for all budgets; the trace of each begins with it."""
        if "clean_gradient" not in self.shared:
            gradient = self.gradient(self.clean, candidate=False)
            self.shared["clean_gradient"] = gradient, dict(self.trace[-1])
        else:
            gradient, entry = self.shared["clean_gradient"]
            self._lighten()
            self.trace.append({**entry, "step": self._step})
            self._step += 1
        return gradient

    def consider(
        self,
        image: Tensor,
        *,
        loss: Objective | None = None,
        restart: int = 0,
        candidate: bool = True,
        warp: Callable[[Tensor], Tensor] | None = None,
        parameters: dict[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Evaluate an image without a gradient and keep it where it is better than what was seen before.

        Args: as :meth:`gradient`.

        Returns:
            Its entry of the trace: loss and score per sample.
        """
        image = self.ball.store(image)
        found = []
        with torch.no_grad():
            for _ in range(self.attack.draws):
                logits = self._logits(image)
                found.append((logits, self._objective(logits, loss, warp)))
        nothing = torch.full_like(self._support_voxels, float("nan"))
        self._note(image.detach(), found, nothing, restart, candidate, warp, parameters)
        return self.trace[-1]

    def logits(self, image: Tensor) -> Tensor:
        """Logits without a graph, counted as a forward pass and considered for nothing."""
        with torch.no_grad():
            return self._mean_logits(self.ball.store(image))

    def score(self, prediction: Tensor, warp: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Mean Dice against the label or agreement with the target, ``(B,)`` float64."""
        label, weight = self._moved(self.label, warp), self._moved_weight(warp)
        if self.target is None:
            return mean_dice(prediction, label, self.head, weight)
        return target_agreement(prediction, self._moved(self.target, warp), label, weight)

    def reached(self, score: Tensor) -> Tensor:
        """Whether a score is a success, ``(B,)`` bool."""
        goal = self.attack.goal
        if self.attack.targeted:
            return score >= goal
        return (score <= goal * self.clean_score) & (score < self.clean_score)  # a clean Dice of 0 cannot fall

    def spent(self, seconds: float) -> None:
        """Count time that was spent before this run on something that it uses."""
        self._started -= seconds

    # ------------------------------------------------------------------------------------------- the result
    @property
    def best_image(self) -> Tensor:
        """The best image so far."""
        assert self._best is not None
        return self._best.tensors["image"]

    @property
    def best_step(self) -> Tensor:
        """The step of the best image so far, ``(B,)``."""
        assert self._best is not None
        return self._best.tensors["step"]

    @property
    def best_prediction(self) -> Tensor:
        """The victim's segmentation of the best image so far."""
        assert self._best is not None
        return self._best.tensors["prediction"]

    @property
    def best_parameters(self) -> dict[str, Tensor]:
        """The parameters of the best image so far, of a physical attack."""
        assert self._best is not None
        return {k: v for k, v in self._best.tensors.items() if k not in _ITERATE}

    def result(self, given: Tensor) -> AttackResult:
        """The best iterate as an :class:`AttackResult`, of the type of ``given``."""
        assert self._best is not None, "an attack must consider at least one image"
        kept = dict(self._best.tensors)
        image, prediction, label, score, step = (kept.pop(k) for k in _ITERATE)
        perturbation = image - self.clean
        cost = Cost(self._forwards, self._backwards, time.perf_counter() - self._started)
        self._forwards = self._backwards = 0
        self._started = time.perf_counter()
        image, perturbation = like(image, given), like(perturbation, given)
        return AttackResult(
            image, perturbation, prediction, label, self.reached(score), score, self.clean_score, step,
            self._whole_trace(), cost, kept, self.details,
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------- internals
    def _logits(self, image: Tensor) -> Tensor:
        self._forwards += 1
        return self.victim(image)

    def _mean_logits(self, image: Tensor) -> Tensor:
        logits = self._logits(image)
        for _ in range(self.attack.draws - 1):
            logits = logits + self._logits(image)
        return logits / self.attack.draws if self.attack.draws > 1 else logits

    def _objective(self, logits: Tensor, loss: Objective | None, warp: Callable[[Tensor], Tensor] | None) -> Tensor:
        """What is ascended, ``(B,)``."""
        loss = self.attack.loss if loss is None else loss
        if not isinstance(loss, AttackLoss):
            return loss(logits)
        weight = self._moved_weight(warp)
        if self.target is None:
            return loss(logits, self._moved(self.label, warp), self.head, weight)
        return loss.towards(logits, self._moved(self.target, warp), self.head, weight)

    @staticmethod
    def _moved(mask: Tensor, warp: Callable[[Tensor], Tensor] | None) -> Tensor:
        return mask if warp is None else warp(mask)

    def _moved_weight(self, warp: Callable[[Tensor], Tensor] | None) -> Tensor | None:
        return None if self.weight is None else self._moved(self.weight, warp)

    def _count_nonzero(self, gradient: Tensor) -> Tensor:
        inside = torch.logical_and(gradient, self.ball.mask)
        return torch.stack([torch.count_nonzero(sample) for sample in inside]).double()

    def _lighten(self) -> None:
        """Keep numbers instead of tensors of the step before.

        Thousands of tiny tensors between the large ones of the passes would hold the freed memory in pieces: an attack
        of 2,500 steps grew by the size of its image in every one.
        """
        for key, value in self.trace[-1].items() if self.trace else ():
            if isinstance(value, Tensor):
                self._kinds[key] = value.dtype, value.device
                self.trace[-1][key] = value.tolist()

    def _whole_trace(self) -> list[dict[str, Any]]:
        """The trace with its numbers as tensors ``(B,)`` again."""
        self._lighten()
        return [
            {k: torch.tensor(v, dtype=self._kinds[k][0], device=self._kinds[k][1]) if k in self._kinds else v
             for k, v in entry.items()}
            for entry in self.trace
        ]  # fmt: skip

    def _note(
        self,
        image: Tensor,
        found: list[tuple[Tensor, Tensor]],
        zero: Tensor,
        restart: int,
        candidate: bool,
        warp: Callable[[Tensor], Tensor] | None,
        parameters: dict[str, Tensor] | None,
    ) -> None:
        objective = sum(o for _, o in found[1:]) + found[0][1]
        objective = objective / len(found) if len(found) > 1 else objective
        if not bool(torch.isfinite(objective).all()):
            raise NonFiniteError("the attack's loss is NaN or infinite")
        # over several draws of a random victim: the mean score, and the prediction of the mean logits
        predictions = [self.victim.discretise(logits) for logits, _ in found]
        score = torch.stack([self.score(p, warp) for p in predictions]).mean(0)
        prediction = predictions[0]
        if len(found) > 1:
            prediction = self.victim.discretise(torch.stack([logits for logits, _ in found]).mean(0))
        self._lighten()
        self.trace.append(
            {"step": self._step, "restart": restart, "loss": objective, "score": score, "zero_gradient": zero}
        )
        step = torch.full_like(score, self._step, dtype=torch.long)
        self._step += 1
        if not candidate:
            return
        rank = self.attack._rank(self, image, prediction, score, objective)
        label = self._moved(self.label, warp)
        tensors = {"image": image, "prediction": prediction, "label": label, "score": score, "step": step}
        tensors |= {k: v.detach() for k, v in (parameters or {}).items()}
        new = _Best(rank, tensors)
        self._best = new if self._best is None else self._best.merge(new)


def working(tensor: Tensor) -> Tensor:
    """A plain tensor that may take part in a graph."""
    tensor = plain(tensor).detach()
    return tensor.clone() if tensor.is_inference() else tensor
