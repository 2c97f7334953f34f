"""Defensive distillation: a student learns the softened probabilities of a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from torch import Tensor, nn

from monai_adv.data.meta import plain
from monai_adv.defenses.objectives import hard_cross_entropy, soft_cross_entropy
from monai_adv.engines.robust.step import swapped, training_batch
from monai_adv.errors import ConfigError
from monai_adv.victims import Head, as_head, guard, read_checkpoint

LABELS = ("soft", "hard")
TEMPERATURE = 20.0


def scale_logits(network: nn.Module, factor: float, patch: Sequence[int]) -> None:
    """Multiply what a network gives by a factor, in its last layer.

    A network trained at T = 1 is no start for training at temperature T: softmax(z / T) is nearly uniform, and the
    small regions are forgotten before the logits have grown. T times its logits are the same probabilities at T.

    Args:
        network: changed in place; its last convolution must be what makes the logits.
        factor: > 0.
        patch: spatial size of an image that the network takes, to see that it worked.

    Raises:
        ConfigError: the logits are not those of the last convolution (it is left as it was).
    """
    layer = [m for m in network.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))][-1]
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    channels = next(m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)).in_channels
    image = torch.randn(1, channels, *patch, generator=torch.Generator().manual_seed(0)).to(layer.weight)
    with guard(network), torch.no_grad():
        before = plain(network(image))
        for parameter in parameters:
            parameter.mul_(factor)
        if torch.allclose(plain(network(image)), factor * before, rtol=1e-3, atol=1e-4 * factor):
            return
        for parameter in parameters:
            parameter.div_(factor)
    raise ConfigError(
        f"{type(network).__name__} does not make its logits in its last convolution: it cannot start a training at "
        "another temperature; train a new network (without init)"
    )


class DistillationIteration:
    """Cross entropy at temperature T against a teacher's probabilities at the same T, voxel by voxel.

    The engine's own iteration runs with this loss in place of its own. The student is deployed at T = 1, where its
    logits, trained T times too large, saturate the softmax: cross-entropy gradients of an attack vanish, which is no
    robustness. Report ``zero_gradient`` of the attack's trace and attack the logits (loss "margin") beside.

    With ``labels="hard"`` it trains the *teacher*: CE of softmax(z / T) against the labels; with T = 1 that is plain
    cross-entropy training.

    Reference:
        Papernot et al., Distillation as a defense to adversarial perturbations against deep neural networks, S&P 2016;
        Carlini and Wagner 2017 on what it is worth.

    Args:
        teacher: network, or the checkpoint of one; it gets the student's own augmented batches.
        temperature: T >= 1.
        labels: "soft" (the teacher's probabilities) or "hard" (the batch's labels; takes no teacher).
        head: of both; a sigmoid head has binary cross entropy per region.
        iteration_update: what takes the step; the engine's own ``_iteration`` if None.
    """

    steps_per_batch = 1

    def __init__(
        self,
        teacher: nn.Module | str | Path | None = None,
        temperature: float = TEMPERATURE,
        labels: str = "soft",
        head: str | Head = "softmax",
        iteration_update: Callable[[Engine, Any], Any] | None = None,
    ) -> None:
        if (
            isinstance(temperature, bool)
            or not isinstance(temperature, (int, float))
            or not 1 <= temperature < math.inf
        ):
            raise ConfigError(f"temperature must be a finite number >= 1, got {temperature!r}")
        if labels not in LABELS:
            raise ConfigError(f"labels {labels!r} are unknown: use 'soft' (the teacher's) or 'hard' (the batch's)")
        if (teacher is None) == (labels == "soft"):
            raise ConfigError(
                "labels='soft' needs a teacher: a network or its checkpoint, teacher=teacher.pt"
                if teacher is None
                else "labels='hard' takes no teacher: the labels are the batch's own"
            )
        self.temperature = float(temperature)
        self.labels = labels
        self.head = as_head(head)
        self.iteration_update = iteration_update
        self.teacher = self._network(teacher) if isinstance(teacher, (str, Path)) else teacher

    def __call__(self, engine: Engine, batchdata: Mapping[str, Any]) -> Any:
        """One optimiser step against the teacher's labels."""
        trainer, image, _ = training_batch(engine, batchdata, "distillation")
        follow = self.iteration_update or trainer._iteration
        target: Tensor | None = None
        if self.teacher is not None:
            with guard(self.teacher.to(image.device)), torch.no_grad():
                logits = plain(trainer.inferer(plain(image), self.teacher))
                target = self.head.probabilities(logits.float() / self.temperature)

        def loss(logits: Tensor, label: Tensor) -> Tensor:
            student = plain(logits)
            if target is None:
                return hard_cross_entropy(student, plain(label), self.head, self.temperature)
            if student.shape != target.shape:
                raise ConfigError(
                    f"teacher and student disagree: logits {tuple(target.shape)} and {tuple(student.shape)}"
                )
            return soft_cross_entropy(student, target.to(student.dtype), self.head, self.temperature)

        with swapped(trainer, loss_function=loss):
            return follow(trainer, batchdata)  # type: ignore[arg-type]

    def _network(self, checkpoint: str | Path) -> nn.Module:
        network, config = read_checkpoint(checkpoint)
        if config.head != self.head.kind:
            raise ConfigError(f"the teacher {checkpoint} has a {config.head} head, the student a {self.head.kind} one")
        return network
