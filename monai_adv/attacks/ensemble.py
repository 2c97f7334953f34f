"""The case-wise worst of any attacks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from monai_adv.attacks.base import Attack
from monai_adv.attacks.result import AttackResult, Cost
from monai_adv.attacks.run import Run, working
from monai_adv.data.meta import like
from monai_adv.errors import ConfigError
from monai_adv.threats import Threat
from monai_adv.victims import Victim

SHARED = ("target", "label_source", "goal", "seed", "draws")  # options that are the ensemble's, not a member's


@dataclass(frozen=True)
class _Member:
    label: str
    attack: Attack
    own_budget: bool


class Ensemble(Attack):
    """Runs several attacks and returns, case by case, the worst for the victim; says whose it was.

    Untargeted the worst has the lowest mean Dice, each against the label its own attack returns (a geometric one moves
    it); targeted it has the highest agreement with the target. The first of equals wins. For a mean over cases the
    worst per case is the worst of the mean. Every member sees the random numbers it would see alone, so no member alone
    is stronger.

    Members search this threat, unless they name an ``eps``: ``{"name": "bias_field", "eps": 0.3}`` has a budget of its
    own whatever that of the ensemble is (its channels and support are the ensemble's where it names none). Attacks
    with a budget in units of their own need that; the ensemble's threat does not bound their images.

    In the trace ``member`` says whose step it was; ``details["winner"]`` whose image is returned. Details and
    parameters of members are prefixed by their names; parameters are NaN where another member won.

    Reference:
        Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks, ICML 2020, for the worst case per case; any attacks with any threats and for segmentation is ours.

    Args:
        threat: of the members without an eps.
        attacks: names or ``{"name": ..., **options}``, all untargeted, or all able to take the ensemble's target.
            ``target``, ``label_source``, ``goal``, ``seed`` and ``draws`` are given to the ensemble, for all.
        **options: see :class:`Attack`; a loss is a member's own.
    """

    name: ClassVar[str] = "ensemble"
    reference: ClassVar[str] = "Croce and Hein 2020"
    fixed_loss: ClassVar[bool] = True

    def __init__(
        self, threat: Threat, attacks: Sequence[str | Mapping[str, Any]] = ("fgsm", "pgd"), **options: Any
    ) -> None:
        super().__init__(threat, **options)
        if isinstance(attacks, (str, Mapping)) or not isinstance(attacks, Sequence) or not attacks:
            raise ConfigError(f"attacks of an ensemble must be a list of names or {{name: ...}}, got {attacks!r}")
        self.attacks = [spec if isinstance(spec, str) else copy.deepcopy(dict(spec)) for spec in attacks]
        self._members: list[_Member] = []
        for spec in self.attacks:
            self._members.append(self._member({"name": spec} if isinstance(spec, str) else dict(spec)))

    def _member(self, spec: dict[str, Any]) -> _Member:
        from monai_adv.attacks.registry import attack_class, build, create  # the registry knows this class too

        wrong = sorted(set(SHARED) & set(spec))
        if wrong:
            raise ConfigError(
                f"{', '.join(wrong)} of {spec} belongs to the ensemble, which gives it to all its attacks"
            )
        if "name" not in spec:
            raise ConfigError(f"an attack of an ensemble needs a name: {spec}")
        kind = attack_class(spec["name"])
        if kind.modes == ("untargeted" if self.targeted else "targeted"):
            aim = "targeted" if self.targeted else "untargeted, without a target,"
            raise ConfigError(f"{kind.name} is {kind.modes} and the ensemble {aim}: their scores do not compare")
        shared = {name: getattr(self, name) for name in SHARED if name != "target" or self.targeted}
        own = "eps" in spec
        if own:
            inherited: dict[str, Any] = {"channels": self.threat.channels, "support": self.threat.support}
            if self.threat.norm in kind.norms:
                inherited |= {"norm": self.threat.norm, "bounds": self.threat.bounds}
                inherited |= {"units": self.threat.units} if kind.units is None else {}
            attack = create(**{**inherited, **spec, **shared})
        elif self.threat.norm in kind.norms:
            attack = build({**spec, **shared}, self.threat)
        else:
            raise ConfigError(
                f"{kind.name} does not search {self.threat.describe()}: give it a budget of its own, "
                f"{{name: {kind.name}, eps: ...}}"
            )
        before = sum(member.attack.name == kind.name for member in self._members)
        return _Member(f"{kind.name} {before + 1}" if before else kind.name, attack, own)

    @torch.inference_mode(False)
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
        spacing: Sequence[float] | None = None,
        affine: Tensor | None = None,
    ) -> list[AttackResult]:
        """See :meth:`Attack.curve`; a member with a budget of its own is run once, its cost counted in the first."""
        if target is not None and not self.targeted:
            raise ConfigError(f"this {self.name} is untargeted and takes no target: give it a target rule")
        generator = Generator().manual_seed(self.seed) if generator is None else generator
        numbers = used = generator.get_state()
        found: list[list[AttackResult]] = []
        for member in self._members:
            generator.set_state(numbers)
            results = member.attack.curve(
                victim, image, label, [member.attack.threat.eps] if member.own_budget else eps,
                support=support, weight=weight, target=target, generator=generator, spacing=spacing, affine=affine,
            )  # fmt: skip
            if member.own_budget:
                results += [replace(results[0], cost=Cost())] * (len(eps) - 1)
            found.append(results)
            state = generator.get_state()
            used = used if torch.equal(state, numbers) else state
        generator.set_state(used)  # a member that draws nothing must not take back what another one drew
        labels = [member.label for member in self._members]
        return [_worst(labels, [results[i] for results in found], self.targeted) for i in range(len(eps))]

    def _search(self, run: Run) -> None:
        raise NotImplementedError("the attacks of an ensemble search for themselves: call curve")


def _worst(labels: list[str], results: list[AttackResult], targeted: bool) -> AttackResult:
    """Per sample the result of the strongest member."""
    scores = torch.stack([result.score for result in results])
    scores = scores if targeted else -scores
    best = torch.zeros_like(scores[0], dtype=torch.long)
    for member in range(1, len(results)):
        best = torch.where(scores[member] > scores.gather(0, best[None])[0], member, best)

    def chosen(name: str) -> Tensor:
        tensors = [working(getattr(result, name)) for result in results]
        return torch.stack([tensors[member][b] for b, member in enumerate(best.tolist())])

    first = results[0].image
    image, perturbation = (like(chosen(name), first) for name in ("image", "perturbation"))
    trace: list[dict[str, Any]] = []
    offsets, cost = [], Cost()
    details: dict[str, list[Any]] = {"winner": [labels[member] for member in best.tolist()]}
    parameters: dict[str, Tensor] = {}
    for member, (label, result) in enumerate(zip(labels, results)):
        offsets.append(len(trace))
        for entry in result.trace:
            trace.append({**entry, "step": entry["step"] + offsets[-1], "member": [label] * len(best)})
        cost = cost + result.cost
        details |= {f"{label}.{key}": values for key, values in result.details.items()}
        for key, values in result.parameters.items():
            mine = (best == member).to(values.device).view(-1, *[1] * (values.dim() - 1))
            parameters[f"{label}.{key}"] = torch.where(mine, values, float("nan"))
    steps = chosen("best_step") + torch.tensor(offsets, device=best.device)[best]
    return AttackResult(
        image, perturbation, chosen("prediction"), chosen("label"), chosen("success"), chosen("score"),
        chosen("clean_score"), steps, trace, cost, parameters, details,
    )  # fmt: skip
