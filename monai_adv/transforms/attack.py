"""An attack as a MONAI transform, for plain pipelines and for exporting adversarial images.

The attack is handed in, not imported: anything with the call ``attack(victim, image, label) -> result`` fits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from monai.transforms import MapTransform, RandomizableTransform
from torch import Generator, Tensor

from monai_adv.data.meta import like, plain


class Attackd(MapTransform):
    """Replace an image by its adversarial version; affine, meta and applied operations are kept.

    The label is replaced too where the attack moves anatomy (deformation, affine). ``Invertd`` and ``SaveImaged`` work
    behind it: it leaves no trail, and what stood before it is inverted as if it were not there.

    It attacks in the thread or process that loads the data: with ``DataLoader(num_workers=0)``, with
    ``ThreadDataLoader`` if nobody else uses the victim at the same time (a network in training needs a copy,
    ``copy.deepcopy``, because an attack freezes it for its duration), and in worker processes on a CPU, where each
    has its own copy of the victim. In a trainer :class:`monai_adv.engines.AttackIteration` attacks the network as it
    is now.

    Args:
        attack: e.g. ``attacks.create("pgd", eps=0.1)``.
        victim: the :class:`monai_adv.victims.Victim` to fool.
        image_key: key of the image ``(C, *spatial)``.
        label_key: key of the label, ``(1, *spatial)`` class indices or ``(K, *spatial)`` bits; None attacks the
            victim's own prediction, which the attack must be made for (``label_source="prediction"``).
        support_key: key of a mask ``(1 or C, *spatial)`` of the voxels that may change; the threat's rule if None.
        clean_key: keep the clean image under this key.
    """

    def __init__(
        self,
        attack: Callable[..., Any],
        victim: Any,
        image_key: str = "image",
        label_key: str | None = "label",
        support_key: str | None = None,
        clean_key: str | None = None,
    ) -> None:
        super().__init__([image_key])
        self.attack = attack
        self.victim = victim
        self.image_key = image_key
        self.label_key = label_key
        self.support_key = support_key
        self.clean_key = clean_key

    def __call__(self, data: Mapping[Hashable, Any], generator: Generator | None = None) -> dict[Hashable, Any]:
        """Attack one sample.

        Args:
            data: dictionary with image and label.
            generator: random numbers of the attack; its own seed if None.
        """
        result = dict(data)
        image = result[self.image_key]
        label = None if self.label_key is None else _batch(result[self.label_key])
        support = None if self.support_key is None else _batch(result[self.support_key])
        batch = like(_batch(image), image)  # with its affine: some attacks ask for the voxel size
        found = self.attack(self.victim, batch, label, support=support, generator=generator)
        adversarial = like(plain(found.image)[0], image)
        if self.clean_key is not None:
            result[self.clean_key] = image
        result[self.image_key] = adversarial
        if self.label_key is not None and getattr(self.attack, "moves_voxels", False):
            label = result[self.label_key]
            result[self.label_key] = like(found.label[0].to(plain(label).dtype), label)
        return result


class RandAttackd(RandomizableTransform, Attackd):
    """:class:`Attackd` with a probability: adversarial augmentation inside a ``Compose``.

    Args:
        attack: see :class:`Attackd`, as the other arguments.
        victim: the victim.
        prob: probability of attacking a sample.
        image_key: key of the image.
        label_key: key of the label.
        support_key: key of the mask.
        clean_key: keep the clean image under this key.
    """

    def __init__(
        self,
        attack: Callable[..., Any],
        victim: Any,
        prob: float = 0.5,
        image_key: str = "image",
        label_key: str | None = "label",
        support_key: str | None = None,
        clean_key: str | None = None,
    ) -> None:
        RandomizableTransform.__init__(self, prob)
        Attackd.__init__(self, attack, victim, image_key, label_key, support_key, clean_key)

    def __call__(self, data: Mapping[Hashable, Any], generator: Generator | None = None) -> dict[Hashable, Any]:
        self.randomize(None)
        if not self._do_transform:
            result = dict(data)
            if self.clean_key is not None:
                result[self.clean_key] = result[self.image_key]
            return result
        # one number of the transform's own state seeds the attack, so that set_random_state replays it
        seed = int(self.R.randint(2**31 - 1))
        return super().__call__(data, generator or Generator().manual_seed(seed))


def _batch(data: Any) -> Tensor:
    return plain(data)[None]
