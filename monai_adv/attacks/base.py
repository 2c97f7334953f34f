"""The contract of an attack."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from monai.data import MetaTensor
from torch import Generator, Tensor

from monai_adv.attacks.result import AttackResult
from monai_adv.attacks.run import Run, working
from monai_adv.data.meta import spacing_of
from monai_adv.errors import ConfigError, NonFiniteError
from monai_adv.losses import AttackLoss, as_loss, check_target_rule
from monai_adv.threats import Ball, Threat
from monai_adv.victims import Victim

Target = str | Mapping[str, Any] | Tensor


class Attack(ABC):
    """Searches a perturbation that a threat allows and that raises a loss of a victim.

    A subclass defines ``_search(self, run)``, which looks for images inside ``run.ball`` and shows them to the
    :class:`Run`; what to return, how it is scored and what it cost is seen to here. See :func:`register`.

    Args:
        threat: what may change.
        loss: a name of :data:`monai_adv.losses.LOSSES` or an :class:`monai_adv.losses.AttackLoss`.
        target: makes the attack targeted: a rule of :func:`monai_adv.losses.make_target` or a mask; a mask may also be
            given in the call. None is untargeted.
        label_source: "truth" (attack the given label) or "prediction" (attack the victim's clean prediction).
        goal: what counts as success: for untargeted attacks the share of the clean mean Dice that may be left, for
            targeted ones the agreement with the target to reach; in [0, 1].
        seed: of the attack's own random numbers where a call gives no generator.
        draws: passes of a random victim per evaluation; gradient and loss are their mean (expectation over
            transformation, Athalye et al. 2018), so is the score.

    Class attributes:
        name: of the method, by which the registry, studies and tables know it.
        reference: of the method.
        modes: "untargeted", "targeted" or "both".
        norms: norms of the threats it can search; "parameter" for attacks whose budget is in units of their own.
        units: units of such a budget, e.g. "mm"; None if the threat's.
        default_eps: budgets of a study that names none for an attack that does not follow the study's own list
            (``inf`` is unbounded); None if it does.
        moves_voxels: whether a voxel's new value may come from anywhere in the image.
        fixed_loss: whether the method has a loss of its own; it then takes no ``loss``.
        white_box: whether it takes gradients of the victim itself.

    Attributes:
        memory: a dictionary of the caller's in which an attack may keep what does not depend on the victim, so that
            several victims attacked with the same image share it; whoever sets it drops it with the image. It changes
            no result. None keeps nothing.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    modes: ClassVar[str] = "both"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    units: ClassVar[str | None] = None
    default_eps: ClassVar[tuple[float, ...] | None] = None
    moves_voxels: ClassVar[bool] = False
    fixed_loss: ClassVar[bool] = False
    white_box: ClassVar[bool] = True
    targeted: bool = False
    memory: dict[str, Any] | None = None

    def __init__(
        self,
        threat: Threat,
        loss: str | AttackLoss = "dice_ce",
        *,
        target: Target | None = None,
        label_source: str = "truth",
        goal: float = 0.5,
        seed: int = 0,
        draws: int = 1,
    ) -> None:
        if not isinstance(threat, Threat):
            raise ConfigError(f"{type(self).__name__} needs a threat such as LInf(eps=0.1), got {threat!r}")
        if label_source not in ("truth", "prediction"):
            raise ConfigError(f"label_source {label_source!r} is unknown: use 'truth' or 'prediction'")
        if not 0 <= goal <= 1:
            raise ConfigError(f"goal must be in [0, 1], got {goal}")
        if threat.norm not in self.norms:
            raise ConfigError(f"{self.name} searches {' or '.join(self.norms)} threats, not {threat.describe()}")
        if target is not None and self.modes == "untargeted":
            raise ConfigError(f"{self.name} is untargeted and takes no target")
        if target is None and self.modes == "targeted":
            raise ConfigError(f"{self.name} needs a target, e.g. target='background'")
        if target is not None and not isinstance(target, Tensor):
            check_target_rule(target)
        self.target = target
        self.targeted = target is not None
        self.draws = positive("draws", draws)
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
        spacing: Sequence[float] | None = None,
        affine: Tensor | None = None,
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
            spacing: voxel size in mm; a MetaTensor's own if None, else 1.
            affine: voxel to world, ``(4, 4)`` or one per sample; a MetaTensor's own if None. For attacks that bring
                something to the image's place.

        Returns:
            The best iterate by the metric and how it was found.

        Raises:
            NonFiniteError: if the image, a logit, the loss or the gradient is NaN or infinite.
            ConfigError: if label, support or target do not fit the image and the head.
        """
        return self.curve(
            victim, image, label, [self.threat.eps],
            support=support, weight=weight, target=target, generator=generator, spacing=spacing, affine=affine,
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
        spacing: Sequence[float] | None = None,
        affine: Tensor | None = None,
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
            spacing: see :meth:`__call__`.
            affine: see :meth:`__call__`.

        Returns:
            One result per budget, in the order given. Shared passes are counted in the first one's cost.
        """
        if target is not None and not self.targeted:
            raise ConfigError(f"this {self.name} is untargeted and takes no target: give it a target rule")
        plain = working(image)
        label, mask, weight, target = (None if t is None else working(t) for t in (label, support, weight, target))
        if not plain.is_floating_point():
            raise ConfigError(f"an attack needs a floating point image, got {plain.dtype}")
        if not bool(torch.isfinite(plain).all()):
            raise NonFiniteError("the clean image holds NaN or infinite voxels: check the file (monai-adv check)")
        ball: Ball = self.threat.bind(plain, mask)
        if weight is not None and weight.shape != (len(plain), 1, *plain.shape[2:]):
            raise ConfigError(
                f"weight {tuple(weight.shape)} must be (B, 1, *spatial) of the image {tuple(plain.shape)}"
            )
        if generator is None:
            generator = Generator().manual_seed(self.seed)
        voxel_size = spacing_of(image, spacing)
        place = _affine(image, affine)
        with victim.attacked(None if self.moves_voxels else ball.mask, plain, place):
            run = Run(self, victim, ball, label, weight, target, generator, voxel_size, place)
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

    def _rank(self, run: Run, image: Tensor, prediction: Tensor, score: Tensor, objective: Tensor) -> Tensor:
        """How good an evaluated image is, ``(B, n)``: rows are compared in order, larger is better.

        The metric comes first; the loss decides between equal scores, so that progress inside one Dice value is not
        lost.
        """
        return torch.stack([score if self.targeted else -score, objective.to(score)], dim=1)

    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, for records and reports; of an attack that is not of this
        package also ``code``, a hash of its source.
        """
        names = [
            p.name
            for c in type(self).__mro__
            if "__init__" in vars(c)
            for p in inspect.signature(c).parameters.values()
            if p.kind is not p.POSITIONAL_ONLY
        ]
        found = {n: getattr(self, n) for n in dict.fromkeys(names) if n not in ("self", "threat") and hasattr(self, n)}
        code = _own_code(type(self))
        return {
            "threat": self.threat.describe(),
            **{k: _readable(v) for k, v in found.items()},
            **({} if code is None else {"code": code}),
        }

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.parameters().items() if k != "threat")
        return f"{type(self).__name__}({self.threat!r}, {arguments})"


def _own_code(kind: type) -> str | None:
    """SHA-256 of the methods that are not of this package: what other code has found is not the result of these."""
    classes = [c for c in kind.__mro__ if c is not object and not c.__module__.startswith(("monai_adv.", "abc"))]
    methods = [value for c in classes for _, value in sorted(vars(c).items()) if inspect.isfunction(value)]
    text = "".join(_source(method) for method in methods)
    return hashlib.sha256(text.encode()).hexdigest() if classes else None


def _source(method: Any) -> str:
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):  # typed into an interpreter that keeps no text
        code = method.__code__
        return code.co_code.hex() + repr([c for c in code.co_consts if not inspect.iscode(c)])


def _affine(image: Tensor, given: Tensor | None) -> Tensor | None:
    """Voxel to world of every sample, ``(B, n, n)`` float64."""
    if given is None:
        if not isinstance(image, MetaTensor):
            return None
        given = image.affine
    affine = torch.as_tensor(given).detach().cpu().double()
    affine = affine[None] if affine.dim() == 2 else affine
    if affine.dim() != 3 or affine.shape[1] != affine.shape[2] or len(affine) not in (1, len(image)):
        raise ConfigError(f"affine {tuple(affine.shape)} must be (4, 4), or one for each of {len(image)} samples")
    return affine.expand(len(image), -1, -1)


def positive(name: str, value: int) -> int:
    """A whole number of at least one.

    Raises:
        ConfigError: names the option.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 or not value >= 1:
        raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def _readable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"mask {tuple(value.shape)}"
    if isinstance(value, AttackLoss):
        return repr(value)
    return dict(value) if isinstance(value, Mapping) else value
