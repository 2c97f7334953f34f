"""Learned synthesis as augmentation: a share of each batch is replaced by images that a generator made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Generator, Tensor

from monai_adv.data.meta import like, plain
from monai_adv.engines.attack import prepared_batch
from monai_adv.engines.robust.step import SUPPORT, checked_seed, numbers, training_batch
from monai_adv.errors import ConfigError
from monai_adv.networks import SynthesisGenerator, load_generator
from monai_adv.transforms import Synthesis

_NEARLY_ZERO = 1e-6  # foreground that is exactly 0 after a z-score is no background


class SynthesisIteration:
    """An ``iteration_update`` that replaces a share of every batch by synthetic images with their moved labels.

    A trained :class:`monai_adv.networks.SynthesisGenerator` gives the fields, with a random code, a random wanted drop
    and a random scale for every sample; image, label (nearest voxel) and support move together, and the engine's own
    iteration takes its step on the mixed batch. The generator gets no gradient and stays as it is: it was trained
    against another network, and it is not told of the one in training.

    Batches are usually z-scored and augmented, so that their background is not exactly 0: what was foreground before
    is read from the batch's support, is synthesised as if the rest were 0, and the background, with whatever the
    augmentation made of it, moves as a label does. On z-scores the bias field multiplies deviations from the mean.

    Reference:
        Chen et al., Intelligent image synthesis to attack a segmentation CNN using adversarial learning, SASHIMI 2019,
        https://arxiv.org/abs/1909.11167; as augmentation, random scales included, ours.

    Args:
        generator: the generator, or its file.
        share: share of the samples to replace, on average, in (0, 1].
        drop: range of the wanted drop of Dice, within [0, 1].
        scale: range of what the fields are multiplied by, within [0, 1].
        spacing: voxel size of the batches in mm, one per axis; the one the generator was trained at if None.
        seed: of samples' codes, drops and scales, which depend on seed, process and iteration only.
        support_key: key of a mask ``(B, 1 or C, *spatial)`` of the foreground, where the batch has one; voxels that are
            not zero without it.
        image_key: key of the image in the batch dictionary.
        label_key: key of the label.
        iteration_update: what runs on the mixed batch; the engine's own ``_iteration`` if None.

    Raises:
        ConfigError: for a range or spacing that cannot be, or a generator that does not say its voxel size.
        CheckpointError: if the generator's file cannot be read.

    Example:
        ``SupervisedTrainer(..., iteration_update=SynthesisIteration("generator.pt", share=0.5))``
    """

    steps_per_batch = 1

    def __init__(
        self,
        generator: SynthesisGenerator | str | Path,
        share: float = 0.5,
        drop: Sequence[float] = (0.05, 0.5),
        scale: Sequence[float] = (0.0, 1.0),
        spacing: Sequence[float] | None = None,
        seed: int = 0,
        support_key: str | None = SUPPORT,
        image_key: str = CommonKeys.IMAGE,
        label_key: str = CommonKeys.LABEL,
        iteration_update: Callable[[Engine, Any], Any] | None = None,
    ) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(f"share must be in (0, 1], got {share!r}")
        self.share = float(share)
        self.drop, self.scale = _range("drop", drop), _range("scale", scale)
        self.seed = checked_seed(seed)
        self.support_key = support_key
        self.image_key = image_key
        self.label_key = label_key
        self.iteration_update = iteration_update
        if not isinstance(generator, (SynthesisGenerator, str, Path)):
            raise ConfigError(f"synthesis needs a generator or its file, got {type(generator).__name__}")
        self.generator = generator if isinstance(generator, SynthesisGenerator) else load_generator(generator)
        self.effect = Synthesis(**self.generator.effect)
        self.spacing = _spacing(spacing, self.generator)

    def __call__(self, engine: Engine, batchdata: Mapping[str, Any]) -> Any:
        """One optimiser step on the batch with its synthetic share."""
        trainer, image, label = training_batch(engine, batchdata, "training with synthesis")
        follow = self.iteration_update or trainer._iteration
        trainer.fire_event(IterationEvents.INNER_ITERATION_STARTED)
        random = numbers(trainer, self.seed)
        count = int(self.share * len(image) + float(torch.rand(1, generator=random)))
        support = self._support(batchdata, plain(image))
        chosen = support.flatten(1).any(1)[:count].nonzero().flatten()
        changed = dict(batchdata)
        if len(chosen):
            parts = (plain(image)[chosen], plain(label)[chosen], support[chosen])
            made, moved, mask = self._synthesised(*parts, random)
            changed[self.image_key] = like(plain(image).index_copy(0, chosen, made), image)
            changed[self.label_key] = like(plain(label).index_copy(0, chosen, moved), label)
            if self.support_key is not None and self.support_key in batchdata:
                changed[self.support_key] = like(support.index_copy(0, chosen, mask), batchdata[self.support_key])
        trainer.fire_event(IterationEvents.INNER_ITERATION_COMPLETED)
        handed = prepared_batch(trainer, changed)
        for key, given, wanted in ((self.image_key, handed[0], image), (self.label_key, handed[1], label)):
            if len(chosen) and not torch.equal(plain(given), plain(changed[key]).to(plain(wanted))):
                raise ConfigError(
                    f"prepare_batch does not hand over what it finds under {key!r} unchanged: the network would not "
                    "see the synthetic batch. Name its keys as image_key and label_key"
                )
        return follow(trainer, changed)

    def _support(self, batchdata: Mapping[str, Any], image: Tensor) -> Tensor:
        """The foreground ``(B, C, *spatial)``."""
        if self.support_key is None or self.support_key not in batchdata:
            return image != 0
        return plain(batchdata[self.support_key]).to(image.device).bool().expand_as(image)

    @torch.no_grad()
    def _synthesised(
        self, image: Tensor, label: Tensor, support: Tensor, random: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and supports that the generator makes of these."""
        drop, scale = (
            low + (high - low) * torch.rand(len(image), generator=random, dtype=torch.float64)
            for low, high in (self.drop, self.scale)
        )
        inside = torch.where(support, torch.where(image == 0, _NEARLY_ZERO, image), 0.0)
        raw = self.generator.to(image.device)(inside, drop.to(inside), generator=random)
        parameters = self.effect.scaled(self.effect.from_unit(raw, inside, self.spacing), scale.to(image.device))
        made = self.effect.apply(inside, parameters, self.spacing, support)
        warp = self.effect.label_warp(image.shape[2:], parameters, self.spacing)
        moved = warp(support)
        return torch.where(moved, made, warp(image)), warp(label), moved


def _range(name: str, values: Any) -> tuple[float, float]:
    numbers_given = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 2
    if not numbers_given or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ConfigError(f"{name} must be a range (low, high), got {values!r}")
    if not 0 <= values[0] <= values[1] <= 1:
        raise ConfigError(f"{name} must have 0 <= low <= high <= 1, got {tuple(values)}")
    return float(values[0]), float(values[1])


def _spacing(given: Any, generator: SynthesisGenerator) -> tuple[float, ...]:
    """The voxel size in mm of what is synthesised."""
    found = generator.training_info.get("spacing") if given is None else given
    if found is None:
        raise ConfigError("the generator does not say at which voxel size it was trained: give spacing in mm")
    positive = isinstance(found, Sequence) and all(isinstance(s, (int, float)) and 0 < s < math.inf for s in found)
    if not positive or len(found) != generator.spatial_dims:
        raise ConfigError(f"spacing must be {generator.spatial_dims} numbers of mm > 0, got {found!r}")
    return tuple(float(s) for s in found)
