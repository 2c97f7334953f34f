"""A trainer of the learned synthesis: the frozen victim and a critic teach a generator of fields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Trainer
from monai.losses import PatchAdversarialLoss
from monai.utils import CommonKeys
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from monai_adv.errors import ConfigError, NonFiniteError
from monai_adv.losses.region_dice import (
    PRESENT,
    check_region,
    counted_regions,
    region_bits,
    region_dice,
    region_probabilities,
)
from monai_adv.networks.synthesis import FIELDS, SynthesisGenerator
from monai_adv.transforms.physics.geometry import jacobian_determinant
from monai_adv.transforms.physics.synthesis import Synthesis
from monai_adv.victims import Victim
from monai_adv.victims.guard import guard

REAL = "real"
"""Key of the batch with other subjects' images, for the critic."""

WEIGHTS = {"critic": 0.05, "size": 0.2, "smoothness": 0.1, "folding": 10.0, "kl": 1e-3}
"""Weights of the terms beside the Dice, whose weight is 1. They are ours."""

DROPS = (0.05, 0.6)
"""Range of the drops that are asked for in training. It is ours."""

TERMS = ("loss", "dice_error", *WEIGHTS, "critic_loss", "drop_asked", "drop_reached")
"""Numbers of a step in ``engine.state.output``, those that its weights leave in."""

_MARGIN = 0.1  # a volume that shrinks below this share is on its way to folding


@dataclass
class Synthesized:
    """Synthetic images of a batch with everything that made them.

    Attributes:
        image: the real images ``(B, C, *spatial)``.
        synthetic: what became of them.
        truth: ``(B, R, *spatial)`` bits of the regions.
        moved: the same moved with the image, shares in [0, 1] (linear interpolation).
        drop: the drop asked for, ``(B,)``.
        clean: soft Dice of the victim on the real images, ``(B,)``.
        dice: soft Dice on the synthetic ones against the moved truth, ``(B,)``.
        raw: the generator's output.
        parameters: of the effect.
        displacement: in mm, ``(B, dims, *spatial)``; None where nothing can move.
    """

    image: Tensor
    synthetic: Tensor
    truth: Tensor
    moved: Tensor
    drop: Tensor
    clean: Tensor
    dice: Tensor
    raw: dict[str, Tensor]
    parameters: dict[str, Tensor]
    displacement: Tensor | None = None


class SynthesisTrainer(Trainer):
    """Trains a :class:`monai_adv.networks.SynthesisGenerator` against a frozen victim, as a MONAI workflow.

    A step draws a wanted drop of Dice per sample and a code, lets the generator make fields, applies them to the raw
    images, and asks the victim, whole pipeline and normalisation inside, for logits. What is minimised is
    ``|Dice(victim(x'), y') - max(0, Dice(victim(x), y) - drop)|`` with soft Dice and the truth moved with the image,
    from both sides: too weak and too strong are equally wrong. Weighted terms beside it: the critic (hinge), the size
    of the fields (no image is moved for nothing), their change from one point of their grid to the next, a displacement
    that folds, the code's divergence from a standard normal. A term of weight 0 is not computed; without the critic's
    there is no critic step. The critic learns to tell the synthetic images from other subjects' real ones. The victim
    is left bit for bit as it was.

    Batches are dictionaries: ``image`` ``(B, C, *spatial)`` as the victim takes it (scanner units), ``label`` of the
    victim's head, and ``real``, images of other subjects, where there is a critic. ``engine.state.output`` holds the
    terms by name (see :func:`loss_terms`) and the tensors under ``image``, ``label`` and ``synthetic``.

    The trainer's own state holds generator, critic, both optimisers and the random numbers: training that is
    interrupted between epochs and taken up by MONAI's ``CheckpointLoader`` with ``{"trainer": trainer}`` gives the
    weights of an uninterrupted one. What draws in the loader can be told the epoch: ``set_epoch`` of loader, dataset
    and sampler is called where they have it.

    Reference:
        Chen et al., Intelligent image synthesis to attack a segmentation CNN using adversarial learning, SASHIMI 2019,
        https://arxiv.org/abs/1909.11167. It publishes the idea, no architecture and no weights: those here are ours.

    Args:
        device: where to compute; the networks must be there.
        max_epochs: epochs.
        train_data_loader: gives the batches.
        generator: what is trained.
        victim: the victim, used as it is.
        optimizer: of the generator's parameters.
        spacing: voxel size of the batches in mm, one per axis.
        critic: ``(B, C, *spatial)`` to patch logits; needed unless its weight is 0.
        critic_optimizer: of the critic's parameters.
        weights: changes to ``monai_adv.engines.synthesis.WEIGHTS``: critic, size, smoothness, folding, kl.
        drop: range of the drops asked for, in [0, 1].
        region: "present", the mean over the regions the truth has, or one by its name.
        seed: of drops and codes.
        epoch_length: steps of an epoch; the loader's length if None.
        train_handlers: MONAI or ignite handlers.

    Raises:
        ConfigError: for weights, drops or a region that cannot be, or a critic that is missing or has nothing to do.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable[Mapping[str, Any]] | DataLoader,
        generator: SynthesisGenerator,
        victim: Victim,
        optimizer: Optimizer,
        spacing: Sequence[float],
        *,
        critic: nn.Module | None = None,
        critic_optimizer: Optimizer | None = None,
        weights: Mapping[str, float] | None = None,
        drop: Sequence[float] = DROPS,
        region: str = PRESENT,
        seed: int = 0,
        epoch_length: int | None = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        self.weights = loss_weights(weights)
        check_region(victim.head, region)
        if len(drop) != 2 or not 0 <= drop[0] <= drop[1] <= 1:
            raise ConfigError(f"drop is a range (low, high) in [0, 1], got {tuple(drop)}")
        if (self.weights["critic"] > 0) != (critic is not None and critic_optimizer is not None):
            raise ConfigError(
                f"the critic's weight is {self.weights['critic']:g}: with a weight the trainer needs a critic and its "
                "optimiser, without one it takes neither"
            )
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            handlers=train_handlers,
            decollate=False,
        )
        self.generator, self.victim, self.optimizer = generator, victim, optimizer
        self.critic, self.critic_optimizer = critic, critic_optimizer
        self.effect = Synthesis(**generator.effect)
        self.spacing, self.drop, self.region = tuple(float(s) for s in spacing), tuple(drop), region
        self.random = torch.Generator().manual_seed(seed)
        self.adversarial = PatchAdversarialLoss(criterion="hinge")
        self.add_event_handler(Events.EPOCH_STARTED, self._announce_epoch)

    def synthesize(
        self, image: Tensor, label: Tensor, drop: Tensor, random: torch.Generator | None = None
    ) -> Synthesized:
        """Synthetic images of a batch, in the graph of the generator.

        Args:
            image: ``(B, C, *spatial)``.
            label: of the victim's head.
            drop: ``(B,)``.
            random: draws the code; its mean if None.

        Raises:
            NonFiniteError: if the generator's fields or the victim's logits are NaN or infinite.
        """
        head = self.victim.head
        with torch.no_grad():
            logits = self.victim(image)
            clean_regions = region_probabilities(head, logits)
            truth = region_bits(head, head.check_label(label, logits))
        raw = self.generator(image, drop, generator=random)
        if not all(bool(torch.isfinite(v.detach()).all()) for v in raw.values()):
            raise NonFiniteError("the generator gives NaN or infinite fields: lower the learning rate")
        parameters = self.effect.from_unit({k: raw[k] for k in FIELDS if k in raw}, image, self.spacing)
        field = None
        if "velocity" in parameters:  # integrated once, for the image, the truth and the folding
            field = self.effect.displacement(parameters, image.shape[2:], self.spacing)
        synthetic = self.effect.apply(image, parameters, self.spacing, image != 0, field)
        moved = self.effect.soft_warp(truth, parameters, self.spacing, field)
        # the same regions on both sides, or a region that moves out of the patch would change the Dice by itself
        counted = counted_regions(head, truth, self.region) & counted_regions(head, moved.detach(), self.region)
        dice = region_dice(region_probabilities(head, self.victim(synthetic)), moved, counted)
        clean = region_dice(clean_regions, truth, counted)
        return Synthesized(image, synthetic, truth, moved, drop, clean, dice, raw, parameters, field)

    def terms(self, made: Synthesized) -> dict[str, Tensor]:
        """The terms of the generator's loss, unweighted; those of weight 0 are left out."""
        found = {"dice_error": (made.dice - (made.clean - made.drop).clamp_min(0)).abs().mean()}
        if self.critic is not None:
            with guard(self.critic):
                found["critic"] = self.adversarial(
                    self.critic(made.synthetic), target_is_real=True, for_discriminator=False
                )
        fields = {k: v for k, v in made.raw.items() if k in FIELDS}
        if self.weights["size"] > 0:
            found["size"] = torch.stack([v.square().mean() for v in fields.values()]).mean()
        if self.weights["smoothness"] > 0:
            found["smoothness"] = roughness(fields)
        if self.weights["folding"] > 0 and made.displacement is not None:
            found["folding"] = folding(made.displacement, self.spacing)
        if self.weights["kl"] > 0:
            found["kl"] = code_divergence(made.raw["mu"], made.raw["log_var"])
        return found

    def state_dict(self) -> Any:
        """Where the training stands: epoch and iteration, networks, optimisers, random numbers."""
        state = super().state_dict()
        for name, part in self._parts().items():
            state[name] = part.state_dict()
        state["random"], state["torch_random"] = self.random.get_state(), torch.get_rng_state()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ConfigError: it is that of a training with a critic and this one is without, or the other way round.
        """
        state = dict(state_dict)
        parts = self._parts()
        if ("critic" in state) != ("critic" in parts):
            raise ConfigError("one of this training and its checkpoint has a critic and the other has none")
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))
        self.random.set_state(state.pop("random").cpu())
        torch.set_rng_state(state.pop("torch_random").cpu())
        super().load_state_dict(state)

    def _parts(self) -> dict[str, Any]:
        parts = {"generator": self.generator, "optimizer": self.optimizer}
        if self.critic is not None:
            parts |= {"critic": self.critic, "critic_optimizer": self.critic_optimizer}
        return parts

    def _iteration(self, engine: Engine, batchdata: Mapping[str, Tensor]) -> dict[str, Any]:
        image, label = (batchdata[k].to(self.state.device) for k in (CommonKeys.IMAGE, CommonKeys.LABEL))
        low, high = self.drop
        drop = (low + (high - low) * torch.rand(len(image), generator=self.random)).to(image)
        self.generator.train()
        self.optimizer.zero_grad()
        # frozen until the backward pass is over: windows may be computed again in it
        with self.victim.attacked():
            made = self.synthesize(image, label, drop, self.random)
            terms = self.terms(made)
            loss = torch.stack([self.weights.get(k, 1.0) * v.double() for k, v in terms.items()]).sum()
            loss.backward()
        self.optimizer.step()
        if self.critic is not None:
            terms["critic_loss"] = self._teach_critic(batchdata, made.synthetic.detach())
        reached = (made.clean - made.dice).mean()
        terms |= {"loss": loss, "drop_asked": drop.mean(), "drop_reached": reached}
        return {
            CommonKeys.IMAGE: image,
            CommonKeys.LABEL: label,
            "synthetic": made.synthetic.detach(),
            **{name: float(terms[name].detach()) for name in TERMS if name in terms},
        }

    def _teach_critic(self, batchdata: Mapping[str, Tensor], synthetic: Tensor) -> Tensor:
        if REAL not in batchdata:
            raise ConfigError(f"a critic needs other subjects' images in the batch, under {REAL!r}")
        assert self.critic is not None
        assert self.critic_optimizer is not None
        real = batchdata[REAL].to(self.state.device)
        self.critic.train()
        self.critic_optimizer.zero_grad()
        loss = 0.5 * (
            self.adversarial(self.critic(real), target_is_real=True, for_discriminator=True)
            + self.adversarial(self.critic(synthetic), target_is_real=False, for_discriminator=True)
        )
        loss.backward()
        self.critic_optimizer.step()
        return loss

    def _announce_epoch(self, engine: Engine) -> None:
        loader: Any = self.data_loader
        for owner in (loader, getattr(loader, "dataset", None), getattr(loader, "sampler", None)):
            told = getattr(owner, "set_epoch", None)
            if told is not None:
                told(self.state.epoch)


def loss_weights(changes: Mapping[str, float] | None = None) -> dict[str, float]:
    """:data:`WEIGHTS` with changes.

    Raises:
        ConfigError: for an unknown term, or a weight that is no number >= 0.
    """
    for name, weight in (changes or {}).items():
        if name not in WEIGHTS:
            raise ConfigError(f"the loss has no term {name!r}: use {', '.join(WEIGHTS)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ConfigError(f"the weight of {name} must be a number >= 0, got {weight!r}")
    return {**WEIGHTS, **{k: float(v) for k, v in (changes or {}).items()}}


def loss_terms(output: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step: the ``output_transform`` of MONAI's ``StatsHandler`` and ``TensorBoardStatsHandler``."""
    return {name: output[name] for name in TERMS if name in output}


def roughness(fields: Mapping[str, Tensor]) -> Tensor:
    """Mean squared difference of neighbours on the generator's grid, in shares of each field's limit.

    Args:
        fields: raw fields ``(B, n, *grid)`` in [-1, 1].

    Example:
        >>> roughness({"log_bias": torch.tensor([[[[0.0, 0.5], [0.0, 0.5]]]])}).item()  # one axis of two changes
        0.125
    """
    slopes = [field.diff(dim=axis).square().mean() for field in fields.values() for axis in range(2, field.dim())]
    return torch.stack(slopes).mean()


def folding(displacement: Tensor, spacing: Sequence[float], margin: float = _MARGIN) -> Tensor:
    """Mean of ``relu(margin - det J)`` over the voxels: 0 where the map keeps every volume above the margin.

    Args:
        displacement: ``(B, dims, *spatial)`` in mm.
        spacing: voxel size in mm.
        margin: smallest local volume that costs nothing.
    """
    return torch.relu(margin - jacobian_determinant(displacement, spacing)).mean()


def code_divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the code from a standard normal, per entry.

    Example:
        >>> code_divergence(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)).item()
        0.25
    """
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).mean()
