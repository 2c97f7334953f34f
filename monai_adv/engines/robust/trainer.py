"""A SupervisedTrainer that trains robustly, from plain data, and goes on where its checkpoint stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.workflow import Workflow
from monai.inferers import Inferer
from torch import Tensor
from torch.utils.data import DataLoader

from monai_adv.engines.robust.methods import create_method
from monai_adv.engines.robust.step import swapped
from monai_adv.errors import ConfigError
from monai_adv.victims import Head


class RobustTrainer(SupervisedTrainer):
    """MONAI's ``SupervisedTrainer`` with a method of robust training, autocast on a CPU too, and an exact resume.

    The method is an ``iteration_update``, and works in any ``SupervisedTrainer``; what this class adds is that it is
    built from plain data, that ``amp=True`` on a CPU computes in bfloat16 (MONAI casts on CUDA devices only), and that
    the trainer's own state, saved by MONAI's ``CheckpointSaver`` as ``{"trainer": trainer, "network": network,
    "optimizer": optimizer}``, holds the method's, torch's random numbers and the gradient scaler's: training that is
    interrupted between epochs and taken up by ``CheckpointLoader`` gives the weights of an uninterrupted one. Random
    transforms keep numbers of their own: ``data_seed`` draws these anew for every epoch, which the resume repeats.

    In ``DistributedDataParallel`` the attack sees the module inside, and gradients are synchronised once per step.
    Free keeps a perturbation per process; the checkpoint of one process has that one's.

    Args:
        *args: see ``monai.engines.SupervisedTrainer``.
        method: a name of :data:`monai_adv.engines.METHODS`, ``{"name": ..., **options}`` (see
            :func:`monai_adv.engines.create_method`), an ``iteration_update``, or None for plain training.
        head: head of the network.
        data_seed: seeds the loader's transforms and generator at the start of every epoch; they run on if None.
        **kwargs: see ``monai.engines.SupervisedTrainer``; ``iteration_update`` is the method's.

    Raises:
        ConfigError: for an unknown method or option.
    """

    def __init__(
        self,
        *args: Any,
        method: str | Mapping[str, Any] | Callable[[Any, Any], Any] | None = None,
        head: str | Head = "softmax",
        data_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("iteration_update") is not None:
            raise ConfigError("a RobustTrainer takes its iteration as `method`, not as iteration_update")
        plain_data = method is None or isinstance(method, (str, Mapping))
        self.method: Any = create_method(method, head) if plain_data else method  # type: ignore[arg-type]
        kwargs["iteration_update"] = self.method
        super().__init__(*args, **kwargs)
        self.data_seed = data_seed
        if data_seed is not None:
            self.add_event_handler(Events.EPOCH_STARTED, self._seed_data)

    @property
    def casts_on_cpu(self) -> bool:
        """Whether this trainer computes in bfloat16 on a CPU."""
        return self.amp and torch.device(self.state.device).type == "cpu"

    def run(self) -> None:  # type: ignore[override]
        """Train; see MONAI's ``Trainer.run``."""
        # bfloat16 has the exponents of float32: nothing to scale on a CPU
        on_gpu = torch.device(self.state.device).type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda") if self.amp and on_gpu else None  # type: ignore[assignment]
        Workflow.run(self)

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, Tensor]) -> dict:
        if not self.casts_on_cpu:
            return super()._iteration(engine, batchdata)
        with swapped(self, inferer=_CPUAutocast(self.inferer, self.amp_kwargs)):
            return super()._iteration(engine, batchdata)

    def state_dict(self) -> Any:
        """Where the training stands: epoch and iteration, method, random numbers, gradient scaler."""
        state = super().state_dict()
        state["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state["cuda_rng"] = torch.cuda.get_rng_state_all()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        if hasattr(self.method, "state_dict"):
            state["method"] = self.method.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ConfigError: it is the checkpoint of another method.
        """
        kept = hasattr(self.method, "load_state_dict")
        if kept != ("method" in state_dict):
            raise ConfigError("this checkpoint is of another training method: resume with the method it was saved by")
        added = ("rng", "cuda_rng", "scaler", "method")
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in added})
        if "rng" in state_dict:
            torch.set_rng_state(state_dict["rng"].cpu())
        if "cuda_rng" in state_dict and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state_dict["cuda_rng"]])
        if "scaler" in state_dict and self.scaler is not None:
            self.scaler.load_state_dict(state_dict["scaler"])
        if kept:
            self.method.load_state_dict(state_dict["method"])

    def _seed_data(self, engine: Engine) -> None:
        entropy = np.random.SeedSequence((self.data_seed or 0, self.state.rank, self.state.epoch))
        seed = int(entropy.generate_state(1)[0])
        loader = self.data_loader
        transform: Any = getattr(getattr(loader, "dataset", None), "transform", None)
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(seed)
        if isinstance(loader, DataLoader):
            for owner in (loader, loader.sampler):
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(seed)


class _CPUAutocast(Inferer):
    """Inference in bfloat16 on a CPU; the logits come back in float32."""

    def __init__(self, inferer: Inferer, arguments: Mapping[str, Any]) -> None:
        self.inferer = inferer
        self.arguments = dict(arguments)

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", **self.arguments):
            return self.inferer(inputs, network, *args, **kwargs).float()
