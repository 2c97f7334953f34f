"""The smallest budget with which any norm-bounded attack succeeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from monai_adv.attacks.base import Attack
from monai_adv.attacks.ensemble import SHARED
from monai_adv.attacks.result import AttackResult
from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses import Margin
from monai_adv.threats import Threat

_HALVINGS = 12  # of ``start``, where an attack succeeds with whatever it is given


class Minimal(Attack):
    """Smallest budget with which another attack succeeds: doubled until it does, then bisected, per sample.

    Success is the ``goal``: by default half of the clean mean Dice. Bisection takes for granted that a larger budget
    succeeds where a smaller one does; ``details`` tell of every try. Every try sees the same random numbers.

    The returned image is that of the smallest success, or without one the best failure; the trace has one entry, its
    evaluation (with the share of zero gradients that the attack met at the start). ``details``: ``minimal_eps`` (None
    without a success) and ``tried`` (budget and score, in order).

    Reference:
        bisection; ours, as a wrapper around any attack of the registry.

    Args:
        threat: its norm and units are searched; its budget, if finite, is the largest that is tried.
        attack: what is tried: a name, or ``{"name": ..., **options}``; ``target``, ``goal`` and the other options below
            are this search's own.
        tolerance: relative width of the last interval; the result is at most so far above the smallest success. In
            (0, 1).
        start: first budget. Like ``largest`` in units per voxel: an L2 search takes the length of a perturbation that
            moves every voxel of the support by it.
        largest: largest budget of an unbounded threat.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "minimal"
    reference: ClassVar[str] = "bisection"
    default_eps: ClassVar[tuple[float, ...] | None] = (math.inf,)
    fixed_loss: ClassVar[bool] = True

    def __init__(
        self,
        threat: Threat,
        attack: str | Mapping[str, Any] | None = None,
        tolerance: float = 0.05,
        start: float = 0.05,
        largest: float = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(threat, Margin(), **options)
        for name, value, limit in (
            ("tolerance", tolerance, 1),
            ("start", start, math.inf),
            ("largest", largest, math.inf),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < limit:
                raise ConfigError(f"{name} must be > 0 and {'finite' if limit != 1 else '< 1'}, got {value!r}")
        self.tolerance, self.start, self.largest = tolerance, start, largest
        self.attack = {"name": "ifgsm", "steps": 10} if attack is None else attack
        self._inner = self._build()
        # an attack that is targeted by itself brings its target
        self.target, self.targeted = self._inner.target, self._inner.targeted

    def _build(self) -> Attack:
        from monai_adv.attacks.registry import attack_class, build  # the registry knows this class too

        spec = {"name": self.attack} if isinstance(self.attack, str) else dict(self.attack)
        taken = sorted(set(SHARED) & set(spec))
        if taken:
            raise ConfigError(f"{', '.join(taken)} of {spec} belongs to minimal, which gives it to the attack")
        kind = attack_class(spec["name"]) if "name" in spec else None
        if kind is not None and kind.default_eps == (math.inf,):
            raise ConfigError(f"minimal needs an attack with a budget; {kind.name} finds its own size")
        shared = {"goal": self.goal, "draws": self.draws} | ({"target": self.target} if self.targeted else {})
        return build({**spec, **shared}, self.threat)

    def _search(self, run: Run) -> None:
        numbers = run.generator.get_state()
        found = [self._smallest(run, b, numbers) for b in range(len(run.clean))]
        run.consider(torch.cat([result.image for result, _, _ in found]))
        run.trace[-1]["zero_gradient"] = torch.cat([result.trace[0]["zero_gradient"] for result, _, _ in found])
        run.details["minimal_eps"] = [eps for _, eps, _ in found]
        run.details["tried"] = [tried for _, _, tried in found]
        for key in dict.fromkeys(key for result, _, _ in found for key in result.details):
            values = [result.details.get(key, [None])[0] for result, _, _ in found]
            run.details[f"{self._inner.name}.{key}"] = values

    def _smallest(self, run: Run, b: int, numbers: Tensor) -> tuple[AttackResult, float | None, list[list[float]]]:
        """Result of the smallest success or the best failure of one sample, its budget if a success, and all tries."""
        per_voxel = math.sqrt(int(run.ball.mask[b].sum())) if self.threat.norm == "l2" else 1.0
        largest = self.largest * per_voxel if math.isinf(run.ball.eps) else run.ball.eps
        eps = min(self.start * per_voxel, largest)
        floor = eps / 2**_HALVINGS
        low, high = 0.0, math.inf
        success: AttackResult | None = None
        failure: AttackResult | None = None
        tried: list[list[float]] = []
        while True:
            result = self._try(run, b, eps, numbers)
            tried.append([eps, float(result.score)])
            if bool(result.success):
                success, high = result, eps
            else:
                low = eps
                if failure is None or not self._weaker(result, failure):
                    failure = result
            if success is None:
                if low >= largest:
                    break
                eps = min(2 * low, largest)
            elif low == 0:
                if high <= floor:
                    break
                eps = high / 2
            elif high - low <= self.tolerance * high:
                break
            else:
                eps = (low + high) / 2
        if success is not None:
            return success, high, tried
        assert failure is not None
        return failure, None, tried

    def _try(self, run: Run, b: int, eps: float, numbers: Tensor) -> AttackResult:
        def of_sample(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[b : b + 1]

        run.generator.set_state(numbers)
        result = self._inner.curve(
            run.victim,
            run.clean[b : b + 1],
            run.label[b : b + 1],
            [eps],
            support=of_sample(run.ball.mask),
            weight=of_sample(run.weight),
            target=of_sample(run.target),
            generator=run.generator,
            spacing=run.spacing,
            affine=of_sample(run.affine),
        )[0]
        run._forwards += result.cost.forwards
        run._backwards += result.cost.backwards
        return result

    def _weaker(self, a: AttackResult, b: AttackResult) -> bool:
        return bool(a.score < b.score) if self.targeted else bool(a.score > b.score)
