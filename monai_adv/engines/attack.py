"""Attacks inside MONAI workflows: one slot for evaluators, trainers and bundles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from monai.networks import eval_mode
from monai.utils import CommonKeys
from torch import Tensor, distributed, nn

from monai_adv.attacks import Attack, AttackResult, create
from monai_adv.data.meta import like, plain
from monai_adv.errors import ConfigError
from monai_adv.inferers import differentiable
from monai_adv.victims import Head, Victim


class AttackKeys:
    """Keys that :class:`AttackEvaluator` adds to ``engine.state.output`` beside MONAI's ``CommonKeys``."""

    CLEAN_IMAGE = "clean_image"
    CLEAN_PRED = "clean_pred"
    SUCCESS = "attack_success"
    SCORE = "attack_score"


class AttackIteration:
    """An ``iteration_update`` that attacks the batch and then runs the engine's own iteration on it.

    In an evaluator ``engine.state.output`` is the adversarial pass and ``engine.state.batch`` keeps the clean batch;
    in a trainer the step is taken on the attacked batch: adversarial training, with new random numbers for every batch
    (an evaluator begins every batch with the attack's seed). The network, inferer, device and autocast are the
    engine's; a plain ``SlidingWindowInferer`` is given exact gradients on the way, and of a network in
    ``DistributedDataParallel`` the module inside is attacked. A batch without a label needs an attack with
    ``label_source="prediction"``.

    Args:
        attack: an attack, or ``{"name": ..., **options}`` for :func:`monai_adv.attacks.create`.
        head: head of the engine's network.
        iteration_update: what runs on the attacked batch; the engine's own ``_iteration`` if None.
        share: share of the samples to attack, from the front of each batch, on average; 1 in an evaluator.
        image_key: key of the image in the batch dictionary.
        label_key: key of the label, which moves with the image where the attack moves anatomy.
        preprocessing: what the network needs in front of it, where the batch is not yet normalised: the attack sees
            the batch's units, and attack and iteration both run it in front of the inferer.
        refine: what cleans the discrete prediction when it is scored, see :class:`monai_adv.victims.Victim`: the attack
            is judged by it, and in an evaluator ``pred`` is refined; a trainer's step never is.
        defend: the deployed victim of the engine's network, e.g. ``functools.partial(smoothed, sigma=0.25,
            samples=20)`` or ``lambda victim: purified(victim, Purify("median"))``. Attack and iteration both go through
            it; in an evaluator ``pred`` holds :meth:`monai_adv.victims.Victim.predict_logits` of what is deployed.

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
        refine: Callable[[Tensor], Tensor] | None = None,
        defend: Callable[[Victim], Victim] | None = None,
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
        self.refine = refine
        self.defend = defend
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
        if not torch.equal(plain(prepared_batch(engine, attacked)[0]), plain(image)):
            raise ConfigError(
                f"prepare_batch does not hand over the image it finds under {self.image_key!r} unchanged: the network "
                "would not see the attacked one. Name its key as image_key, and move what changes the image into the "
                "transforms or into preprocessing"
            )
        follow = self.iteration_update or engine._iteration
        inferer = engine.inferer
        if any(part is not None for part in (self.preprocessing, self.refine, self.defend)):
            engine.inferer = _Deployed(self, engine)
        try:
            return follow(engine, attacked)  # type: ignore[arg-type]
        finally:
            engine.inferer = inferer

    def _attacked(
        self, engine: SupervisedEvaluator | SupervisedTrainer, batchdata: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The attacked images, and their labels if the attack moves anatomy."""
        image, label = prepared_batch(engine, batchdata)
        # MONAI's own iteration casts on CUDA devices only
        amp = engine.amp and torch.device(engine.state.device).type == "cuda"
        victim = engine_victim(engine, self.head, self.preprocessing, amp, self.refine, self.defend)
        if victim.random:
            victim.reseed(self.seed_of_noise(engine))
        # a share that is no whole number of samples is met on average
        count = int(self.share * len(image) + float(torch.rand(1, generator=self._numbers)))
        if count == 0:
            return image, None
        part, truth = (
            (image, label) if count == len(image) else (image[:count], None if label is None else label[:count])
        )
        numbers = self._numbers if isinstance(engine, SupervisedTrainer) else None
        found = self.result = self.attack(victim, part, truth, generator=numbers)
        images = found.image
        if count < len(image):
            images = torch.cat([plain(images), plain(image[count:])])
        if label is None or not self.attack.moves_voxels:
            return like(images, image), None
        labels = torch.cat([found.label.to(label.dtype), plain(label[count:])])
        return like(images, image), like(labels, label)

    def seed_of_noise(self, engine: Engine) -> int:
        """Seed of a random victim: an evaluator begins every batch with the attack's own, a trainer draws one."""
        if isinstance(engine, SupervisedTrainer):
            return int(torch.randint(2**31, (1,), generator=self._numbers))
        return self.attack.seed


class AttackEvaluator(SupervisedEvaluator):
    """A ``SupervisedEvaluator`` that gives clean and adversarial output in one pass, paired by construction.

    ``engine.state.output`` holds ``image`` and ``pred`` of the adversarial pass, ``label``, and the keys of
    :class:`AttackKeys`: the clean image and logits, success and score of each sample. Both logits are of what is
    deployed: :meth:`monai_adv.victims.Victim.predict_logits`.

    Args:
        *args: see ``monai.engines.SupervisedEvaluator``.
        attack: an attack, or its options.
        head: head of the network.
        preprocessing: see :class:`AttackIteration`; the clean pass gets it too.
        refine: see :class:`AttackIteration`; both predictions are refined.
        defend: see :class:`AttackIteration`; both passes go through it.
        **kwargs: see ``monai.engines.SupervisedEvaluator``; ``iteration_update`` is taken.
    """

    def __init__(
        self,
        *args: Any,
        attack: Attack | Mapping[str, Any],
        head: str | Head = "softmax",
        preprocessing: Callable[[Tensor], Tensor] | None = None,
        refine: Callable[[Tensor], Tensor] | None = None,
        defend: Callable[[Victim], Victim] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("iteration_update") is not None:
            raise ConfigError("AttackEvaluator has its own iteration; use SupervisedEvaluator with AttackIteration")
        self.attack = attack if isinstance(attack, Attack) else create(**attack)
        self.head = head
        self.preprocessing = preprocessing
        self.refine = refine
        self.defend = defend
        kwargs["iteration_update"] = self._attack_iteration
        super().__init__(*args, **kwargs)
        if self.mode is not eval_mode:
            raise ConfigError("AttackEvaluator evaluates the network in evaluation mode; leave mode='eval'")

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Attack and evaluate every batch.

        Raises:
            ConfigError: of several processes this one has no batch; MONAI would skip it and the others would wait.
        """
        if self.state.epoch_length == 0 and distributed.is_available() and distributed.is_initialized():
            raise ConfigError(f"process {self.state.rank} has no case: start no more processes than there are cases")
        super().run(global_epoch)

    def _attack_iteration(self, engine: Engine, batchdata: dict[str, Tensor]) -> Any:
        assert engine is self
        image, label = prepared_batch(self, batchdata)
        victim = engine_victim(self, self.head, self.preprocessing, self.amp, self.refine, self.defend)
        victim.reseed(self.attack.seed)
        self.fire_event(IterationEvents.INNER_ITERATION_STARTED)
        result = self.attack(victim, image, label)
        self.fire_event(IterationEvents.INNER_ITERATION_COMPLETED)
        clean, adversarial = victim.predict_logits(image), victim.predict_logits(result.image)
        output = {
            CommonKeys.IMAGE: result.image,
            CommonKeys.LABEL: like(result.label, label) if label is not None and self.attack.moves_voxels else label,
            CommonKeys.PRED: like(adversarial, image),
            AttackKeys.CLEAN_IMAGE: image,
            AttackKeys.CLEAN_PRED: like(clean, image),
            AttackKeys.SUCCESS: result.success,
            AttackKeys.SCORE: result.score,
        }
        self.state.output = output
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output  # decollated and post-processed by now


def prepared_batch(
    engine: SupervisedEvaluator | SupervisedTrainer, batchdata: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Image and label as the engine's ``prepare_batch`` gives them, on its device.

    Raises:
        ConfigError: there are arguments for the inferer too, which an attack cannot pass on.
    """
    prepared = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
    if not isinstance(prepared, (tuple, list)) or any(prepared[2:]):
        raise ConfigError("an attack needs a prepare_batch that returns image and label, and nothing for the inferer")
    return prepared[0], prepared[1]


def engine_victim(
    engine: SupervisedEvaluator | SupervisedTrainer,
    head: str | Head,
    preprocessing: Callable[[Tensor], Tensor] | None,
    amp: bool,
    refine: Callable[[Tensor], Tensor] | None = None,
    defend: Callable[[Victim], Victim] | None = None,
) -> Victim:
    """The victim that an engine evaluates: its network through its inferer, under autocast if it asks for it."""
    network = engine.network
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module  # its forward waits for the other processes, whose batches may be fewer
    if amp:
        arguments = {"device_type": torch.device(engine.state.device).type, **engine.amp_kwargs}
        network = _Autocast(network, arguments)
    victim = Victim(network, differentiable(engine.inferer), head, preprocessing, refine=refine)
    return victim if defend is None else defend(victim)


class _Deployed(Inferer):
    """An engine's inferer with the rest of the victim around it, for the iteration that knows none.

    In an evaluator its logits are those of what is deployed. In a trainer they are those of a pass, unguarded: the
    network keeps its mode and the gradient its way to the weights; of several outputs the first one is given.
    """

    def __init__(self, iteration: AttackIteration, engine: SupervisedEvaluator | SupervisedTrainer) -> None:
        self.iteration = iteration
        self.engine = engine
        self.inferer = engine.inferer

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert isinstance(network, nn.Module)
        own = self.iteration
        victim = Victim(network, self.inferer, own.head, own.preprocessing, refine=own.refine)
        victim = victim if own.defend is None else own.defend(victim)
        image, affine = plain(inputs), getattr(inputs, "affine", None)
        decided = victim.random or victim.refine is not None  # then a pass does not say what is deployed
        if decided and isinstance(self.engine, SupervisedEvaluator):
            return like(victim.predict_logits(image, affine), inputs)
        if victim.random:
            victim.reseed(own.seed_of_noise(self.engine))
        return like(victim._forward(image, affine), inputs)


class _Autocast(nn.Module):
    """A network under autocast whose logits come back in float32, so that the loss is summed exactly."""

    def __init__(self, network: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.arguments = arguments

    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast(**self.arguments):
            return self.network(image).float()
