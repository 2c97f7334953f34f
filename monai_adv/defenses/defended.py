"""A defended victim that remembers the undefended one, so that unaware and adaptive attacks can be told apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_adv.attacks import Attack, create
from monai_adv.errors import ConfigError
from monai_adv.inferers import spread_windows
from monai_adv.victims import Victim


class DefendedVictim(Victim):
    """A victim with a defense in front of its network.

    An attack on it is adaptive: it goes through the defense. The unaware attack is crafted on ``undefended`` and scored
    on this victim; see :func:`unaware`. A defense shown under the second alone is NOT ADAPTIVE, an upper bound.

    Args:
        victim: the pipeline to defend; one that is defended already keeps both defenses.
        preprocessing: what takes the place of its preprocessing.
        name: how tables call it.

    Attributes:
        undefended: the pipeline without any defense.
    """

    def __init__(self, victim: Victim, preprocessing: Callable[[Tensor], Tensor], name: str) -> None:
        super().__init__(
            victim.network,
            inferer=victim.inferer,
            head=victim.head,
            preprocessing=preprocessing,
            postprocessing=victim.postprocessing,
            name=name,
            refine=victim.refine,
        )
        self.undefended: Victim = victim.undefended if isinstance(victim, DefendedVictim) else victim

    def resampled(self, spacing: Sequence[float], working_spacing: Sequence[float]) -> Victim:
        """See :meth:`monai_adv.victims.Victim.resampled`; the undefended victim is resampled too."""
        other = copy.copy(self)
        other.inferer = super().resampled(spacing, working_spacing).inferer
        other.undefended = self.undefended.resampled(spacing, working_spacing)
        return other

    def distributed(self, process_group: torch.distributed.ProcessGroup | None = None) -> Victim:
        """See :meth:`monai_adv.victims.Victim.distributed`; the undefended victim is spread too."""
        other = copy.copy(self)
        other.inferer = spread_windows(self.inferer, process_group)
        other.undefended = self.undefended.distributed(process_group)
        return other


class Composed(nn.Module):
    """A step before a victim's own preprocessing, with the protocol of both.

    Args:
        step: ``(B, C, *spatial)`` to the same shape; it is called with ``affine=`` if it has a true attribute
            ``reads_affine``.
        inner: the victim's preprocessing, or None.
    """

    def __init__(self, step: Callable[..., Tensor], inner: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.step = step  # of these nn.Module registers what is a module: modes and buffers are then protected
        self.inner = inner

    @property
    def changes_grid(self) -> bool:
        """Whether the victim's own preprocessing brings images to a grid of its own."""
        return bool(getattr(self.inner, "changes_grid", False))

    @property
    def random(self) -> bool:
        """Whether one of the two draws random numbers."""
        return any(bool(getattr(part, "random", False)) for part in (self.step, self.inner))

    def reseed(self, seed: int) -> None:
        """Start the random numbers of both anew."""
        for part in (self.step, self.inner):
            rule = getattr(part, "reseed", None)
            if rule is not None:
                rule(seed)

    def forward(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """The network's input, see :meth:`prepare`."""
        return self.prepare(image, affine)[0]

    def prepare(self, image: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The network's input, and the way back for its logits: the victim's own, or none."""
        return prepared(self.inner, self.filtered(image, affine), affine)

    def filtered(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """The image after the step alone."""
        return self.step(image, affine=affine) if getattr(self.step, "reads_affine", False) else self.step(image)

    def gradient_support(self, image: Tensor, support: Tensor) -> Tensor:
        """Where the gradient of the output is needed for that of the image on ``support``.

        Args:
            image: ``(B, C, *spatial)``.
            support: same shape, bool.
        """
        own = getattr(self.step, "gradient_support", None)
        needed = torch.ones_like(support) if own is None else own(image, support)
        if self.inner is None:
            return needed
        rule = getattr(self.inner, "gradient_support", None)
        if rule is None or bool(needed.all()):
            return torch.ones_like(support)
        with torch.no_grad():
            # of the filtered image the rules read which voxels are zero: those of the image, for a filter with a rule
            return rule(image, needed)


def prepared(
    preprocessing: Callable[[Tensor], Tensor] | None, image: Tensor, affine: Tensor | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The network's input of an image by a preprocessing of any kind, and the way back for its logits."""
    prepare = getattr(preprocessing, "prepare", None)
    if prepare is not None:
        return prepare(image, affine)
    return (image if preprocessing is None else preprocessing(image)), _same


def unaware(attack: str | Mapping[str, Any], defended: Victim, **options: Any) -> Attack:
    """The attack that does not know of a defense: crafted on the undefended victim, scored on the one it is called on.

    It is the attack "transfer" with the undefended victim as its surrogate.

    Args:
        attack: what crafts: a name, or ``{"name": ..., **options}``.
        defended: a victim with an attribute ``undefended``.
        **options: see :func:`monai_adv.attacks.create`: ``eps``, ``units``, ``norm`` ...

    Raises:
        ConfigError: if the victim remembers no undefended one.

    Example:
        >>> from monai_adv.defenses import Purify, purified
        >>> defended = purified(Victim(nn.Conv3d(4, 4, 1)), Purify("median"))
        >>> unaware("pgd", defended, eps=0.1).surrogate is defended.undefended
        True
    """
    surrogate = getattr(defended, "undefended", None)
    if not isinstance(surrogate, Victim):
        raise ConfigError(f"{defended!r} does not say what it is without its defense: craft with attacks.Transfer")
    return create("transfer", surrogate=surrogate, attack=attack, **options)


def _same(logits: Tensor) -> Tensor:
    return logits
