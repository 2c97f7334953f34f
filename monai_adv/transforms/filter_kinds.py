"""The filters behind :class:`monai_adv.transforms.FilterImage`: one small class each, calling MONAI or SimpleITK."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from monai.transforms import GaussianSmooth, MedianSmooth
from torch import Tensor

from monai_adv.data.labels import as_numpy
from monai_adv.data.meta import plain
from monai_adv.errors import ConfigError

_MARGIN = 2  # empty voxels around the foreground's box, whatever the file has


class Filter(ABC):
    """Filters ``(C, *spatial)``; what it does to the background is undone by its caller."""

    differentiable: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, image: Tensor, spacing: Sequence[float]) -> Tensor:
        """The filtered image, same shape; ``spacing`` in mm per axis."""


class Gaussian(Filter):
    """MONAI's ``GaussianSmooth``; sigma in voxels, one number or one per axis."""

    differentiable = True

    def __init__(self, sigma: float | Sequence[float] = 1.0, approx: str = "erf") -> None:
        self.sigma, self.approx = sigma, approx
        for value in np.ravel(sigma):
            _above("gaussian", "sigma", float(value))
        self.smooth = GaussianSmooth(sigma=sigma, approx=approx)

    def __call__(self, image: Tensor, spacing: Sequence[float]) -> Tensor:
        return plain(self.smooth(image))  # MONAI makes a MetaTensor of it


class Median(Filter):
    """MONAI's ``MedianSmooth``; radius in voxels, one number or one per axis."""

    differentiable = True

    def __init__(self, radius: int | Sequence[int] = 1) -> None:
        self.radius = radius
        for value in np.ravel(radius):
            _whole("median", "radius", value.item(), low=0)
        self.smooth = MedianSmooth(radius=radius)

    def __call__(self, image: Tensor, spacing: Sequence[float]) -> Tensor:
        return plain(self.smooth(image))  # MONAI makes a MetaTensor of it


class BitDepthFilter(Filter):
    """2^bits equally spaced values between two percentiles of the non-zero voxels."""

    def __init__(self, bits: int = 4) -> None:
        self.bits = _whole("bit_depth", "bits", bits, high=16)

    def __call__(self, image: Tensor, spacing: Sequence[float]) -> Tensor:
        result = image.detach().clone()
        for channel in result:
            inside = channel[channel != 0]
            if not len(inside):
                continue
            low, high = (float(v) for v in np.percentile(as_numpy(inside), (0.5, 99.5)))
            step = (high - low) / (2**self.bits - 1)
            if step > 0:
                channel.copy_(((channel - low) / step).round().clamp(0, 2**self.bits - 1) * step + low)
        return result


class ItkFilter(Filter):
    """A filter of SimpleITK on every channel: on its non-zero voxels' box, in the type of the image."""

    def __call__(self, image: Tensor, spacing: Sequence[float]) -> Tensor:
        import SimpleITK as sitk  # heavy, and only these filters need it

        result = image.detach().cpu().clone()
        for channel in result:
            voxels = channel.double().numpy() if channel.dtype == torch.float64 else channel.float().numpy()
            inside = voxels != 0
            std = float(voxels[inside].std()) if inside.any() else 0.0
            if std == 0 or not np.isfinite(std):
                continue  # nothing to filter, or nothing a filter could mend
            box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(inside))
            padded = np.pad(voxels[box], _MARGIN)
            itk = sitk.GetImageFromArray(padded)
            itk.SetSpacing([float(s) for s in reversed(spacing)])  # ITK counts the axes from the last
            found = sitk.GetArrayFromImage(self.channel(sitk, itk, padded, std))
            within = tuple(slice(_MARGIN, size - _MARGIN) for size in padded.shape)
            channel[box] = torch.from_numpy(np.ascontiguousarray(found[within])).to(channel)
        return result.to(image.device)

    @abstractmethod
    def channel(self, sitk: Any, image: Any, voxels: np.ndarray, std: float) -> Any:
        """Filter one channel.

        Args:
            sitk: the module.
            image: SimpleITK image.
            voxels: its values as an array.
            std: standard deviation of its non-zero voxels.
        """

    @staticmethod
    def threads(filter_: Any) -> Any:
        """The filter, with as many threads as torch has."""
        filter_.SetNumberOfThreads(torch.get_num_threads())
        return filter_


class _Diffusion(ItkFilter):
    """Anisotropic diffusion; the conductance is relative to the mean gradient magnitude of the image."""

    name: ClassVar[str]
    longest: ClassVar[float] = math.inf  # voxel size in mm beyond which the stable step does not grow

    def __init__(self, iterations: int = 5, conductance: float = 1.0, time_step: float | None = None) -> None:
        self.iterations = _whole(self.name, "iterations", iterations)
        self.conductance = _above(self.name, "conductance", conductance)
        self.time_step = None if time_step is None else _above(self.name, "time_step", time_step)

    def channel(self, sitk: Any, image: Any, voxels: np.ndarray, std: float) -> Any:
        stable = min(*image.GetSpacing(), self.longest) / 2 ** (image.GetDimension() + 1)
        if self.time_step is not None and self.time_step > stable * (1 + 1e-6):
            raise ConfigError(
                f"filter {self.name}: a time step of {self.time_step:g} is unstable at a voxel size of "
                f"{min(image.GetSpacing()):g} mm: use at most {stable:g}, or leave it out"
            )
        run = self.threads(self.build(sitk))
        run.SetTimeStep(stable if self.time_step is None else self.time_step)
        run.SetConductanceParameter(self.conductance)
        run.SetNumberOfIterations(self.iterations)
        return run.Execute(image)

    @abstractmethod
    def build(self, sitk: Any) -> Any:
        """SimpleITK's filter."""


class GradientDiffusion(_Diffusion):
    """``GradientAnisotropicDiffusionImageFilter``."""

    name = "gradient_diffusion"

    def build(self, sitk: Any) -> Any:
        return sitk.GradientAnisotropicDiffusionImageFilter()


class CurvatureDiffusion(_Diffusion):
    """``CurvatureAnisotropicDiffusionImageFilter``."""

    name = "curvature_diffusion"
    longest = 1.0  # ITK holds this filter to 0.5 / 2^dims, whatever the voxel size

    def build(self, sitk: Any) -> Any:
        return sitk.CurvatureAnisotropicDiffusionImageFilter()


class Bilateral(ItkFilter):
    """``BilateralImageFilter``; domain in mm, range in std."""

    def __init__(self, domain_sigma: float = 1.5, range_sigma: float = 0.3) -> None:
        self.domain_sigma = _above("bilateral", "domain_sigma", domain_sigma)
        self.range_sigma = _above("bilateral", "range_sigma", range_sigma)

    def channel(self, sitk: Any, image: Any, voxels: np.ndarray, std: float) -> Any:
        run = self.threads(sitk.BilateralImageFilter())
        run.SetDomainSigma(self.domain_sigma)
        run.SetRangeSigma(self.range_sigma * std)
        return run.Execute(image)


class PatchDenoising(ItkFilter):
    """``PatchBasedDenoisingImageFilter``: non-local means over randomly drawn patches, a step at a time.

    Each iteration goes a part of the way to the weighted mean over ``samples`` patches drawn around the voxel. The
    draws depend on how the image is cut for threads: the number of parts is fixed, so that the result is too.
    """

    def __init__(
        self,
        bandwidth: float = 0.3,
        patch_radius: int = 1,
        search_sigma: float = 3.0,
        samples: int = 50,
        iterations: int = 2,
    ) -> None:
        self.bandwidth = _above("nlm", "bandwidth", bandwidth)
        self.patch_radius = _whole("nlm", "patch_radius", patch_radius)
        self.search_sigma = _above("nlm", "search_sigma", search_sigma)
        self.samples = _whole("nlm", "samples", samples)
        self.iterations = _whole("nlm", "iterations", iterations)

    def channel(self, sitk: Any, image: Any, voxels: np.ndarray, std: float) -> Any:
        run = self.threads(sitk.PatchBasedDenoisingImageFilter())
        run.SetNumberOfWorkUnits(4)
        run.SetKernelBandwidthEstimation(False)
        run.SetKernelBandwidthSigma(self.bandwidth * std)
        run.SetPatchRadius(self.patch_radius)
        run.SetSampleVariance(self.search_sigma**2)
        run.SetNumberOfSamplePatches(self.samples)
        run.SetNumberOfIterations(self.iterations)
        return run.Execute(image)


class N4(ItkFilter):
    """``N4BiasFieldCorrectionImageFilter``, estimated on every ``shrink``-th voxel, applied to all."""

    def __init__(self, shrink: int = 4, iterations: int | Sequence[int] = (50, 50, 50, 50), fwhm: float = 0.15) -> None:
        self.shrink = _whole("n4", "shrink", shrink)
        levels = [iterations] if isinstance(iterations, int) else list(iterations)
        self.iterations = [_whole("n4", "iterations", value) for value in levels]
        self.fwhm = _above("n4", "fwhm", fwhm)

    def channel(self, sitk: Any, image: Any, voxels: np.ndarray, std: float) -> Any:
        inside = voxels != 0
        if (voxels < 0).any():
            raise ConfigError(
                "filter n4 takes the logarithm of the image, which has negative voxels: put it before the "
                "normalisation, on scanner units"
            )
        mask = sitk.GetImageFromArray(inside.astype(np.uint8))
        mask.CopyInformation(image)
        # a thin axis keeps its voxels, and enough of the foreground must be left to fit a field to
        factors = [max(1, min(self.shrink, size // 8)) for size in image.GetSize()]
        small, small_mask = sitk.Shrink(image, factors), sitk.Shrink(mask, factors)
        if not sitk.GetArrayViewFromImage(small_mask).any():
            small, small_mask = image, mask
        run = self.threads(sitk.N4BiasFieldCorrectionImageFilter())
        run.SetMaximumNumberOfIterations(self.iterations)
        run.SetBiasFieldFullWidthAtHalfMaximum(self.fwhm)
        run.Execute(sitk.Cast(small, sitk.sitkFloat32), small_mask)
        field = sitk.GetArrayFromImage(run.GetLogBiasFieldAsImage(image)).astype(voxels.dtype)
        if not np.isfinite(field).all():
            raise ConfigError("filter n4 found no finite bias field: the foreground is too small for it")
        return sitk.GetImageFromArray(voxels / np.exp(field - field[inside].mean()))


KINDS: dict[str, type[Filter]] = {
    "gaussian": Gaussian,
    "median": Median,
    "bit_depth": BitDepthFilter,
    "curvature_diffusion": CurvatureDiffusion,
    "gradient_diffusion": GradientDiffusion,
    "bilateral": Bilateral,
    "nlm": PatchDenoising,
    "n4": N4,
}
"""Filters by name."""


def _above(kind: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"filter {kind}: {name} must be a number > 0, got {value!r}")
    return float(value)


def _whole(kind: str, name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    wrong = isinstance(value, bool) or not isinstance(value, int) or value < low
    if wrong or (high is not None and value > high):
        limit = f">= {low}" if high is None else f"in {low}..{high}"
        raise ConfigError(f"filter {kind}: {name} must be a whole number {limit}, got {value!r}")
    return value
