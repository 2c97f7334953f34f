"""Physical effects as MONAI transforms: array and dictionary, with explicit or random parameters."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform, Transform
from torch import Generator, Tensor

from monai_adv.data.meta import like, plain, spacing_of
from monai_adv.errors import ConfigError
from monai_adv.transforms.physics.effect import Effect


class PhysicalTransform(Transform):
    """A physical effect with explicit parameters on one image ``(C, *spatial)``.

    Voxel sizes come from the MetaTensor, else 1 mm. What an attack of the same effect found
    (``result.parameters``, one sample of it) makes the same image again.

    Args:
        **arguments: the effect's parameters as arrays (see :meth:`Effect.shapes`), and its options.
    """

    effect_class: ClassVar[type[Effect]]

    def __init__(self, **arguments: Any) -> None:
        known = effect_options(self.effect_class)
        options = {k: arguments.pop(k) for k in known if k in arguments}
        self.effect = self.effect_class(**options)
        self.parameters = {k: torch.as_tensor(v) for k, v in arguments.items()}

    def __call__(self, img: Tensor, support: Tensor | None = None) -> Tensor:
        """The changed image, of the type that was given.

        Args:
            img: ``(C, *spatial)``.
            support: voxels that may change, ``(1 or C, *spatial)``; the non-zero ones if None.

        Raises:
            ConfigError: if the parameters do not fit the image.
        """
        image = batch_of_one(img)
        spacing = spacing_of(img, batched=False)
        parameters = self.fitted(image, spacing)
        mask = image != 0 if support is None else plain(support)[None].bool().expand(image.shape)
        return like(self.effect.apply(image, parameters, spacing, mask)[0], img)

    def warp_label(self, label: Tensor, image: Tensor) -> Tensor:
        """A label ``(K, *spatial)`` moved as the image ``(C, *spatial)`` is, by nearest neighbour."""
        spacing = spacing_of(image, batched=False)
        parameters = self.fitted(batch_of_one(image), spacing)
        return _warp_label(self.effect, label, image, parameters, spacing)

    def fitted(self, image: Tensor, spacing: Sequence[float]) -> dict[str, Tensor]:
        """The parameters as a batch of one on the image's device, checked against it."""
        wanted = self.effect.shapes(image, spacing)
        if set(wanted) != set(self.parameters):
            raise ConfigError(
                f"{type(self).__name__} takes the parameters {', '.join(wanted)} and the options "
                f"{', '.join(effect_options(self.effect_class)) or '(none)'}; "
                f"got {', '.join(self.parameters) or 'none'}"
            )
        for name, shape in wanted.items():
            if tuple(self.parameters[name].shape) != tuple(shape):
                raise ConfigError(
                    f"{type(self).__name__}: {name} must have the shape {tuple(shape)} for an image "
                    f"{tuple(image.shape[1:])} of {tuple(spacing)} mm, got {tuple(self.parameters[name].shape)}"
                )
        return {k: v.to(image)[None] for k, v in self.parameters.items()}


class RandPhysicalTransform(RandomizableTransform):
    """A physical effect with random parameters: draws them, then is the deterministic transform.

    Args:
        prob: probability of changing an image.
        magnitude: limit of the parameters in the effect's units, or ``(low, high)`` to draw the limit from; the
            effect's default if None.
        **options: of the effect.

    Attributes:
        parameters: what was drawn last, for a replay by the deterministic twin; None if nothing was changed.
    """

    effect_class: ClassVar[type[Effect]]

    def __init__(self, prob: float = 0.1, magnitude: float | tuple[float, float] | None = None, **options: Any) -> None:
        RandomizableTransform.__init__(self, prob)
        known = effect_options(self.effect_class)
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(
                f"{type(self).__name__} has no option {', '.join(unknown)}: "
                f"it takes {', '.join(['prob', 'magnitude', *known])}"
            )
        self.effect = self.effect_class(**options)
        high = self.effect_class.default_magnitude if magnitude is None else magnitude
        low, high = high if isinstance(high, (tuple, list)) else (high, high)
        if not 0 <= low <= high:
            raise ConfigError(f"magnitude must be a number >= 0 or a pair (low, high), got {magnitude!r}")
        self.magnitude = (float(low), float(high))
        self.parameters: dict[str, Tensor] | None = None

    def randomize(self, image: Tensor) -> None:
        """Draw whether to act, the limit and the parameters for an image ``(C, *spatial)``."""
        super().randomize(None)
        self.parameters = None
        if not self._do_transform:
            return
        magnitude = float(self.R.uniform(*self.magnitude))
        generator = Generator().manual_seed(int(self.R.randint(2**31 - 1)))
        drawn = self.effect.random(batch_of_one(image), spacing_of(image, batched=False), magnitude, generator)
        self.parameters = {k: v[0] for k, v in drawn.items()}

    def __call__(self, img: Tensor, support: Tensor | None = None, randomize: bool = True) -> Tensor:
        """The changed image; see :meth:`PhysicalTransform.__call__`."""
        if randomize:
            self.randomize(img)
        if self.parameters is None:
            return img
        image, spacing = batch_of_one(img), spacing_of(img, batched=False)
        mask = image != 0 if support is None else plain(support)[None].bool().expand(image.shape)
        batch = {k: v[None] for k, v in self.parameters.items()}
        return like(self.effect.apply(image, batch, spacing, mask)[0], img)

    def warp_label(self, label: Tensor, image: Tensor) -> Tensor:
        """A label moved by the parameters drawn last."""
        if self.parameters is None:
            return label
        batch = {k: v[None] for k, v in self.parameters.items()}
        return _warp_label(self.effect, label, image, batch, spacing_of(image, batched=False))


class PhysicalTransformd(MapTransform):
    """Dictionary twin of :class:`PhysicalTransform`.

    Args:
        keys: images.
        label_keys: labels that move with the first image (nearest neighbour), for geometric effects.
        allow_missing_keys: see ``monai.transforms.MapTransform``.
        **arguments: see :class:`PhysicalTransform`.
    """

    transform_class: ClassVar[type[PhysicalTransform]]

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection = (),
        allow_missing_keys: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_keys = _keys(label_keys)
        self.transform = self.transform_class(**arguments)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        present = list(self.key_iterator(result))
        for key in self.label_keys if present else ():
            result[key] = self.transform.warp_label(result[key], result[present[0]])
        for key in present:
            result[key] = self.transform(result[key])
        return result


class RandPhysicalTransformd(RandomizableTransform, MapTransform):
    """Dictionary twin of :class:`RandPhysicalTransform`; all keys get the same parameters.

    Args:
        keys: images of one shape.
        prob: see :class:`RandPhysicalTransform`.
        magnitude: see :class:`RandPhysicalTransform`.
        label_keys: labels that move with the images (nearest neighbour), for geometric effects.
        allow_missing_keys: see ``monai.transforms.MapTransform``.
        **options: of the effect.
    """

    transform_class: ClassVar[type[RandPhysicalTransform]]

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.1,
        magnitude: float | tuple[float, float] | None = None,
        label_keys: KeysCollection = (),
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.label_keys = _keys(label_keys)
        self.transform = self.transform_class(prob, magnitude, **options)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> RandPhysicalTransformd:
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        present = list(self.key_iterator(result))
        if not present:
            return result
        self.transform.randomize(result[present[0]])
        for key in self.label_keys:
            result[key] = self.transform.warp_label(result[key], result[present[0]])
        for key in present:
            result[key] = self.transform(result[key], randomize=False)
        return result


def effect_options(effect: type[Effect]) -> list[str]:
    """Names of the options of an effect."""
    if effect.__init__ is object.__init__:
        return []
    return list(inspect.signature(effect).parameters)


def batch_of_one(image: Any) -> Tensor:
    """An image ``(C, *spatial)`` as a floating point batch; whole numbers, as scanners store them, become float32."""
    data = plain(image)
    return (data if data.is_floating_point() else data.float())[None]


def _warp_label(
    effect: Effect, label: Tensor, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float]
) -> Tensor:
    if label.shape[1:] != image.shape[1:]:
        raise ConfigError(
            f"a label {tuple(label.shape)} cannot move with an image {tuple(image.shape)}: they need one grid"
        )
    return like(effect.warp_label(plain(label)[None], parameters, spacing)[0], label)


def _keys(keys: KeysCollection) -> tuple[Hashable, ...]:
    return (keys,) if isinstance(keys, (str, bytes)) else tuple(keys)  # type: ignore[arg-type]
