"""Adversarial images for training: the end of a search rather than its best iterate, and no pass more than its steps.

An evaluation keeps the image with the lowest Dice and scores every iterate; training wants the point where the search
ends (Madry et al. 2018), and pays K forward and backward passes for K steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from monai_adv.attacks import FGSM, IFGSM, Attack, Noise, Run
from monai_adv.data.meta import plain
from monai_adv.errors import ConfigError
from monai_adv.threats import Ball, Threat
from monai_adv.victims import Victim


class LastIterate(Run):
    """A run that scores nothing and keeps the image that was considered last.

    Attributes:
        last: that image.
    """

    def __init__(self, attack: Attack, victim: Victim, ball: Ball, label: Tensor, generator: Generator) -> None:
        # not the constructor of Run: its clean pass and score are what training does without
        self.attack, self.victim, self.ball, self.generator = attack, victim, ball, generator
        self.clean, self.head, self.label = ball.clean, victim.head, label
        self.weight = self.target = self.affine = None
        self.spacing = (1.0,) * (ball.clean.dim() - 2)
        self.shared, self.details, self.trace = {}, {}, []
        self._best, self._step = None, 0
        self._forwards = self._backwards = 0
        self._support_voxels = ball.clean.new_ones(len(ball.clean), dtype=torch.float64)
        self.last = ball.clean

    def consider(self, image: Tensor, **_: Any) -> dict[str, Any]:
        """Keep an image, without a pass."""
        self.last = self.ball.store(image).detach()
        return {}

    def _count_nonzero(self, gradient: Tensor) -> Tensor:
        return self._support_voxels  # nobody asks

    def _note(self, *_: Any) -> None:
        self.trace.append({"step": self._step})
        self._step += 1


def ends_where_it_stands(attack: Attack) -> bool:
    """Whether :func:`craft` can search: untargeted steps from one start, with the true label."""
    once = getattr(attack, "restarts", 1) == getattr(attack, "repeats", 1) == 1
    return isinstance(attack, (Noise, FGSM, IFGSM)) and once and not attack.targeted and attack.label_source == "truth"


def craft(
    attack: Attack,
    victim: Victim,
    image: Tensor,
    label: Tensor,
    *,
    eps: float | None = None,
    generator: Generator | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """Where an attack's search ends, in evaluation mode with frozen parameters, at K passes for K steps.

    Args:
        attack: one of the sign family (fgsm, ifgsm, pgd, mifgsm, segpgd, cospgd) or noise, from one start.
        victim: the network being trained.
        image: clean ``(B, C, *spatial)``.
        label: ``(B, 1, *spatial)`` class indices or ``(B, K, *spatial)`` bits.
        eps: budget in the threat's units; its own if None.
        generator: random numbers; seeded with the attack's seed if None.
        support: voxels that may change, ``(B, 1 or C, *spatial)``; the threat's rule if None.

    Returns:
        Adversarial images, plain, without a graph.

    Raises:
        ConfigError: for an attack that is no such search.

    Example:
        >>> from monai_adv import attacks
        >>> victim = Victim(torch.nn.Conv2d(1, 4, 1))
        >>> attack = attacks.create("pgd", eps=0.1, units="absolute", steps=2)
        >>> image, label = torch.rand(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
        >>> bool((craft(attack, victim, image, label) - image).abs().max() <= 0.1 + 1e-6)
        True
    """
    if not ends_where_it_stands(attack):
        raise ConfigError(f"{attack!r} is no search of steps from one start: call the attack itself")
    data, truth = plain(image).detach(), plain(label)
    ball = attack.threat.bind(data, None if support is None else plain(support))
    ball = ball.with_eps(attack.threat.eps if eps is None else eps)
    generator = Generator().manual_seed(attack.seed) if generator is None else generator
    with victim.attacked(ball.mask, data):
        run = LastIterate(attack, victim, ball, truth, generator)
        attack._search(run)
    return run.last


def changeable(threat: Threat, image: Tensor, support: Tensor | None = None) -> Tensor:
    """Which samples have a voxel that may change, ``(B,)`` bool: a patch beside the head has none, and stays clean."""
    if support is None and threat.support == "all":
        return torch.ones(len(image), dtype=torch.bool, device=image.device)
    mask = plain(image if support is None else support)  # any() of numbers: those that are not zero
    channels: Any = slice(None) if threat.channels is None or mask.shape[1] == 1 else list(threat.channels)
    return mask[:, channels].flatten(1).any(1)
