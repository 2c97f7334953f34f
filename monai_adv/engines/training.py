"""Train a victim with MONAI's SupervisedTrainer on foreground-balanced patches."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.data import CacheDataset, DataLoader, list_data_collate
from monai.handlers import LrScheduleHandler
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss, DiceLoss
from monai.transforms import (
    Compose,
    CopyItemsd,
    CropForegroundd,
    EnsureTyped,
    FgBgToIndicesd,
    Lambdad,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SelectItemsd,
    SpatialPadd,
    SqueezeDimd,
)
from monai.utils import CommonKeys
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from monai_adv.data import LoadCased
from monai_adv.engines.robust import RobustTrainer, create_method
from monai_adv.engines.robust.distillation import TEMPERATURE, scale_logits
from monai_adv.engines.robust.step import SUPPORT
from monai_adv.errors import ConfigError, NonFiniteError
from monai_adv.networks import build_network, spatial_dims, trainable_network
from monai_adv.transforms import NormalizeNonzerod, NormalizeNonzeroSlices
from monai_adv.victims import Head, Victim, VictimConfig, build_victim, read_checkpoint, save_checkpoint
from monai_adv.victims.checkpoint import file_hash

# by the axes of a patch: how a trained network is deployed
_PREPROCESSING = {2: "zscore_nonzero_slices", 3: "zscore_nonzero"}
_WINDOWS = {2: 16, 3: 2}


@dataclass
class TrainConfig:
    """The recipe of a victim, as plain data.

    Args:
        head: "softmax" (4 classes) or "sigmoid" (TC, WT, ET).
        network: changes to the baseline U-Net's arguments, or another network of
            :data:`monai_adv.networks.NETWORKS`, ``{"name": "SegResNet", "init_filters": 8}``, with its own arguments;
            channels, axes and a fixed input size are filled in.
        patch: patch and sliding window size in voxels. Two sides train a 2D network, on axial slices of the volumes,
            every slice z-scored for itself.
        batch: patches per step, drawn from ``batch // per_subject`` subjects.
        per_subject: patches drawn from each subject.
        steps: optimiser steps.
        minutes: stop after this many minutes even if steps are left; the schedule follows the clock then, and the
            result is no longer a function of the seed alone.
        learning_rate: peak learning rate of AdamW with a one-cycle cosine.
        weight_decay: of AdamW.
        ema: decay of the averaged weights that are kept, 0 for none.
        foreground: share of patches centred on tumour.
        seed: of weights, sampling and augmentation.
        half: store the weights in 16 bits.
        method: robust training, ``{"name": "pgd_at", "eps": 0.1, "steps": 3}``: see
            :func:`monai_adv.engines.create_method`; None is plain training. Patches are z-scores of the brain, so that
            its default units, "absolute", are standard deviations; what was background before the augmentation is not
            perturbed.
        init: checkpoint whose network is trained further, instead of one with random weights; ``network`` may then be
            left out.
    """

    head: str = "softmax"
    network: dict[str, Any] = field(default_factory=dict)
    patch: tuple[int, ...] = (64, 64, 64)
    batch: int = 2
    per_subject: int = 1
    steps: int = 4000
    minutes: float | None = None
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    ema: float = 0.995
    foreground: float = 0.67
    seed: int = 0
    half: bool = False
    method: dict[str, Any] | None = None
    init: str | None = None


def training_transforms(config: TrainConfig) -> Compose:
    """Deterministic transforms (which ``CacheDataset`` computes once) followed by the random ones."""
    head, dims = Head(config.head), len(config.patch)
    flat = dims == 2
    # a slice is a volume of depth one until it is cut
    size = (*config.patch, 1) if flat else config.patch
    both = ("image", "label")
    # what a method may perturb, from before the augmentation, which leaves no background of exact zeros
    support: list[Any] = []
    if config.method is not None:
        support = [CopyItemsd("image", names=SUPPORT), Lambdad(SUPPORT, lambda image: image != 0)]
    kept = (*both, SUPPORT) if support else both
    return Compose(
        [
            LoadCased(),
            Orientationd(both, axcodes="RAS", labels=None),
            CropForegroundd(both, source_key="image", margin=4, allow_smaller=True),
            *([] if flat else [NormalizeNonzerod("image")]),
            SpatialPadd(both, spatial_size=size),
            EnsureTyped(both, track_meta=False),
            *([Lambdad("image", _normalized_slices)] if flat else []),
            *support,
            FgBgToIndicesd("label", image_key="image"),  # once, not at every draw
            RandCropByPosNegLabeld(
                kept,
                label_key="label",
                fg_indices_key="label_fg_indices",
                bg_indices_key="label_bg_indices",
                spatial_size=size,
                pos=config.foreground,
                neg=1 - config.foreground,
                num_samples=config.per_subject,
            ),
            *([SqueezeDimd(kept, dim=-1)] if flat else []),
            *(RandFlipd(kept, prob=0.5, spatial_axis=axis) for axis in range(dims)),
            RandScaleIntensityd("image", factors=0.15, prob=0.5, channel_wise=True),
            RandShiftIntensityd("image", offsets=0.15, prob=0.5, channel_wise=True),
            RandGaussianNoised("image", prob=0.2, std=0.1),
            Lambdad("label", lambda label: head.label_from_classes(label[None])[0]),
            SelectItemsd(kept),
        ]
    )


def _normalized_slices(image: Tensor) -> Tensor:
    """A volume ``(C, H, W, D)`` with every slice z-scored for itself."""
    return NormalizeNonzeroSlices()(image[None])[0]


def training_loss(head: Head) -> nn.Module:
    """Dice (over the batch) + cross entropy of the head's channels, from MONAI's losses."""
    if head.exclusive:
        return DiceCELoss(
            softmax=True, to_onehot_y=True, include_background=False, batch=True, smooth_nr=1, smooth_dr=1
        )
    return _BitsLoss()


class _BitsLoss(nn.Module):
    """Dice + binary cross entropy of overlapping regions.

    MONAI's DiceCELoss takes a softmax cross entropy for several channels even with ``sigmoid=True``, in which voxels
    outside every region count nothing, and raises on the bool labels of its own BraTS transform.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1)
        self.bce = nn.BCEWithLogitsLoss()

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        label = label.to(logits.dtype)
        return self.dice(logits, label) + self.bce(logits, label)


def train(
    items: Sequence[dict[str, Any]],
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    spacing: Sequence[float] | None = None,
    provenance: dict[str, Any] | None = None,
    on_step: Callable[[float, float], None] | None = None,
) -> tuple[Victim, list[float]]:
    """Train a network on a datalist and write a checkpoint that ``load_victim`` reads.

    Args:
        items: datalist with labels.
        out: checkpoint file to write.
        config: the recipe.
        spacing: voxel size in mm of the data, stored for information.
        provenance: further plain data to store beside the weights.
        on_step: called with the share done and the loss after every step (for a progress bar).

    Returns:
        The victim with the kept weights, and the loss of every step.

    Raises:
        ConfigError: if there is nothing to train on, batch and per_subject do not fit, or the network does not turn
            patches into logits.
    """
    config = config or TrainConfig()
    if not items:
        raise ConfigError("no subject to train on")
    if config.batch % config.per_subject:
        raise ConfigError(f"batch {config.batch} is not a multiple of per_subject {config.per_subject}")
    if len(config.patch) not in _WINDOWS:
        raise ConfigError(f"patch {tuple(config.patch)} must have two sides (slices) or three (volumes)")
    head = Head(config.head)
    method = create_method(config.method, head)
    torch.manual_seed(config.seed)  # weight initialisation has no generator argument in torch
    network, architecture = _network(config)
    _require_logits(network, architecture, config.patch)
    # Free steps several times on a batch: the steps are counted, and the batches drawn, accordingly
    replays = getattr(method, "steps_per_batch", 1)
    batches = math.ceil(config.steps / replays)

    transforms = training_transforms(config)
    transforms.set_random_state(config.seed)
    dataset = CacheDataset(list(items), transforms, progress=False, num_workers=None)
    subjects = config.batch // config.per_subject
    sampler = RandomSampler(
        dataset, num_samples=batches * subjects, generator=torch.Generator().manual_seed(config.seed)
    )
    # no background thread: an engine that ends early leaves MONAI's running, and it outlives the interpreter
    loader = DataLoader(dataset, batch_size=subjects, sampler=sampler, collate_fn=list_data_collate)

    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    started = time.monotonic()

    def done() -> float:
        """Share of the training that is over, by steps or by the clock, whichever is further."""
        by_clock = (time.monotonic() - started) / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max(len(losses) / batches, by_clock))

    losses: list[float] = []
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: _one_cycle(done()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = RobustTrainer(
        device=device,
        max_epochs=1,
        train_data_loader=loader,
        network=network.to(device),
        optimizer=optimizer,
        loss_function=training_loss(head),
        inferer=SimpleInferer(),
        train_handlers=[LrScheduleHandler(scheduler, epoch_level=False, print_lr=False)],  # type: ignore[arg-type]
        decollate=False,
        method=method,
        head=head,
    )
    trainer.logger.setLevel(logging.WARNING)

    @trainer.on(Events.ITERATION_COMPLETED)
    def _record(engine: Engine) -> None:
        losses.append(float(engine.state.output[CommonKeys.LOSS].detach()))  # type: ignore[index]
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(f"the training loss is {losses[-1]} at step {len(losses)}: lower the learning rate")
        if on_step is not None:
            on_step(done(), losses[-1])
        if done() >= 1:
            engine.terminate()

    averaged = None
    if config.ema:
        averaged = EMAHandler(network, momentum=1 - config.ema)
        averaged.attach(trainer, name="ema_momentum", event=Events.ITERATION_COMPLETED)
    trainer.run()
    # an average over fewer steps than its memory still holds the initial weights
    long_enough = config.ema and len(losses) * (1 - config.ema) > 5
    kept = averaged.ema_model if averaged is not None and long_enough else network

    pipeline = VictimConfig(
        network=architecture,
        head=config.head,
        preprocessing=_PREPROCESSING[len(config.patch)],
        roi_size=list(config.patch),
        sw_batch_size=_WINDOWS[len(config.patch)],
        spacing=list(spacing) if spacing is not None else None,
        training={
            "recipe": {**asdict(config), "patch": list(config.patch)},
            "subjects": [str(item["subject"]) for item in items],
            "method": _recorded(config),
            "init": None if config.init is None else {"file": str(config.init), "sha256": file_hash(config.init)},
            "steps": len(losses) * replays,
            "final_loss": sum(losses[-50:]) / max(1, len(losses[-50:])),
            **(provenance or {}),
        },
    )
    save_checkpoint(out, kept, pipeline, half=config.half)
    return build_victim(kept.eval(), pipeline, name=Path(out).stem), losses


def _network(config: TrainConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The network to train and its configuration: a new one, or that of a checkpoint.

    Raises:
        ConfigError: the checkpoint's pipeline is not the one that is trained for.
    """
    wanted = trainable_network(config.head, config.patch, **config.network)
    if config.init is None:
        return build_network(wanted), wanted
    network, stored = read_checkpoint(config.init)
    if spatial_dims(stored.network) != len(config.patch):
        raise ConfigError(
            f"{config.init} holds a network of {spatial_dims(stored.network)} axes: patches of {tuple(config.patch)} "
            "are not for it"
        )
    if stored.head != config.head:
        raise ConfigError(f"{config.init} has a {stored.head} head: train it with that, not with {config.head}")
    if Head(stored.head, stored.regions) != Head(stored.head):
        raise ConfigError(
            f"{config.init} has the outputs {stored.regions}: only networks whose outputs are NCR, ED, ET or TC, WT, "
            "ET, in this order, are trained further here"
        )
    if config.network and json.loads(json.dumps(wanted)) != stored.network:
        raise ConfigError(
            f"{config.init} holds the network {stored.network}: leave the network out to train it further"
        )
    if stored.preprocessing != _PREPROCESSING[len(config.patch)]:
        raise ConfigError(
            f"{config.init} has the preprocessing {stored.preprocessing!r}, but patches have "
            f"{_PREPROCESSING[len(config.patch)]!r}: it cannot be trained here"
        )
    if config.method is not None and config.method.get("name") == "distillation":
        # the same probabilities at the temperature that is trained at
        before = (stored.training.get("method") or {}).get("temperature", 1.0)
        scale_logits(network, config.method.get("temperature", TEMPERATURE) / before, config.patch)
    return network.train(), stored.network


def _require_logits(network: nn.Module, architecture: Mapping[str, Any], patch: Sequence[int]) -> None:
    """Try a patch on a copy, in training mode: what a network gives there, and whether the patch suits it.

    Raises:
        ConfigError: it gives something else than logits of the patch's size, or cannot take it.
    """
    trial = copy.deepcopy(network).train()  # BatchNorm counts what it sees
    image = torch.zeros(1, architecture.get("in_channels", 4), *patch)
    name = architecture["name"]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = trial(image)
    except ImportError as error:
        raise ConfigError(f"{name} needs a package that is not installed: {str(error).splitlines()[0]}") from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{name} cannot be trained on patches of {tuple(patch)} ({error}): most networks need sides that their "
            "strides divide and leave more than one voxel of"
        ) from error
    if isinstance(logits, (tuple, list, dict)) or logits.dim() != image.dim():
        raise ConfigError(
            f"{name} gives more than one tensor of logits in training (deep supervision): switch that off, e.g. "
            "deep_supervision=False"
        )
    if logits.shape[2:] != image.shape[2:]:
        raise ConfigError(f"{name} turns patches of {tuple(patch)} into logits of {tuple(logits.shape[2:])}")


def _recorded(config: TrainConfig) -> dict[str, Any]:
    """The method as plain data, with the hash of what it learns from."""
    method = {"name": "plain"} if config.method is None else dict(config.method)
    for source in ("teacher", "generator"):
        if method.get(source) is not None:
            method[f"{source}_sha256"] = file_hash(method[source])
    return method


def _one_cycle(done: float, warmup: float = 0.05) -> float:
    """Relative learning rate: linear warm-up, then a cosine to 1 %."""
    if done < warmup:
        return 0.05 + 0.95 * done / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
