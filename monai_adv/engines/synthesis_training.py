"""Train a synthesis generator on a datalist: the recipe as plain data, checkpoints and pictures along the way."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.handlers import TensorBoardStatsHandler
from torch import Tensor, nn

from monai_adv.data.files import atomic_file, check_writable
from monai_adv.engines.synthesis import DROPS, SynthesisTrainer, Synthesized, loss_terms, loss_weights
from monai_adv.engines.synthesis_data import Cohort, TumourCrops, load_cohort
from monai_adv.errors import CheckpointError, ConfigError, NonFiniteError
from monai_adv.losses.region_dice import PRESENT
from monai_adv.networks import SynthesisCritic, SynthesisGenerator, save_generator
from monai_adv.victims import Victim, load_victim
from monai_adv.victims.checkpoint import file_hash

_PATCH = {2: (96, 96), 3: (64, 64, 64)}
_BATCH = {2: 4, 3: 2}
_BETAS = (0.5, 0.99)  # of Adam, as networks that are trained against each other take them


@dataclass
class SynthesisConfig:
    """The recipe of a generator, as plain data; all defaults are ours.

    Args:
        patch: crops in voxels, as many sides as the victim has axes; None is 64 x 64 x 64, or 96 x 96 of a slice.
        batch: crops per step; None is 2, or 4 of slices.
        steps: steps.
        minutes: stop after this many minutes even if steps are left; the learning rates follow the clock then, and the
            result is no longer a function of the seed alone.
        epoch_steps: steps of an epoch, after which the checkpoint is written.
        learning_rate: of the generator's Adam at the start; a cosine brings it to a tenth.
        critic_learning_rate: of the critic's.
        seed: of weights, crops, drops and codes.
        drop: range of the drops asked for.
        region: "present" or a region's name, see :class:`monai_adv.engines.SynthesisTrainer`.
        weights: changes to the weights of the loss's terms.
        effect: arguments of :class:`monai_adv.transforms.Synthesis`, its limits first of all.
        channels: of the generator.
        latent: channels of its code.
    """

    patch: tuple[int, ...] | None = None
    batch: int | None = None
    steps: int = 1000
    minutes: float | None = None
    epoch_steps: int = 50
    learning_rate: float = 5e-4
    critic_learning_rate: float = 5e-4
    seed: int = 0
    drop: tuple[float, float] = DROPS
    region: str = PRESENT
    weights: dict[str, float] = field(default_factory=dict)
    effect: dict[str, Any] = field(default_factory=dict)
    channels: tuple[int, ...] = (8, 16, 32)
    latent: int = 8


@dataclass
class SynthesisPreview:
    """What the generator makes of the same crop after every epoch, from the mean of its code.

    Attributes:
        epoch: from 0.
        image: the real crop ``(C, *spatial)``.
        synthetic: what became of it.
        truth: the whole tumour, ``(*spatial)`` bool.
        moved_truth: the tumour moved with the image, by nearest neighbour.
        fields: ``displacement`` ``(dims, *spatial)`` in mm, ``bias`` and ``residual`` ``(C, *spatial)``.
        spacing: voxel size in mm.
        drop: the drop of soft Dice that was asked for.
        reached: the drop that was reached.
    """

    epoch: int
    image: Tensor
    synthetic: Tensor
    truth: Tensor
    moved_truth: Tensor
    fields: dict[str, Tensor]
    spacing: tuple[float, ...]
    drop: float
    reached: float


def train_synthesis(
    items: Sequence[Mapping[str, Any]],
    victim: Victim | str | Path,
    out: str | Path,
    config: SynthesisConfig | None = None,
    *,
    state: str | Path | None = None,
    log_dir: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    preview: Callable[[SynthesisPreview], None] | None = None,
    on_step: Callable[[float, dict[str, float]], None] | None = None,
) -> tuple[SynthesisGenerator, list[dict[str, float]]]:
    """Train a generator against a victim and write a checkpoint that :func:`monai_adv.networks.load_generator` reads.

    The checkpoint is written after every epoch; whatever ends the training, it is there as it was last written.

    Args:
        items: datalist with labels.
        victim: its checkpoint, or the victim itself; a 2D network is trained against on axial slices.
        out: generator checkpoint to write.
        config: the recipe.
        state: file for the whole state of the training, written after every epoch; if it exists, the training goes on
            from there: with the same recipe, and no clock, to the weights of an uninterrupted one.
        log_dir: folder for TensorBoard.
        provenance: further plain data to store beside the weights.
        preview: called with a :class:`SynthesisPreview` after every epoch.
        on_step: called with the share done and the terms of the loss after every step.

    Returns:
        The generator in evaluation mode, and the terms of every step.

    Raises:
        ConfigError: if there is nothing to train on, or the recipe does not fit data or victim.
        NonFiniteError: if the loss is.
        CheckpointError: if the victim or the state cannot be read.
    """
    config = config or SynthesisConfig()
    check_writable(out)
    if log_dir is not None:
        _require_tensorboard()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source: dict[str, Any] = {"name": victim.name} if isinstance(victim, Victim) else {"file": str(victim)}
    if not isinstance(victim, Victim):
        source["sha256"] = file_hash(victim) if Path(victim).is_file() else None
        victim = load_victim(victim, device=device)
    dims = _dims(victim.network)
    patch = tuple(config.patch or _PATCH[dims])
    if len(patch) != dims:
        raise ConfigError(f"{victim.name} has {dims} axes, the patch {patch} has {len(patch)}")
    batch = _BATCH[dims] if config.batch is None else config.batch
    for name, value in (("batch", batch), ("steps", config.steps), ("epoch_steps", config.epoch_steps)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    critic_weight = loss_weights(config.weights)["critic"]
    cohort = load_cohort(items, patch)
    _require_subjects(cohort, critic_weight)

    crops = TumourCrops(
        cohort, patch, victim.head, seed=config.seed, length=batch * config.epoch_steps, real=critic_weight > 0
    )
    sample = _batch_of_one(crops)
    with torch.random.fork_rng(devices=[]):  # weight initialisation has no generator argument in torch
        torch.manual_seed(config.seed)
        channels = sample["image"].shape[1]
        generator = SynthesisGenerator(dims, channels, config.channels, config.latent, config.effect).to(device)
        critic = SynthesisCritic(dims, channels).to(device) if critic_weight > 0 else None
    trainer = SynthesisTrainer(
        device,
        math.ceil(config.steps / config.epoch_steps),
        DataLoader(crops, batch_size=batch),
        generator,
        victim,
        torch.optim.Adam(generator.parameters(), lr=config.learning_rate, betas=_BETAS),
        cohort.spacing[:dims],
        critic=critic,
        critic_optimizer=None
        if critic is None
        else torch.optim.Adam(critic.parameters(), lr=config.critic_learning_rate, betas=_BETAS),
        weights=config.weights,
        drop=config.drop,
        region=config.region,
        seed=config.seed,
    )
    trainer.logger.setLevel(logging.WARNING)
    if log_dir is not None:
        board = TensorBoardStatsHandler(log_dir=str(log_dir), output_transform=loss_terms, epoch_log=False)
        board.attach(trainer)

    information: dict[str, Any] = {
        "recipe": {**asdict(config), "patch": list(patch), "batch": batch},
        "victim": source,
        "subjects": cohort.subjects,
        "problems": cohort.problems,
        "spacing": list(cohort.spacing[:dims]),
        **(provenance or {}),
    }
    run = _Run(trainer, config, Path(out), information, sample, preview, on_step)
    if state is not None:
        run.resume(Path(state))
    if run.done() < 1:
        trainer.run()
        run.finish()
    generator.training_info = information
    return generator.eval(), run.history


class _Run:
    """What happens around the steps: clock, learning rates, checks, checkpoints, pictures."""

    def __init__(
        self,
        trainer: SynthesisTrainer,
        config: SynthesisConfig,
        out: Path,
        information: dict[str, Any],
        sample: dict[str, Tensor],
        preview: Callable[[SynthesisPreview], None] | None,
        on_step: Callable[[float, dict[str, float]], None] | None,
    ) -> None:
        self.trainer, self.config, self.out, self.information = trainer, config, out, information
        self.sample, self.preview, self.on_step = sample, preview, on_step
        self.state: Path | None = None
        self.history: list[dict[str, float]] = []
        self.started = time.monotonic()
        self.written = 0
        trainer.add_event_handler(Events.ITERATION_STARTED, self._before)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._after)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._end_of_epoch)

    def done(self) -> float:
        """Share of the training that is over, by steps or by the clock, whichever is further."""
        minutes = self.config.minutes
        by_clock = (time.monotonic() - self.started) / (60 * minutes) if minutes else 0.0
        return min(1.0, max(len(self.history) / self.config.steps, by_clock))

    def resume(self, file: Path) -> None:
        """Keep the state in a file from now on, and go on from it if it is there."""
        self.state = file
        check_writable(file)
        if not file.exists():
            return
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True)
            self.trainer.load_state_dict(stored["trainer"])
            self.history, elapsed = stored["history"], stored["elapsed"]
        except ConfigError:
            raise
        except Exception as error:  # damaged bytes raise whatever the unpickler stumbles over
            raise CheckpointError(
                f"the training's state {file} cannot be gone on from ({error}): remove it to start anew, or use the "
                "recipe it was made with"
            ) from error
        self.trainer.state.max_epochs = math.ceil(self.config.steps / self.config.epoch_steps)
        self.started -= elapsed
        self.written = len(self.history)

    def finish(self, engine: Engine | None = None) -> None:
        """Write the checkpoints, and show what the generator does by now; nothing new, nothing written."""
        if len(self.history) == self.written:
            return
        self.written = len(self.history)
        last = self.history[-50:]
        self.information["steps"] = len(self.history)
        self.information["final"] = {k: sum(h[k] for h in last) / len(last) for k in last[0]}
        save_generator(self.out, self.trainer.generator, self.information)
        if self.state is not None and engine is not None:  # a state within an epoch could not be gone on from
            elapsed = time.monotonic() - self.started
            with atomic_file(self.state) as stream:
                content = {"trainer": self.trainer.state_dict(), "history": self.history, "elapsed": elapsed}
                torch.save(content, stream)
        if self.preview is not None:
            self.preview(self._preview())

    def _end_of_epoch(self, engine: Engine) -> None:
        self.finish(engine)
        if self.done() >= 1:
            engine.terminate()

    def _before(self, engine: Engine) -> None:
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * self.done()))
        trainer = self.trainer
        rates = [(trainer.optimizer, self.config.learning_rate)]
        if trainer.critic_optimizer is not None:
            rates.append((trainer.critic_optimizer, self.config.critic_learning_rate))
        for optimizer, rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate * share

    def _after(self, engine: Engine) -> None:
        self.history.append(loss_terms(engine.state.output))  # type: ignore[arg-type]
        bad = [name for name, value in self.history[-1].items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"{', '.join(bad)} is not finite at step {len(self.history)}: lower the learning rate; {self.out} is "
                "what the last epoch left"
            )
        if self.on_step is not None:
            self.on_step(self.done(), self.history[-1])
        if self.done() >= 1 and len(self.history) % self.config.epoch_steps:  # an epoch that is over says so itself
            engine.terminate()

    def _preview(self) -> SynthesisPreview:
        trainer = self.trainer
        image, label = (self.sample[k].to(trainer.state.device) for k in ("image", "label"))
        drop = image.new_tensor([sum(trainer.drop) / 2])
        trainer.generator.eval()
        with torch.no_grad():
            made = trainer.synthesize(image, label, drop)
        trainer.generator.train()
        return _preview_of(made, trainer, (len(self.history) - 1) // self.config.epoch_steps)


def _preview_of(made: Synthesized, trainer: SynthesisTrainer, epoch: int) -> SynthesisPreview:
    fields = trainer.effect.fields(made.image, made.parameters, trainer.spacing, made.image != 0)
    tumour = made.truth.amax(1, keepdim=True) > 0
    return SynthesisPreview(
        epoch=epoch,
        image=made.image[0].cpu(),
        synthetic=made.synthetic[0].cpu(),
        truth=tumour[0, 0].cpu(),
        moved_truth=trainer.effect.warp_label(tumour, made.parameters, trainer.spacing)[0, 0].cpu(),
        fields={name: values[0].cpu() for name, values in fields.items()},
        spacing=trainer.spacing,
        drop=float(made.drop),
        reached=float(made.clean - made.dice),
    )


def _batch_of_one(crops: TumourCrops) -> dict[str, Tensor]:
    """The first crop of an epoch that is not trained on (they are counted from 1)."""
    crops.set_epoch(0)
    return {key: value[None] for key, value in crops[0].items()}


def _require_subjects(cohort: Cohort, critic_weight: float) -> None:
    needed = 2 if critic_weight > 0 else 1
    if len(cohort.volumes) < needed:
        why = (
            "a critic compares with other subjects: two are needed, or the critic's weight 0" if cohort.volumes else ""
        )
        raise ConfigError("\n".join(["too few subjects to train on", *([why] if why else []), *cohort.problems]))


def _require_tensorboard() -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise ConfigError("a log_dir needs TensorBoard: pip install tensorboard") from error


def _dims(network: nn.Module) -> int:
    """Spatial axes of a network, from its first convolution.

    Raises:
        ConfigError: if it has none.
    """
    for module in network.modules():
        for dims, kind in ((2, nn.Conv2d), (3, nn.Conv3d)):
            if isinstance(module, kind):
                return dims
    raise ConfigError("this victim's network has no convolution over two or three axes: its images are unknown")
