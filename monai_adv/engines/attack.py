"""Attacks inside MONAI workflows: one slot for evaluators, trainers and bundles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from monai.utils import CommonKeys
from torch import Tensor, nn

from monai_adv.attacks import Attack, AttackResult, create
from monai_adv.errors import ConfigError
from monai_adv.inferers import differentiable
from monai_adv.victims import Head, Victim, plain_tensor


class AttackKeys:
    """Keys that :class:`AttackEvaluator` adds to ``engine.state.output`` beside MONAI's ``CommonKeys``."""

    CLEAN_IMAGE = "clean_image"
    CLEAN_PRED = "clean_pred"
    SUCCESS = "attack_success"
    SCORE = "attack_score"


class AttackIteration:
    """An ``iteration_update`` that attacks the batch and then runs the engine's own iteration on it.

    In an evaluator ``engine.state.output`` is the adversarial pass and ``engine.state.batch`` keeps the clean batch;
    in a trainer the step is taken on the attacked batch: adversarial training. The network, inferer and device are
    the engine's; a plain ``SlidingWindowInferer`` is given exact gradients on the way.

    Args:
        attack: an attack, or ``{"name": ..., **options}`` for :func:`monai_adv.attacks.create`.
        head: head of the engine's network.
        iteration_update: what runs on the attacked batch; the engine's own ``_iteration`` if None.
        share: share of the samples to attack, from the front of each batch, on average; 1 in an evaluator.
        image_key: key of the image in the batch dictionary.
        label_key: key of the label, which moves with the image where the attack moves anatomy.
        preprocessing: what the network needs in front of it, where the batch is not yet normalised.

    Example:
        ``SupervisedEvaluator(..., iteration_update=AttackIteration(attacks.create("fgsm", eps=0.1)))``
    """

    def __init__(
        self,
        attack: Attack | Mapping[str, Any],
        head: str | Head = "softmax",
        iteration_update: Callable[[Engine, Any], Any] | None = None,
        share: float = 1.0,
        image_key: str = CommonKeys.IMAGE,
        label_key: str = CommonKeys.LABEL,
        preprocessing: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.attack = attack if isinstance(attack, Attack) else create(**attack)
        if not 0 < share <= 1:
            raise ConfigError(f"share must be in (0, 1], got {share}")
        self.head = head
        self.iteration_update = iteration_update
        self.share = share
        self.image_key = image_key
        self.label_key = label_key
        self.preprocessing = preprocessing
        self.result: AttackResult | None = None
        self._numbers = torch.Generator().manual_seed(self.attack.seed)

    def __call__(self, engine: Engine, batchdata: Mapping[str, Any]) -> Any:
        """Attack ``batchdata`` and delegate; the result of the attack stays in ``self.result``."""
        if not isinstance(batchdata, Mapping):
            raise ConfigError(
                "AttackIteration needs batches as dictionaries, as MONAI's dictionary transforms make them"
            )
        assert isinstance(engine, (SupervisedEvaluator, SupervisedTrainer))
        engine.fire_event(IterationEvents.INNER_ITERATION_STARTED)
        image, label = self._attacked(engine, batchdata)
        attacked = {**batchdata, self.image_key: image}
        if label is not None:  # the anatomy moved, and the label with it
            attacked[self.label_key] = label
        engine.fire_event(IterationEvents.INNER_ITERATION_COMPLETED)
        follow = self.iteration_update or engine._iteration
        return follow(engine, attacked)  # type: ignore[arg-type]

    def _attacked(
        self, engine: SupervisedEvaluator | SupervisedTrainer, batchdata: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The attacked images, and their labels if the attack moves anatomy."""
        prepared = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        image, label = prepared[0], prepared[1]
        network = getattr(engine.network, "module", engine.network)  # unwrap DistributedDataParallel
        victim = engine_victim(network, engine.inferer, self.head, self.preprocessing, engine)
        # a share that is no whole number of samples is met on average
        count = int(self.share * len(image) + float(torch.rand(1, generator=self._numbers)))
        if count == 0:
            return image, None
        found = self.result = self.attack(victim, image[:count], label[:count])
        images, labels = found.image, found.label.to(label.dtype)
        if count < len(image):
            images = torch.cat([plain_tensor(images), plain_tensor(image[count:])])
            labels = torch.cat([labels, plain_tensor(label[count:])])
        return _with_meta(images, image), _with_meta(labels, label) if self.attack.moves_voxels else None


class AttackEvaluator(SupervisedEvaluator):
    """A ``SupervisedEvaluator`` that gives clean and adversarial output in one pass, paired by construction.

    ``engine.state.output`` holds ``image`` and ``pred`` of the adversarial pass, ``label``, and the keys of
    :class:`AttackKeys`: the clean image and logits, success and score of each sample.

    Args:
        *args: see ``monai.engines.SupervisedEvaluator``.
        attack: an attack, or its options.
        head: head of the network.
        preprocessing: see :class:`AttackIteration`; the clean pass gets it too.
        **kwargs: see ``monai.engines.SupervisedEvaluator``; ``iteration_update`` is taken.
    """

    def __init__(
        self,
        *args: Any,
        attack: Attack | Mapping[str, Any],
        head: str | Head = "softmax",
        preprocessing: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("iteration_update") is not None:
            raise ConfigError("AttackEvaluator has its own iteration; use SupervisedEvaluator with AttackIteration")
        self.attack = attack if isinstance(attack, Attack) else create(**attack)
        self.head = head
        self.preprocessing = preprocessing
        kwargs["iteration_update"] = self._attack_iteration
        super().__init__(*args, **kwargs)

    def _attack_iteration(self, engine: Engine, batchdata: dict[str, Tensor]) -> dict[str, Tensor]:
        assert engine is self
        prepared = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        image, label = prepared[0], prepared[1]
        victim = engine_victim(self.network, self.inferer, self.head, self.preprocessing, self)
        self.fire_event(IterationEvents.INNER_ITERATION_STARTED)
        result = self.attack(victim, image, label)
        self.fire_event(IterationEvents.INNER_ITERATION_COMPLETED)
        with torch.no_grad():
            clean, adversarial = victim(image), victim(result.image)
        output = {
            CommonKeys.IMAGE: result.image,
            CommonKeys.LABEL: _with_meta(result.label, label) if self.attack.moves_voxels else label,
            CommonKeys.PRED: _with_meta(adversarial, image),
            AttackKeys.CLEAN_IMAGE: image,
            AttackKeys.CLEAN_PRED: _with_meta(clean, image),
            AttackKeys.SUCCESS: result.success,
            AttackKeys.SCORE: result.score,
        }
        self.state.output = output
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return output


def engine_victim(
    network: nn.Module,
    inferer: Inferer,
    head: str | Head,
    preprocessing: Callable[[Tensor], Tensor] | None,
    engine: SupervisedEvaluator | SupervisedTrainer,
) -> Victim:
    """The victim that an engine evaluates: its network through its inferer, under its autocast."""
    if engine.amp:
        arguments = {"device_type": torch.device(engine.state.device).type, **engine.amp_kwargs}
        network = _Autocast(network, arguments)
    return Victim(network, differentiable(inferer), head, preprocessing)


class _Autocast(nn.Module):
    """A network under autocast whose logits come back in float32, so that the loss is summed exactly."""

    def __init__(self, network: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.arguments = arguments

    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast(**self.arguments):
            return self.network(image).float()


def _with_meta(data: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, MetaTensor):
        data = plain_tensor(data)
        return MetaTensor(data, meta=like.meta, applied_operations=like.applied_operations)
    return data
