"""Information dropped in the frequency domain: VAFA, and the block cosine transform it works in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import fft, ndimage
from torch import Tensor

from monai_adv.attacks.base import Attack, positive
from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses import AttackLoss
from monai_adv.threats import Threat

_LEVELS = 255.0  # the quantisation tables are made for intensities of 0 to 255
_LAST_ALPHA = 1e-20  # at the end of the annealing the soft rounding is a rounding
_SIGMA, _RADIUS = 1.5, 5  # window of SSIM, as in monai.metrics.SSIMMetric and monai_adv.metrics.image_quality
_C1, _C2 = 0.01**2, 0.03**2


class BlockDCT:
    """Orthonormal cosine transform (DCT-II) of every block of a volume or a slice, one matrix product per axis.

    Blocks are cubes that begin at the first voxel. Where the size is no multiple of the block, the last voxel is
    repeated up to the next one; an axis shorter than a block is one block of its own length, so that a slice and a
    volume of depth one agree.

    Args:
        shape: of the image, ``(B, C, *spatial)``.
        block: side of a block in voxels.
        like: a tensor with the dtype and device of the images.
    """

    def __init__(self, shape: Sequence[int], block: int, like: Tensor) -> None:
        self.batch, self.spatial = tuple(shape[:2]), tuple(shape[2:])
        self.sides = tuple(min(block, size) for size in self.spatial)
        self.counts = tuple(-(-size // side) for size, side in zip(self.spatial, self.sides))
        self._matrices = [
            torch.as_tensor(fft.dct(np.eye(side), axis=0, norm="ortho"), dtype=like.dtype, device=like.device)
            for side in self.sides
        ]
        self._axes = [3 + 2 * axis for axis in range(len(self.spatial))]

    def forward(self, image: Tensor) -> Tensor:
        """Coefficients ``(B, C, blocks, side, blocks, side, ...)`` of an image: number of blocks and side per axis."""
        for axis, (size, count, side) in enumerate(zip(self.spatial, self.counts, self.sides), start=2):
            if count * side > size:
                index = torch.arange(count * side, device=image.device).clamp_max(size - 1)
                image = image.index_select(axis, index)
        split = [n for pair in zip(self.counts, self.sides) for n in pair]
        return _along(image.reshape(*image.shape[:2], *split), self._axes, self._matrices)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """The image of the coefficients, without the padding."""
        blocks = _along(coefficients, self._axes, [matrix.T for matrix in self._matrices])
        image = blocks.reshape(*blocks.shape[:2], *(c * s for c, s in zip(self.counts, self.sides)))
        for axis, size in enumerate(self.spatial, start=2):
            image = image.narrow(axis, 0, size)
        return image

    def table(self, value: float, like: Tensor, per_block: bool, per_channel: bool) -> Tensor:
        """A table with one entry per coefficient, of the shape that multiplies :meth:`forward`'s."""
        split = [n for count, side in zip(self.counts, self.sides) for n in (count if per_block else 1, side)]
        shape = (self.batch[0], self.batch[1] if per_channel else 1, *split)
        return torch.full(shape, value, dtype=like.dtype, device=like.device)


def _along(values: Tensor, axes: Sequence[int], matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each axis by its matrix."""
    for axis, matrix in zip(axes, matrices):
        values = torch.tensordot(values, matrix, dims=([axis], [1])).movedim(-1, axis)
    return values


def soft_round(values: Tensor, alpha: float) -> Tensor:
    """Differentiable rounding ``floor u + (s tanh(k (u - floor u - .5)) + 1) / 2``, s = 1/(1 - a), k = ln(2/a - 1).

    Whole numbers stay; the smaller ``alpha``, the nearer to a rounding.

    Args:
        values: any shape.
        alpha: in (0, 1).

    Example:
        >>> round(float(soft_round(torch.tensor(0.25), 0.1)), 4)
        0.1518
    """
    scale, slope = 1 / (1 - alpha), math.log(2 / alpha - 1)
    floor = torch.floor(values)
    return floor + (scale * torch.tanh(slope * (values - floor - 0.5)) + 1) / 2


class Similarity:
    """Differentiable SSIM with a clean image, per sample, averaged over the voxels that may change.

    The map is that of ``monai.metrics.SSIMMetric`` (Gaussian window of 11 voxels, sigma 1.5) for a data range of 1;
    beyond the border the edge voxel is repeated, as :func:`monai_adv.metrics.image_quality` does. MONAI's own is
    differentiable too, but computes in float32, leaves the border out and refuses images of less than 11 voxels.

    Args:
        clean: in [0, 1], ``(B, C, *spatial)``.
        mask: voxels that count, same shape.
    """

    def __init__(self, clean: Tensor, mask: Tensor) -> None:
        self._clean, self._mask = clean, mask
        self._axes = list(range(2, clean.dim()))
        self._windows = [
            torch.as_tensor(
                ndimage.gaussian_filter1d(np.eye(size), _SIGMA, axis=0, mode="nearest", radius=_RADIUS),
                dtype=clean.dtype,
                device=clean.device,
            )
            for size in clean.shape[2:]
        ]
        self._mean = self._window(clean)
        self._square = self._window(clean * clean)

    def __call__(self, image: Tensor) -> Tensor:
        """SSIM ``(B,)`` of an image in the clean one's units."""
        mean, square = self._window(image), self._window(image * image)
        covariance = self._window(image * self._clean) - mean * self._mean
        means = mean**2 + self._mean**2
        values = (2 * mean * self._mean + _C1) / (means + _C1)
        values = values * (2 * covariance + _C2) / (square + self._square - means + _C2)
        return torch.where(self._mask, values, 0).flatten(1).sum(1) / self._mask.flatten(1).sum(1)

    def _window(self, values: Tensor) -> Tensor:
        return _along(values, self._axes, self._windows)


class VAFA(Attack):
    """Volumetric adversarial frequency attack: drops information by quantising block cosine coefficients.

    Every coefficient d of a 3D (2D) block is replaced by ``q phi(d / q)`` with a learnable table q and a soft rounding
    phi; signed steps on q ascend loss - (1 - SSIM). Nothing bounds a voxel's change but the data bounds, so the method
    runs without a norm budget (``eps`` infinite, the default); ``details`` report its L-inf norm and SSIM.

    Paper: Dice loss, 20 steps, blocks of 32, q in [5, 20 or 30] from q_max, alpha from .1 linearly to 0. The released
    code keeps a table for every block and channel of a sample; ``per_block=False`` has one for all blocks. Ours: the
    SSIM of monai_adv's own metric over the support, the last table is evaluated too, the best iterate is kept, a finite
    ``eps`` projects, and slices are never re-normalised (the released code does that; constant slices become NaN).

    Reference:
        Hanif et al., Frequency domain adversarial training for robust volumetric medical segmentation, MICCAI 2023.

    Args:
        threat: support, channels, bounds; L-inf with ``eps=inf`` for the published method.
        loss: what is ascended, per voxel, beside the similarity.
        steps: updates of the table.
        block: side of a block in voxels; an axis shorter than that is one block.
        q_min: smallest entry of the table, in steps of 1/255 of a channel's data range.
        q_max: largest entry, and the first.
        alpha: softness of the rounding at the first step.
        ssim_weight: weight of 1 - SSIM; 0 leaves it out.
        per_block: a table for every block, or one that all blocks of a sample share.
        per_channel: a table for every modality, or one for all.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "vafa"
    reference: ClassVar[str] = "Hanif et al. 2023"
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    default_eps: ClassVar[tuple[float, ...] | None] = (math.inf,)

    def __init__(
        self,
        threat: Threat,
        loss: str | AttackLoss = "dice",
        steps: int = 20,
        block: int = 32,
        q_min: float = 5.0,
        q_max: float = 20.0,
        alpha: float = 0.1,
        ssim_weight: float = 1.0,
        per_block: bool = True,
        per_channel: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, **options)
        self.steps = positive("steps", steps)
        self.block = positive("block", block)
        if not (_is_number(q_min) and _is_number(q_max) and 0 < q_min <= q_max):
            raise ConfigError(f"the table needs 0 < q_min <= q_max, got q_min {q_min!r} and q_max {q_max!r}")
        if not (_is_number(alpha) and 0 < alpha < 1):
            raise ConfigError(f"alpha must be in (0, 1), got {alpha!r}")
        if not (_is_number(ssim_weight) and ssim_weight >= 0):
            raise ConfigError(f"ssim_weight must be >= 0 and finite, got {ssim_weight!r}")
        self.q_min, self.q_max, self.alpha, self.ssim_weight = q_min, q_max, alpha, ssim_weight
        self.per_block, self.per_channel = bool(per_block), bool(per_channel)

    def _search(self, run: Run) -> None:
        axes = tuple(range(2, run.clean.dim()))
        low, high = run.clean.amin(axes, keepdim=True), run.clean.amax(axes, keepdim=True)
        span = torch.where(high > low, high - low, torch.ones_like(low))  # a constant channel stays what it is
        transform = BlockDCT(run.clean.shape, self.block, run.clean)
        coefficients = transform.forward(_LEVELS * (run.clean - low) / span)
        similarity = Similarity((run.clean - low) / span, run.ball.mask)
        voxels = _voxels(run)

        def quantised(table: Tensor, step: int) -> Tensor:
            alpha = max(self.alpha * (1 - step / self.steps), _LAST_ALPHA)
            levels = transform.inverse(table * soft_round(coefficients / table, alpha))
            return run.ball.project(low + levels * span / _LEVELS)

        table = transform.table(self.q_max, run.clean, self.per_block, self.per_channel)
        for step in range(self.steps):
            with torch.enable_grad():
                table.requires_grad_(True)
                image = quantised(table, step)
                # the chain rule in two pieces: the network's graph is gone before that of the transform is walked
                objective = (image * (run.gradient(image) / voxels)).sum()
                if self.ssim_weight:
                    objective = objective - self.ssim_weight * (1 - similarity((image - low) / span)).sum()
                gradient = torch.autograd.grad(objective, table)[0]
            table = (table.detach() + gradient.sign()).clamp(self.q_min, self.q_max)
        run.consider(quantised(table, self.steps))
        best = run.best_image
        run.details["linf"] = run.ball.size(best).tolist()
        run.details["ssim"] = similarity((best - low) / span).tolist()


def _voxels(run: Run) -> Tensor:
    """Voxels the loss is a sum over, per sample, shaped to divide images: the paper's loss is a mean."""
    flat = (-1, *[1] * (run.clean.dim() - 1))
    if run.weight is None:
        return run.clean.new_full((len(run.clean),), float(run.clean[0, 0].numel())).view(flat)
    counted = run.weight.to(run.clean.dtype).flatten(1).sum(1)
    return torch.where(counted > 0, counted, torch.ones_like(counted)).view(flat)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
