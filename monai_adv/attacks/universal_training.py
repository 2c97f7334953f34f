"""Training a universal perturbation: steps along the mean gradient of a cohort."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Generator, Tensor

from monai_adv.attacks.base import positive
from monai_adv.attacks.run import Run, working
from monai_adv.attacks.universal import MODES, Universal, UniversalPerturbation, check_placement, check_threat, placed
from monai_adv.data.meta import spacing_of
from monai_adv.errors import ConfigError, DataError
from monai_adv.losses import AttackLoss
from monai_adv.threats import Threat
from monai_adv.victims import Head, Victim, mean_dice


@dataclass
class _Subject:
    """One subject's tensors, batch first."""

    image: Tensor
    label: Tensor | None
    support: Tensor | None
    affine: Tensor | None
    spacing: tuple[float, ...]


def fit_universal(
    victim: Victim,
    cases: Sequence[Mapping[str, Any]] | Iterable[Mapping[str, Any]],
    threat: Threat,
    *,
    mode: str = "untargeted",
    target: str | Mapping[str, Any] | Tensor | None = None,
    steps: int = 40,
    batch: int = 2,
    step_size: float | None = None,
    loss: str | AttackLoss = "dice_ce",
    confidence: float = 0.75,
    placement: str = "world",
    reference: Tensor | None = None,
    label_source: str = "truth",
    seed: int = 0,
    on_step: Callable[[int, UniversalPerturbation], None] | None = None,
    on_problem: Callable[[int, Exception], None] | None = None,
) -> UniversalPerturbation:
    """Train one perturbation for a cohort: ``d <- project(d + a sign(mean_k grad L(x_k + d)))``.

    ``d`` is in units of the threat on a reference grid; for subject k it is brought to its grid, multiplied by its own
    unit, masked by its support and projected, and the gradient goes the same way back. An L2 threat steps along the
    normalised mean gradient. The last iterate is returned: losses of different mini-batches are no basis to choose one.

    Reference:
        Moosavi-Dezfooli et al. 2017; Metzen et al. 2017 (targets, confidence).

    Args:
        victim: the pipeline to fool.
        cases: subjects as ``{"image": (C, *spatial), "label": (1, *spatial) classes or the head's own label,
            "subject": name}``, optionally ``"support"``, ``"affine"`` and ``"spacing"`` (a MetaTensor brings the last
            two). A sequence is indexed whenever a subject's turn comes, so one that loads from disk keeps one subject
            in memory; anything else iterable is made a list.
        threat: what may change; its ``channels`` choose the modalities.
        mode: "untargeted" (away from the label), "static" (every subject gets one target mask) or "dynamic" (the
            target is a rule of :func:`monai_adv.losses.make_target` applied to each subject).
        target: "static": a mask ``(1, *spatial)`` of classes, or the head's own label, on the reference grid or a
            MetaTensor (another subject's); "dynamic": the rule.
        steps: updates of ``d``.
        batch: subjects per update; the cohort is shuffled anew each time it has been gone through.
        step_size: a, in the threat's units; None is ``2.5 eps / steps``.
        loss: what is ascended, or descended towards a target.
        confidence: a voxel (sigmoid: a bit) that is at the target with a probability above this gives no gradient.
        placement: see :meth:`UniversalPerturbation.on`.
        reference: ``(C, *spatial)`` whose grid ``d`` lies on, MetaTensor or tensor; the first case's image if None,
            so give a whole volume where the cases are cropped, each around its own brain.
        label_source: "truth" or "prediction" (the clean one, a pass more per visit).
        seed: of the order of the subjects and of a random victim's steps.
        on_step: told the number of updates done and the perturbation so far.
        on_problem: told the index of a case that could not be used and why; it is left out from then on. If None the
            error is raised.

    Returns:
        The perturbation; ``details["trace"]`` has per update its subjects, the mean of what is ascended and the mean
        Dice against the label (of the images before the update).

    Raises:
        ConfigError: if the options do not fit together.
        DataError: if no subject is left.
    """
    target = _checked(mode, target, confidence)
    check_threat(threat)
    if step_size is not None and not (isinstance(step_size, (int, float)) and 0 < step_size < math.inf):
        raise ConfigError(f"step_size must be > 0 and finite, got {step_size!r}")
    positive("steps", steps), positive("batch", batch)
    subjects: Sequence[Mapping[str, Any]] = cases if hasattr(cases, "__getitem__") else list(cases)  # type: ignore[assignment]
    training = _Training(
        victim, subjects, threat, mode, target, loss, confidence, check_placement(placement), label_source, seed,
        on_problem,
    )  # fmt: skip
    data, affine = training.reference(reference)
    around = replace(threat, units="absolute", bounds=None, support="all").bind(data[None])
    size = 2.5 * threat.eps / steps if step_size is None else float(step_size)
    options = {"steps": steps, "batch": batch, "step_size": size, "loss": repr(training.attack(None).loss),
               "confidence": confidence, "placement": placement, "label_source": label_source}  # fmt: skip
    trace: list[dict[str, Any]] = []
    named = dict(target) if isinstance(target, Mapping) else target if isinstance(target, str) else None
    if isinstance(target, Tensor):
        named = f"mask {tuple(target.shape)}"
    found = UniversalPerturbation(
        data, threat, affine, mode, named, (), victim.name, seed, {**options, "trace": trace}
    )  # fmt: skip
    for step, chosen in zip(range(steps), training.batches(batch)):
        entry, gradient = training.mean_gradient(found, chosen)
        if gradient is None:  # none of this batch could be used
            continue
        trace.append({"step": step, **entry})
        found = replace(found, data=around.step(found.data[None], gradient[None], size)[0])
        if on_step is not None:
            on_step(step + 1, replace(found, subjects=training.used()))
    return replace(found, subjects=training.used())


def _checked(mode: str, target: Any, confidence: float) -> Any:
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if mode == "untargeted" and target is not None:
        raise ConfigError("an untargeted universal perturbation takes no target: use mode='static' or 'dynamic'")
    if mode == "static" and not isinstance(target, Tensor):
        raise ConfigError(f"mode 'static' needs one mask as target, got {target!r}: for a rule use mode='dynamic'")
    if mode == "dynamic" and not isinstance(target, (str, Mapping)):
        raise ConfigError("mode 'dynamic' needs a rule as target, e.g. {'hide': 'ET'}: for a mask use mode='static'")
    if not 0.5 <= confidence <= 1:
        raise ConfigError(f"confidence must be in [0.5, 1], got {confidence}")
    return target


class _Training:
    """The cohort and what is asked of it; subjects that fail are left out."""

    def __init__(
        self,
        victim: Victim,
        cases: Sequence[Mapping[str, Any]],
        threat: Threat,
        mode: str,
        target: Any,
        loss: str | AttackLoss,
        confidence: float,
        placement: str,
        label_source: str,
        seed: int,
        on_problem: Callable[[int, Exception], None] | None,
    ) -> None:
        self.victim, self.cases, self.threat, self.mode, self.target = victim, cases, threat, mode, target
        self.loss, self.confidence, self.placement = loss, confidence, placement
        self.label_source, self.on_problem = label_source, on_problem
        self.generator = Generator().manual_seed(seed)
        self.left = list(range(len(cases)))
        self.names: dict[int, str] = {}
        self.last: Exception | None = None
        self.channels: int | None = None  # of the logits, once they have been seen

    def attack(self, target: Any) -> Universal:
        """The attack whose loss and target the runs take; its own perturbation is never asked for."""
        nothing = UniversalPerturbation(torch.zeros(1, 1, 1), self.threat)
        return Universal(
            self.threat, nothing, self.placement, self.loss, target=target, label_source=self.label_source
        )  # fmt: skip

    def reference(self, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Zeros on the reference grid, and its affine."""
        if given is None:
            for index in list(self.left):
                subject = self._try(index, lambda i: self._subject(i))
                if subject is not None:
                    return torch.zeros_like(subject.image[0]), subject.affine
            self._none_left()
        assert given is not None
        affine = torch.as_tensor(given.affine).double() if isinstance(given, MetaTensor) else None
        return torch.zeros_like(working(given)), affine

    def batches(self, size: int) -> Iterable[list[int]]:
        """Mini-batches without end; what remains of a pass is a smaller batch."""
        while True:
            order = [self.left[i] for i in torch.randperm(len(self.left), generator=self.generator)]
            if not order:
                self._none_left()
            for start in range(0, len(order), size):
                yield order[start : start + size]

    def mean_gradient(
        self, perturbation: UniversalPerturbation, chosen: Sequence[int]
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Mean ascent direction over some subjects on the reference grid, and what the trace says of them."""
        total: Tensor | None = None
        names, losses, scores = [], [], []
        for index in chosen:
            if index not in self.left:
                continue
            found = self._try(index, lambda i: self._visit(i, perturbation))
            if found is None:
                continue
            gradient, value, dice = found
            total = gradient if total is None else total + gradient
            names.append(self.names[index])
            losses.append(value)
            scores.append(dice)
        if total is None:
            return {}, None
        count = len(names)
        return {"subjects": names, "loss": sum(losses) / count, "dice": sum(scores) / count}, total / count

    def used(self) -> tuple[str, ...]:
        """Names of the subjects that have been visited and kept, in the order of the cohort."""
        return tuple(self.names[i] for i in self.left if i in self.names)

    # --------------------------------------------------------------------------------------------- one subject
    def _try(self, index: int, what: Callable[[int], Any]) -> Any:
        try:
            return what(index)
        except Exception as error:
            if self.on_problem is None:
                raise
            self.left.remove(index)
            self.last = error
            self.names.pop(index, None)
            self.on_problem(index, error)
            return None

    def _none_left(self) -> None:
        raise DataError("no subject is left to train a universal perturbation on") from self.last

    def _subject(self, index: int) -> _Subject:
        case = self.cases[index]
        self.names[index] = str(case.get("subject", index))
        image = case["image"]
        affine = case.get("affine")
        if affine is None and isinstance(image, MetaTensor):
            affine = image.affine
        label, support = case.get("label"), case.get("support")
        batched = image[None]
        return _Subject(
            image=working(batched),
            label=None if label is None else _as_label(working(label), self.victim.head)[None],
            support=None if support is None else working(support)[None],
            affine=None if affine is None else torch.as_tensor(affine).double(),
            spacing=spacing_of(batched, case.get("spacing")),
        )

    def _visit(self, index: int, perturbation: UniversalPerturbation) -> tuple[Tensor, float, float]:
        """Gradient on the reference grid, objective and Dice of one subject under the perturbation so far."""
        subject = self._subject(index)
        shape = subject.image.shape[2:]
        leaf = perturbation.data.detach().to(subject.image).requires_grad_(True)
        with torch.enable_grad():
            on = placed(leaf, perturbation.affine, shape, subject.affine, self.placement)
        target = self._target(perturbation.affine, shape, subject.affine)
        ball = self.threat.bind(subject.image, subject.support)
        blank = None
        if self.channels is not None and not self._needs_logits():
            blank = subject.image.new_zeros(1).expand(1, self.channels, *shape)  # a pass saved: nobody looks at it
        with self.victim.attacked(ball.mask, subject.image, subject.affine):
            run = Run(
                self.attack(target), self.victim, ball, subject.label, None, None, self.generator, subject.spacing,
                clean_logits=blank,
            )  # fmt: skip
            self.channels = int(run.clean_logits.shape[1])
            run.start_budget(self.threat.eps)
            image = ball.project(ball.clean + on.detach()[None] * ball.scale)
            if run.target is None:
                gradient = run.gradient(image, candidate=False)
                dice = run.trace[-1]["score"]
            else:
                objective = _Towards(run, self.confidence)
                gradient = run.gradient(image, loss=objective, candidate=False)
                dice = objective.dice
        units = ball.gradient_in_units(gradient)[0]
        # without an overlap of the grids there is no path back
        back = torch.autograd.grad(on, leaf, units)[0] if on.requires_grad else torch.zeros_like(leaf)
        return back.to(perturbation.data), float(run.trace[-1]["loss"].mean()), float(dice.mean())

    def _target(self, affine: Tensor | None, shape: Sequence[int], onto: Tensor | None) -> Any:
        """What the run is to aim at: the rule, or the one mask on this subject's grid."""
        if not isinstance(self.target, Tensor):
            return self.target
        own = torch.as_tensor(self.target.affine) if isinstance(self.target, MetaTensor) else affine
        mask = working(self.target).double()
        moved = placed(mask, own, shape, onto, self.placement, mode="nearest").round().long()
        return _as_label(moved, self.victim.head)[None]

    def _needs_logits(self) -> bool:
        """Whether the clean logits decide the label or the target."""
        return self.label_source == "prediction" or (isinstance(self.target, str) and self.target == "least_likely")


class _Towards:
    """The loss towards the run's target, without gradient where the target is reached with confidence."""

    def __init__(self, run: Run, confidence: float) -> None:
        self.run, self.confidence = run, confidence
        self.dice = torch.zeros(0)

    def __call__(self, logits: Tensor) -> Tensor:
        run = self.run
        assert run.target is not None
        values = logits.detach()
        self.dice = mean_dice(run.victim.discretise(values), run.label, run.head)
        sure = confident(values, run.target, run.head, self.confidence)
        # they keep their place in the sums of a Dice and have no gradient
        return run.attack.loss.towards(torch.where(sure, values, logits), run.target, run.head)


def confident(logits: Tensor, target: Tensor, head: Head, confidence: float) -> Tensor:
    """Voxels (sigmoid: bits) at the target with a probability above ``confidence``, ``(B, 1 or K, *spatial)`` bool."""
    probability = head.probabilities(logits)
    if head.exclusive:
        return probability.gather(1, target) > confidence
    return torch.where(target, probability, 1 - probability) > confidence


def _as_label(label: Tensor, head: Head) -> Tensor:
    """A label or mask ``(1 or K, *spatial)`` of the head's kind; one channel for several regions holds classes."""
    if not head.exclusive and len(label) == 1 and len(head.region_names) > 1:
        return head.label_from_classes(label[None])[0]
    return label if head.exclusive else label.bool()
