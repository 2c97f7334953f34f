"""Randomized smoothing of a segmentation network, with a certificate for every voxel that does not abstain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from monai_adv.data.meta import plain
from monai_adv.defenses.certificate import CORRECTIONS, Certificate, samples_needed
from monai_adv.defenses.defended import Composed, DefendedVictim, prepared
from monai_adv.errors import ConfigError
from monai_adv.victims import Victim

_MOST = 65535  # hits are counted in 16 bits


def certify(
    victim: Victim,
    image: Tensor,
    *,
    sigma: float,
    samples: int = 100,
    draws0: int = 100,
    tau: float = 0.75,
    alpha: float = 1e-3,
    correction: str = "holm",
    batch: int = 2,
    generator: Generator | None = None,
    affine: Tensor | None = None,
    progress: Callable[[float], Any] | None = None,
) -> Certificate:
    """Certify the segmentation of one image under Gaussian noise.

    ``draws0`` noisy passes choose each voxel's class, ``samples`` further ones count how often it comes back; a
    one-sided binomial test against tau, corrected over all voxels, says which voxels are certified. The rest abstain.
    The noise is added after the preprocessing, in its units (standard deviations after a z-score), to every voxel of
    every channel, the background too. Passes go through the victim's own inferer, way back to the image's grid and
    refinement. In memory are one batch, a count per class and voxel, and a count per voxel.

    The network should have been trained with that noise (method "noise" of the robust trainer): others abstain.

    Reference:
        Fischer et al., Scalable certified segmentation via randomized smoothing, ICML 2021.

    Args:
        victim: the pipeline; of one with noise already (:func:`smoothed`) the part before the noise.
        image: ``(1, C, *spatial)``, 2D or 3D.
        sigma: standard deviation of the noise, in units of the network's input.
        samples: draws to test, 1 to 65535.
        draws0: draws that choose the class, 1 to 65535.
        tau: probability to exceed, in [0.5, 1).
        alpha: family-wise error, in (0, 1).
        correction: "holm" or "bonferroni", over all voxels (times channels of a sigmoid head).
        batch: noisy images per call of the inferer; it changes no noise.
        generator: of the noise; seeded with 0 if None.
        affine: voxel to world, see :class:`monai_adv.victims.Victim`.
        progress: called with the share done.

    Returns:
        The :class:`Certificate`.

    Raises:
        ConfigError: for an option out of range, more than one image, or so few samples that not even a unanimous voxel
            could be certified.

    Example:
        >>> victim = Victim(torch.nn.Conv3d(4, 4, 1))
        >>> certify(victim, torch.zeros(1, 4, 4, 4, 4), sigma=0.25, samples=60, draws0=10).radius.__round__(3)
        0.169
    """
    if isinstance(victim, SmoothedVictim):
        victim = victim.denoised
    check_options(sigma, samples, draws0, tau, alpha, correction, batch)
    if image.shape[0] != 1:
        raise ConfigError(f"certify takes one image (1, C, *spatial) at a time, got {tuple(image.shape)}")
    generator = Generator().manual_seed(0) if generator is None else generator
    affine = getattr(image, "affine", None) if affine is None else affine
    data = plain(image)
    data = data if data.is_floating_point() else data.float()
    noisy = _prepared_once(victim, data, affine, sigma, generator)

    def passes(count: int, before: int) -> Iterator[NDArray[Any]]:
        """Discrete predictions ``(b, 1 or K, *spatial)`` of fresh draws, with the logits' channels in ``channels``."""
        done = 0
        while done < count:
            size = min(batch, count - done)
            with torch.no_grad():
                logits = noisy(data.expand(size, *data.shape[1:]))
                channels.append(logits.shape[1])
                yield noisy.discretise(logits).cpu().numpy()
            done += size
            if progress is not None:
                progress((before + done) / (draws0 + samples))

    channels: list[int] = []
    chosen: NDArray[np.uint16] | None = None  # per class, or per channel how often it was set
    for predictions in passes(draws0, 0):
        if chosen is None:
            shape = predictions.shape[1:]
            _enough(samples, int(np.prod(shape)), tau, alpha)
            chosen = np.zeros((channels[0], *shape[1:]), dtype=np.uint16)
        for prediction in predictions:
            if victim.head.exclusive:
                for index in range(channels[0]):
                    chosen[index] += prediction[0] == index
            else:
                chosen += prediction
    assert chosen is not None
    mode = chosen.argmax(0)[None] if victim.head.exclusive else 2 * chosen.astype(np.uint32) > draws0
    hits = np.zeros(mode.shape, dtype=np.uint16)
    for predictions in passes(samples, draws0):
        for prediction in predictions:
            hits += prediction == mode
    return Certificate(
        prediction=torch.from_numpy(mode)[None],
        hits=torch.from_numpy(hits)[None],
        foreground=(data != 0).any(1, keepdim=True).cpu(),
        head=victim.head,
        sigma=float(sigma),
        tau=float(tau),
        samples=samples,
        draws0=draws0,
        alpha=float(alpha),
        correction=correction,
    )


def input_distance(victim: Victim, image: Tensor, other: Tensor, affine: Tensor | None = None) -> Tensor:
    """L2 distance of two images where the certificate measures it: in the network's input, ``(B,)`` float64.

    Args:
        victim: the pipeline; of a smoothed one the part before the noise.
        image: ``(B, C, *spatial)``.
        other: same shape.
        affine: voxel to world, see :class:`monai_adv.victims.Victim`.

    Raises:
        ConfigError: if the preprocessing brings them to different grids.
    """
    if isinstance(victim, SmoothedVictim):
        victim = victim.denoised
    affine = getattr(image, "affine", None) if affine is None else affine
    with torch.no_grad():
        a, b = (prepared(victim.preprocessing, plain(x), affine)[0] for x in (image, other))
    if a.shape != b.shape:
        raise ConfigError(f"the preprocessing brings the images to {tuple(a.shape)} and {tuple(b.shape)}: no distance")
    return torch.linalg.vector_norm((a.double() - b.double()).flatten(1), dim=1)


class SmoothedVictim(DefendedVictim):
    """A victim with fresh Gaussian noise on the network's input in every pass; made by :func:`smoothed`.

    Called, it gives the logits of one noisy pass: attack it with ``draws=`` for the mean over passes (expectation over
    transformation). :meth:`predict` is what is deployed: the majority of ``samples`` passes. Its noise is not that of
    the passes, and starts anew in every call: the same image gets the same answer.

    Attributes:
        sigma: standard deviation of the noise, in units of the network's input.
        samples: votes of a prediction.
        denoised: the victim before the noise (with its other defenses, if it has any).
    """

    def __init__(self, victim: Victim, sigma: float, samples: int, seed: int, name: str) -> None:
        self.denoised: Victim = victim.denoised if isinstance(victim, SmoothedVictim) else victim
        generator = Generator().manual_seed(seed)
        super().__init__(self.denoised, _Noise(self.denoised.preprocessing, sigma, generator), name)
        self.sigma, self.samples = float(sigma), int(samples)
        self._votes_seed = seed + 1

    def predict(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """The majority vote of ``samples`` noisy passes: class indices or bits, see :meth:`Head.predict`.

        The first of equal classes wins; a bit is set if more than half of the passes set it.
        """
        votes = self._votes(image, affine)
        return votes.argmax(1, keepdim=True) if self.head.exclusive else 2 * votes > self.samples

    def predict_logits(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """Logits of the vote: their softmax or sigmoid is the share of the passes, with half a pass added to each side.

        The head discretises them to what :meth:`predict` gives.
        """
        votes = self._votes(image, affine).float()
        logits = torch.log(votes + 0.5)
        return logits if self.head.exclusive else logits - torch.log(self.samples - votes + 0.5)

    def _votes(self, image: Tensor, affine: Tensor | None) -> Tensor:
        """Passes that gave each class, or set each bit, ``(B, K, *spatial)`` int32."""
        affine = self._affine_of(image, affine)
        step = self.preprocessing
        assert isinstance(step, _Noise)
        own, step.generator = step.generator, Generator().manual_seed(self._votes_seed)
        try:
            with torch.no_grad():
                votes: Tensor | None = None
                for _ in range(self.samples):
                    logits = self(image, affine)
                    prediction = self.discretise(logits)
                    vote = self.head.encode(prediction, logits).to(torch.int32)
                    votes = vote if votes is None else votes + vote
        finally:
            step.generator = own
        assert votes is not None
        return votes

    def resampled(self, spacing: Any, working_spacing: Any) -> Victim:
        """See :meth:`DefendedVictim.resampled`."""
        other = super().resampled(spacing, working_spacing)
        assert isinstance(other, SmoothedVictim)
        other.denoised = self.denoised.resampled(spacing, working_spacing)
        return other


def smoothed(
    victim: Victim,
    sigma: float,
    samples: int = 1,
    *,
    seed: int = 0,
    name: str | None = None,
) -> SmoothedVictim:
    """The victim that :func:`certify` speaks of, to attack and to deploy: random passes and a majority vote.

    Args:
        victim: the pipeline, best one trained with such noise.
        sigma: standard deviation of the noise, in units of the network's input.
        samples: votes of a deployed prediction.
        seed: of the noise.
        name: how tables call it; the victim's name with " smoothed" by default.

    Raises:
        ConfigError: for an option out of range.

    Example:
        >>> victim = smoothed(Victim(torch.nn.Conv3d(4, 4, 1)), sigma=0.5, samples=5)
        >>> image = torch.zeros(1, 4, 4, 4, 4)
        >>> bool((victim(image) == victim(image)).all()), bool((victim.predict(image) == victim.predict(image)).all())
        (False, True)
    """
    check_options(sigma, samples)
    return SmoothedVictim(victim, sigma, samples, seed, name or f"{victim.name} smoothed")


class _Noise(Composed):
    """A victim's preprocessing, and Gaussian noise after it, sample by sample: a batch draws what its images would."""

    def __init__(self, inner: Callable[[Tensor], Tensor] | None, sigma: float, generator: Generator) -> None:
        super().__init__(_unchanged, inner)
        self.sigma, self.generator = float(sigma), generator

    @property
    def random(self) -> bool:
        return True

    def reseed(self, seed: int) -> None:
        super().reseed(seed)
        self.generator.manual_seed(seed)

    def prepare(self, image: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        data, back = super().prepare(image, affine)
        return data + self.sigma * self.draw(data), back

    def draw(self, data: Tensor) -> Tensor:
        """Standard normal numbers of the shape, type and device of ``data``."""
        device = self.generator.device
        drawn = [torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=device) for x in data]
        return torch.stack(drawn).to(data.device)

    def gradient_support(self, image: Tensor, support: Tensor) -> Tensor:
        if self.inner is None:
            return support
        rule = getattr(self.inner, "gradient_support", None)
        return torch.ones_like(support) if rule is None else rule(image, support)


class _Once(_Noise):
    """Noise on an input that was prepared once, whatever image it is called with."""

    def __init__(self, data: Tensor, back: Callable[[Tensor], Tensor], sigma: float, generator: Generator) -> None:
        super().__init__(None, sigma, generator)
        self.data, self.back = data, back

    def prepare(self, image: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        data = self.data.expand(len(image), *self.data.shape[1:])
        return data + self.sigma * self.draw(data), self.each_back

    def each_back(self, logits: Tensor) -> Tensor:
        """The way back of one image for each of its noisy copies."""
        return torch.cat([self.back(x[None]) for x in logits])


def _prepared_once(
    victim: Victim, data: Tensor, affine: Tensor | None, sigma: float, generator: Generator
) -> DefendedVictim:
    """The victim with the preprocessing of one image done, which may cost more than a pass, and noise after it."""
    # in the state of a pass: a preprocessing may be a module with modes and buffers
    with victim.attacked(affine=affine), torch.no_grad():
        ready, back = prepared(victim.preprocessing, data, affine)
    return DefendedVictim(victim, _Once(ready, back, sigma, generator), victim.name)


def _unchanged(image: Tensor) -> Tensor:
    return image


def check_options(
    sigma: float,
    samples: int = 100,
    draws0: int = 100,
    tau: float = 0.75,
    alpha: float = 1e-3,
    correction: str = "holm",
    batch: int = 2,
) -> None:
    """Refuse options of :func:`certify` that are out of range.

    Raises:
        ConfigError: names the option.
    """
    if not 0 < sigma < float("inf"):
        raise ConfigError(f"sigma must be a number > 0 in units of the network's input, got {sigma!r}")
    for name, value in (("samples", samples), ("draws0", draws0), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            raise ConfigError(f"{name} must be a whole number in 1..{_MOST}, got {value!r}")
    if not 0.5 <= tau < 1:
        raise ConfigError(f"tau must be in [0.5, 1): below .5 the majority is not certified, got {tau!r}")
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must be in (0, 1), got {alpha!r}")
    if correction not in CORRECTIONS:
        raise ConfigError(f"correction {correction!r} is unknown: use one of {', '.join(CORRECTIONS)}")


def _enough(samples: int, voxels: int, tau: float, alpha: float) -> None:
    needed = samples_needed(voxels, tau, alpha)
    if samples < needed:
        raise ConfigError(
            f"{samples} samples cannot certify a single one of {voxels} voxels at tau {tau:g} and alpha {alpha:g}: "
            f"take {needed} or more, more for voxels that are not unanimous"
        )
