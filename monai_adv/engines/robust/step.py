"""What the iterations of robust training share: random numbers, the victim in training, the pair in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from torch import Generator, Tensor, nn

from monai_adv.attacks import Attack, create
from monai_adv.data.meta import like, plain
from monai_adv.engines.attack import engine_victim, prepared_batch
from monai_adv.errors import ConfigError
from monai_adv.threats import Threat
from monai_adv.victims import Head, Victim, as_head

SUPPORT = "support"  # key of the voxels that may change, where a batch has them


def numbers(engine: SupervisedTrainer, seed: int) -> Generator:
    """The random numbers of an iteration: a function of seed, process and iteration, so that a resume needs no more.

    Args:
        engine: its ``state`` says which iteration of which process.
        seed: of the method.
    """
    entropy = np.random.SeedSequence((seed, engine.state.rank, engine.state.iteration))
    return Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def training_victim(
    engine: SupervisedTrainer, head: str | Head, preprocessing: Callable[[Tensor], Tensor] | None = None
) -> Victim:
    """The network in training, unwrapped, in the precision the engine computes in."""
    on_gpu = torch.device(engine.state.device).type == "cuda"
    amp = engine.amp and (on_gpu or getattr(engine, "casts_on_cpu", False))
    return engine_victim(engine, head, preprocessing, amp)


def training_batch(engine: Engine, batchdata: Any, method: str) -> tuple[SupervisedTrainer, Tensor, Tensor]:
    """The engine as a trainer, and image and label of its batch on its device.

    Raises:
        ConfigError: this is no trainer, no dictionary, or there is no label.
    """
    if not isinstance(engine, SupervisedTrainer):
        raise ConfigError(f"{method} trains: give it to a SupervisedTrainer, not to a {type(engine).__name__}")
    if not isinstance(batchdata, Mapping):
        raise ConfigError(f"{method} needs batches as dictionaries, as MONAI's dictionary transforms make them")
    image, label = prepared_batch(engine, batchdata)
    if label is None:
        raise ConfigError(f"{method} needs labels in the batch")
    return engine, image, label


def support_of(batchdata: Mapping[str, Any], key: str | None, threat: Threat, image: Tensor) -> Tensor | None:
    """The batch's own mask of the voxels that may change; None where it has none, or all may."""
    if key is None or key not in batchdata or threat.support == "all":
        return None
    return plain(batchdata[key]).to(image.device).bool()


def checked_seed(seed: Any) -> int:
    """A seed.

    Raises:
        ConfigError: it is not an integer >= 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be an integer >= 0, got {seed!r}")
    return seed


@contextmanager
def swapped(engine: SupervisedTrainer, **members: Any) -> Iterator[None]:
    """Other members of an engine for the length of one iteration."""
    before = {name: getattr(engine, name) for name in members}
    for name, member in members.items():
        setattr(engine, name, member)
    try:
        yield
    finally:
        for name, member in before.items():
            setattr(engine, name, member)


class Pair(Inferer):
    """Clean and adversarial images in one forward: DistributedDataParallel synchronises once, and so do its buffers.

    What comes back are the clean images' logits; the others' are in ``adversarial``.
    """

    def __init__(self, inferer: Inferer, images: Tensor) -> None:
        self.inferer = inferer
        self.images = images
        self.adversarial: Tensor | None = None

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        both = plain(self.inferer(torch.cat([plain(inputs), self.images]), network, *args, **kwargs))
        clean, self.adversarial = both[: len(inputs)], both[len(inputs) :]
        return like(clean, inputs)


class PairedIteration:
    """An ``iteration_update`` that minimises a loss of the logits of clean images and of their adversarial companions.

    The engine's own iteration runs, with both in one forward (so BatchNorm sees them together) and with the method's
    loss; ``engine.state.output`` holds the clean image and its logits, and the whole loss.

    Args:
        attack: what makes the companions.
        head: head of the engine's network.
        seed: of the companions.
        support_key: key of a mask of the voxels that may change, where the batch has one; a threat with
            ``support="all"`` does not ask.
        iteration_update: what takes the step; the engine's own ``_iteration`` if None.
    """

    name = "paired"
    steps_per_batch = 1

    def __init__(
        self,
        attack: Attack | Mapping[str, Any],
        head: str | Head = "softmax",
        seed: int = 0,
        support_key: str | None = SUPPORT,
        iteration_update: Callable[[Engine, Any], Any] | None = None,
    ) -> None:
        self.attack = attack if isinstance(attack, Attack) else create(**attack)
        if self.attack.moves_voxels:
            raise ConfigError(f"{self.attack.name} moves the anatomy: a voxel of the pair would not be the same voxel")
        self.head = as_head(head)
        self.seed = checked_seed(seed)
        self.support_key = support_key
        self.iteration_update = iteration_update

    def __call__(self, engine: Engine, batchdata: Mapping[str, Any]) -> Any:
        """One optimiser step on a batch and its adversarial companion."""
        trainer, image, label = training_batch(engine, batchdata, self.name)
        follow = self.iteration_update or trainer._iteration
        if not self._needs_pair():
            return follow(trainer, batchdata)  # type: ignore[arg-type]
        trainer.fire_event(IterationEvents.INNER_ITERATION_STARTED)
        companions = self._companions(
            trainer, image, label, support_of(batchdata, self.support_key, self.attack.threat, image)
        )
        trainer.fire_event(IterationEvents.INNER_ITERATION_COMPLETED)
        pair, loss = Pair(trainer.inferer, companions), trainer.loss_function

        def both(logits: Tensor, target: Tensor) -> Tensor:
            assert pair.adversarial is not None
            return self._loss(loss, logits, pair.adversarial.to(logits.dtype), target)

        with swapped(trainer, inferer=pair, loss_function=both):
            return follow(trainer, batchdata)  # type: ignore[arg-type]

    def _needs_pair(self) -> bool:
        return True

    def _companions(self, engine: SupervisedTrainer, image: Tensor, label: Tensor, support: Tensor | None) -> Tensor:
        """Adversarial images, plain, of the shape of ``image``."""
        raise NotImplementedError

    def _loss(
        self, loss: nn.Module | Callable[..., Tensor], clean: Tensor, adversarial: Tensor, label: Tensor
    ) -> Tensor:
        """What is minimised, from the logits of both (same label)."""
        raise NotImplementedError
