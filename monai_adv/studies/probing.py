"""What the probes measure on one victim and one subject."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monai_adv.attacks import AttackResult, create
from monai_adv.attacks.registry import option_names
from monai_adv.losses import as_loss
from monai_adv.studies.cases import Case
from monai_adv.studies.check import Check
from monai_adv.studies.check_saved import beyond_bounds
from monai_adv.studies.config import AttackEntry, StudyConfig
from monai_adv.threats import Ball
from monai_adv.victims import Victim

FOUND = "victim is left as it was found"
BEFORE = "clean forward before equals clean forward after"
TWICE = "forward twice is identical"
PATH = "path attacked is the path scored"
SEED = "same seed gives the same image"
BOUNDS = "bounds respected"
CLEAN = "clean Dice equals the stored one"
GRADIENT = "directional derivative against finite differences"
LARGE = "a very large eps destroys the prediction"
DOUBLE = "doubling the steps changes little"
NAMES = (FOUND, BEFORE, TWICE, PATH, SEED, BOUNDS, CLEAN, GRADIENT, LARGE, DOUBLE)
INVARIANTS = (FOUND, BEFORE, TWICE, PATH, BOUNDS, CLEAN)  # what cannot be computed there is a failure
ERROR = "could not be computed: "

SAME_PATH = 1e-4
"""Dice by which scoring may differ from the attack's own pass: other batches of windows may flip a tied voxel."""
SAME_DICE = 1e-6
STEPS = (1e-3, 1e-2)
"""Finite differences in standard deviations of each channel, the second where the first disagrees.

On a 2 mm BraTS U-Net the derivative along the gradient's sign differs by .0007 at 1e-4, .0009 at 1e-3 and .008 at 1e-2
(curvature), that along a random direction by .007 at 1e-3 (float32) and .01 at 1e-2.
"""
DISAGREES = 0.05
"""Relative error above which a gradient is not the derivative: three times the largest of five 2 mm victims (.017)."""
LARGE_EPS, LARGE_STEPS, DESTROYED = 4.0, 4, 0.05
"""Standard deviations, PGD steps, and the Dice that may be left; the 2 mm BraTS U-Net keeps .074 at 1 and .008 at 4."""
SETTLED = 0.01


@dataclass(frozen=True)
class Stored:
    """What the run holds of a victim and a subject.

    Attributes:
        clean: region -> clean Dice; empty if it is not known.
        title, eps, dice, seed: of the iterative attack to repeat with twice its steps; no title if there is none.
    """

    clean: dict[str, float] = field(default_factory=dict)
    title: str | None = None
    eps: float = math.nan
    dice: float = math.nan
    seed: int = 0


def probe(study: StudyConfig, name: str, victim: Victim, case: Case, stored: Stored) -> list[Check]:
    """Every probe of one victim on one subject; nothing is raised but an interruption.

    Args:
        study: its threat, its attacks and its seed.
        name: of the victim in tables.
        victim: as deployed, at the case's voxel size.
        case: the subject.
        stored: what the run says.

    Returns:
        One check for each of :data:`NAMES`, in that order.
    """
    return _Probe(study, name, victim, case, stored).all()


class _Probe:
    def __init__(self, study: StudyConfig, name: str, victim: Victim, case: Case, stored: Stored) -> None:
        self.study, self.name, self.victim, self.case, self.stored = study, name, victim, case, stored
        self.image = case.image.to(study.device)
        self.found: dict[str, Check] = {}
        self.images: list[tuple[Ball, Tensor]] = []  # what attacks gave, for the bounds

    def all(self) -> list[Check]:
        before = _state(self.victim)
        self.label = self.victim.head.label_from_classes(self.case.classes).to(self.study.device)
        try:
            clean = self._forward()
        except Exception as error:
            reason = error
            self._failed(TWICE, reason)
            for name in NAMES:
                self.found.setdefault(name, self._check(name, "NOT RUN", "the clean forward pass failed"))
            self._run(FOUND, lambda: self._left(before, reason))
            return [self.found[name] for name in NAMES]
        self._run(CLEAN, lambda: self._clean(clean))
        self._run(SEED, self._same_seed)
        self._run(PATH, self._path)
        self._run(GRADIENT, self._derivative)
        self._run(LARGE, self._large)
        self._run(DOUBLE, self._double)
        self._run(BOUNDS, self._bounds)
        self._run(BEFORE, lambda: self._before(clean))
        self._run(TWICE, lambda: self._twice(clean))
        self._run(FOUND, lambda: self._left(before))
        return [self.found[name] for name in NAMES]

    def _run(self, name: str, rule: Callable[[], tuple[str, str]]) -> None:
        try:
            self.found[name] = self._check(name, *rule())
        except Exception as error:  # whatever one probe stumbles over, the others go on
            self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        status = "FAIL" if name in INVARIANTS and not memory else "NOT RUN"
        self.found[name] = self._check(name, status, f"{ERROR}{type(error).__name__}: {error}")

    def _check(self, name: str, status: str, detail: str) -> Check:
        return Check(name, status, f"{detail} (subject {self.case.subject})", self.name)

    # -------------------------------------------------------------------------------------------- invariants
    def _forward(self, image: Tensor | None = None) -> Tensor:
        """Logits without a gradient; of a random victim always with the same numbers."""
        self.victim.reseed(self.study.seed)
        with torch.no_grad():
            return self.victim(self.image if image is None else image, self.case.affine)

    def _clean(self, logits: Tensor) -> tuple[str, str]:
        if not self.stored.clean:
            return "NOT RUN", "the run folder has no clean result of this subject"
        vote = self.victim.random
        prediction = self.victim.predict(self.image, self.case.affine) if vote else self.victim.discretise(logits)
        dice = self._dice(prediction, self.label)
        if set(dice) != set(self.stored.clean):
            return "FAIL", f"regions {', '.join(dice)} now, {', '.join(self.stored.clean)} stored"
        worst = max(abs(dice[region] - self.stored.clean[region]) for region in dice)
        return _at_most(
            worst, SAME_DICE, f"largest difference {worst:.3g}, allowed {SAME_DICE:g}, n={len(dice)} regions"
        )

    def _dice(self, prediction: Tensor, label: Tensor) -> dict[str, float]:
        """Dice of every region as records have it: true voxels outside the crop are missed; empty and empty is 1."""
        head, dice = self.victim.head, {}
        missed, truth = self.case.truth_outside(head), head.regions_of(label)
        for region, a in head.regions_of(prediction).items():
            b = truth[region]
            total = int(a.sum()) + int(b.sum()) + missed.get(region, 0)
            dice[region] = 2 * int((a & b).sum()) / total if total else 1.0
        return dice

    def _attack(self, attack: Any, seed: int) -> AttackResult:
        generator = torch.Generator().manual_seed(seed)
        self.victim.reseed(seed)
        result: AttackResult = attack(
            self.victim, self.image, self.label,
            generator=generator, spacing=self.case.spacing, affine=self.case.affine,
        )  # fmt: skip
        self.images.append((attack.threat.bind(self.image), result.image))
        return result

    def _short(self) -> AttackResult:
        """One PGD step from a random start inside the study's threat."""
        attack = self.study.create(AttackEntry(name="pgd", steps=1), max(self.study.budgets.eps))  # type: ignore[call-arg]
        return self._attack(attack, self.study.seed)

    def _same_seed(self) -> tuple[str, str]:
        self.first = self._short()
        again = self._short().image
        changed = int((self.first.image != again).sum())
        detail = f"{changed} of {again.numel()} voxels of two one-step PGD images differ, allowed 0"
        if not changed:
            return "PASS", detail
        if self.image.device.type == "cpu":
            return "FAIL", detail
        return "WARN", f"{detail}: set torch.use_deterministic_algorithms(True) for bits that repeat on this device"

    def _path(self) -> tuple[str, str]:
        if self.victim.random:
            return "NOT RUN", "a random victim is attacked pass by pass and scored by what it deploys"
        if not hasattr(self, "first"):
            return "NOT RUN", "the attack failed"
        scored = self.victim.predict(self.first.image.float(), self.case.affine)
        a, b = self._dice(self.first.prediction, self.label), self._dice(scored, self.label)
        worst = max(abs(a[region] - b[region]) for region in a)
        return _at_most(worst, SAME_PATH, f"Dice differs by {worst:.3g}, allowed {SAME_PATH:g}, n={len(a)} regions")

    def _bounds(self) -> tuple[str, str]:
        bounded = [(ball, image) for ball, image in self.images if ball.low is not None or ball.high is not None]
        if not bounded:
            return "NOT RUN", "the threat has no bounds" if self.images else "no attack came to an end"
        worst = max(beyond_bounds(ball, image) for ball, image in bounded)
        return _at_most(worst, 0.0, f"furthest beyond a bound {worst:g}, allowed 0, n={len(bounded)} images")

    def _before(self, clean: Tensor) -> tuple[str, str]:
        changed, detail = _difference(clean, self._forward())
        return ("FAIL" if changed else "PASS"), f"{detail} of those before the attacks, allowed 0"

    def _twice(self, clean: Tensor) -> tuple[str, str]:
        if self.found[BEFORE].status == "PASS":  # a later pass that gives the same bits is a second pass
            return "PASS", f"0 of {clean.numel()} logits differ between two passes, allowed 0"
        changed, detail = _difference(self._forward(), self._forward())
        more = ": the victim is random and does not say so (dropout left on?)" if changed else ""
        return ("FAIL" if changed else "PASS"), f"{detail} between two passes, allowed 0{more}"

    def _left(self, before: dict[str, Any], error: Exception | None = None) -> tuple[str, str]:
        after = _state(self.victim)
        changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        if changed:
            return "FAIL", f"{len(changed)} of {len(before)} changed, allowed 0: {', '.join(changed[:5])}"
        if error is not None and "changed its buffers" in str(error):  # the guard put them back
            return "FAIL", str(error)
        return "PASS", f"0 of {len(before)} parameters, buffers, modes, gradients and random states changed, allowed 0"

    # -------------------------------------------------------------------------------------------- strength
    def _derivative(self) -> tuple[str, str]:
        loss = as_loss("dice_ce")  # smooth; in float64, so that a sum over a volume keeps its digits
        ball = create("pgd", eps=1.0, **self._where()).threat.bind(self.image)

        def value(logits: Tensor) -> Tensor:
            return loss(logits.double(), self.label, self.victim.head).sum()

        self.victim.reseed(self.study.seed)
        leaf = self.image.clone().requires_grad_(True)
        with self.victim.attacked(ball.mask, self.image, self.case.affine), torch.enable_grad():
            ascended = value(self.victim(leaf))
            gradient = torch.autograd.grad(ascended, leaf, allow_unused=True)[0] if ascended.grad_fn else None
        if gradient is None:
            return "WARN", "the logits are not connected to the image by autograd: only black-box attacks can be run"
        inside = ball.gradient_in_units(gradient).double()
        if not bool(inside.any()):
            return "WARN", "the gradient is exactly zero everywhere: it is masked, gradient attacks cannot work"
        length = float(inside.norm())

        def error(direction: Tensor, step: float, scale: float | None) -> float:
            move = torch.where(ball.mask, direction * (step * ball.scale), torch.zeros_like(self.image))
            up, down = self.image + move, self.image - move
            # by the float32 images themselves, so that their rounding is no error of the gradient
            expected = float((gradient.double() * (up.double() - down.double())).sum())
            measured = float(value(self._forward(up))) - float(value(self._forward(down)))
            size = max(abs(expected), abs(measured)) if scale is None else 2 * step * scale
            return abs(measured - expected) / size if size else 0.0

        generator = torch.Generator().manual_seed(self.study.seed)
        drawn = torch.randint(0, 2, self.image.shape, generator=generator).to(self.image) * 2 - 1
        worst, said = 0.0, []
        # along its sign where the gradient is largest; in a random direction where parts of it may be missing
        for kind, direction, scale in (("sign", gradient.sign(), None), ("random", drawn, length)):
            errors: list[float] = []
            for step in STEPS:
                errors.append(error(direction, step, scale))
                if errors[-1] <= DISAGREES:
                    break
            worst = max(worst, min(errors))
            said.append(f"{min(errors):.4f} along {'its sign' if kind == 'sign' else 'a random direction'}")
        detail = f"relative error of the gradient {', '.join(said)}, allowed {DISAGREES:g}"
        if worst <= DISAGREES:
            return "PASS", detail
        return "WARN", f"{detail}: it is not the derivative of what is deployed; attack without gradients too"

    def _where(self) -> dict[str, Any]:
        """Where the study's threat allows a change."""
        budgets = self.study.budgets
        return {"channels": budgets.channels, "support": budgets.support, "bounds": budgets.bounds}

    def _large(self) -> tuple[str, str]:
        result = self._attack(create("pgd", eps=LARGE_EPS, steps=LARGE_STEPS, **self._where()), self.study.seed)
        dice = float(result.score[0])
        detail = (
            f"mean Dice {dice:.4f} after {LARGE_STEPS} PGD steps at {LARGE_EPS:g} std, allowed {DESTROYED:g}, clean "
        )
        detail += f"{float(result.clean_score[0]):.4f}"
        if dice <= DESTROYED:
            return "PASS", detail
        return "WARN", f"{detail}: the attack is too weak, or channels, support and bounds leave it too little"

    def _double(self) -> tuple[str, str]:
        title, stored = self.stored.title, self.stored
        entry = next((a for a in self.study.attacks if a.title == title), None)
        if entry is None or "steps" not in option_names(entry.name):
            return "NOT RUN", "the run has no untargeted white-box attack with steps on this victim"
        steps = 2 * int(self.study.create(entry, stored.eps).steps)
        longer = AttackEntry(**{**entry.model_dump(), "steps": steps})
        result = self._attack(self.study.create(longer, stored.eps), stored.seed)
        dice = self._dice(result.predicted_by(self.victim, self.case.affine), result.label)
        mean = sum(dice.values()) / len(dice)
        detail = f"mean Dice {stored.dice:.4f} after {steps // 2} steps, {mean:.4f} after {steps} of {title} at "
        detail += f"{stored.eps:g}, allowed change {SETTLED:g}, n=1"
        if abs(mean - stored.dice) < SETTLED:
            return "PASS", detail
        return "WARN", f"{detail}: the attack has not settled, give it more steps"


def _at_most(number: float, allowed: float, detail: str) -> tuple[str, str]:
    return ("PASS" if number <= allowed else "FAIL"), detail


def _difference(a: Tensor, b: Tensor) -> tuple[int, str]:
    changed = int((a != b).sum())
    return changed, f"{changed} of {a.numel()} logits differ, by up to {float((a - b).abs().max()):.3g},"


def _state(victim: Victim) -> dict[str, Any]:
    """Everything of a victim that an attack must leave alone, as hashes."""
    found: dict[str, Any] = {"random numbers of torch": _hash(torch.get_rng_state())}
    for step in (victim.network, victim.preprocessing, victim.postprocessing):
        if not isinstance(step, nn.Module):
            continue
        for name, tensor in [*step.named_parameters(), *step.named_buffers()]:
            found[name] = (_hash(tensor), tensor.requires_grad)
            found[f"gradient of {name}"] = None if tensor.grad is None else _hash(tensor.grad)
        found |= {f"mode of {name or 'network'}": module.training for name, module in step.named_modules()}
    return found


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()
