"""Networks of the learned synthesis: a stochastic generator of smooth fields, and the critic beside it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from monai.networks.blocks import Convolution, ResidualUnit
from monai.networks.nets import PatchDiscriminator
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from monai_adv.errors import ConfigError
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.transforms.physics.effect import bspline_field, draw
from monai_adv.transforms.physics.synthesis import Synthesis

FIELDS = ("velocity", "log_bias", "residual")
"""The raw fields a generator may give, in this order."""

_LEAKY = ("leakyrelu", {"negative_slope": 0.1})
_START = 1e-2  # of the last layers: an untrained generator moves and changes next to nothing
HEAD_GAIN = 0.1  # of the heads: hundreds of weights that all take a step would drive the tanh to its ends at once
_LOG_VARIANCE = 8.0  # the code's log variance stays within +- this, so that its exponential is a number


class SynthesisGenerator(nn.Module):
    """From an image and a wanted drop of Dice to smooth fields that :class:`monai_adv.transforms.Synthesis` applies.

    A residual encoder with instance normalisation ends in the mean and the log variance of a code at every eighth
    voxel; a decoder without normalisation (which would take a constant channel away) reads features, code
    ``z = mu + sigma xi`` and wanted drop, and ends in one small head per field. The same image gives another example
    for every ``xi``. Architecture and sizes are ours; the reference publishes none.

    Reference:
        Chen et al., Intelligent image synthesis to attack a segmentation CNN using adversarial learning, SASHIMI 2019,
        https://arxiv.org/abs/1909.11167

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the image.
        channels: features at every second, fourth and eighth voxel.
        latent: channels of the code.
        effect: arguments of :class:`monai_adv.transforms.Synthesis`; a limit of 0 leaves its field out.

    Attributes:
        effect: those arguments, with the defaults filled in.
        training_info: how the weights came about, as :func:`load_generator` found it.

    Raises:
        ConfigError: for a number of dimensions, channels or limits that cannot be.

    Example:
        >>> network = SynthesisGenerator(spatial_dims=2, in_channels=1, channels=(4, 4, 8), latent=2)
        >>> fields = network(torch.rand(1, 1, 20, 33), torch.tensor([0.3]))
        >>> {name: tuple(values.shape) for name, values in fields.items() if name in FIELDS}
        {'velocity': (1, 2, 4, 5), 'log_bias': (1, 1, 4, 5), 'residual': (1, 1, 4, 5)}
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 4,
        channels: Sequence[int] = (8, 16, 32),
        latent: int = 8,
        effect: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ConfigError(f"a generator has 2 or 3 spatial_dims, got {spatial_dims!r}")
        sizes = {"in_channels": in_channels, "latent": latent, **{f"channels[{i}]": c for i, c in enumerate(channels)}}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"{name} must be an integer >= 1, got {size!r}")
        if len(channels) != 3:
            raise ConfigError(f"channels are three numbers, for every second, fourth and eighth voxel, got {channels}")
        self.spatial_dims, self.in_channels, self.latent = spatial_dims, in_channels, latent
        self.channels = tuple(channels)
        self.effect = effect_arguments(effect)
        self.training_info: dict[str, Any] = {}
        widths = (in_channels, *channels)
        self.encoder = nn.Sequential(
            *(
                ResidualUnit(spatial_dims, before, after, strides=2, subunits=min(2, level + 1), norm="INSTANCE")
                for level, (before, after) in enumerate(zip(widths, widths[1:]))
            )
        )
        width = channels[-1]
        self.code = Convolution(spatial_dims, width, 2 * latent, kernel_size=1, conv_only=True)
        self.decoder = nn.ModuleList(
            [
                Convolution(spatial_dims, width + latent + 1, width, act=_LEAKY, norm=None),
                Convolution(spatial_dims, width + 1, width, act=_LEAKY, norm=None),
            ]
        )
        limits = Synthesis(**self.effect).unit_limits()
        outputs = {"velocity": spatial_dims, "log_bias": in_channels, "residual": in_channels}
        self.heads = nn.ModuleDict(
            {
                name: Convolution(spatial_dims, width + 1, outputs[name], conv_only=True)
                for name in FIELDS
                if limits.get(name, 0) > 0
            }
        )
        for head in self.heads.values():
            convolution = cast(nn.Conv3d, head.conv)  # or that of slices
            nn.init.normal_(convolution.weight, std=_START)
            nn.init.zeros_(cast(Tensor, convolution.bias))

    def forward(
        self, image: Tensor, drop: Tensor, *, noise: Tensor | None = None, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Raw fields of an image.

        Args:
            image: ``(B, C, *spatial)`` of any scale, background exactly 0; z-scored here, per channel over its non-zero
                voxels. Axes of any length.
            drop: the drop of Dice that is wanted, ``(B,)``.
            noise: ``xi``, of the shape of ``mu``.
            generator: draws ``xi`` where ``noise`` is None; without either ``z = mu``.

        Returns:
            ``velocity`` ``(B, spatial_dims, *grid)``, ``log_bias`` and ``residual`` ``(B, C, *grid)`` in [-1, 1], those
            whose limit is not 0, on a grid of every eighth voxel (or closer) whose corners are the image's; ``mu`` and
            ``log_var`` ``(B, latent, *)`` of the code.

        Raises:
            ConfigError: if image, drop or noise have another shape.
        """
        if image.dim() != self.spatial_dims + 2 or image.shape[1] != self.in_channels:
            raise ConfigError(
                f"this generator takes images (B, {self.in_channels}, {'x'.join('N' * self.spatial_dims)}), "
                f"got {tuple(image.shape)}"
            )
        if tuple(drop.shape) != (len(image),):
            raise ConfigError(f"{len(image)} images need a drop each, shape ({len(image)},), got {tuple(drop.shape)}")
        spatial = image.shape[2:]
        weight = next(self.parameters())
        data = NormalizeNonzeroBatch()(image).to(weight)
        features = self.encoder(functional.pad(data, _padding(spatial)))
        mu, log_var = self.code(features).chunk(2, dim=1)
        log_var = _LOG_VARIANCE * torch.tanh(log_var / _LOG_VARIANCE)
        code = mu
        if noise is None and generator is not None:
            noise = draw(mu.shape, generator, mu, "normal")
        if noise is not None:
            if noise.shape != mu.shape:
                raise ConfigError(f"the noise of this image has shape {tuple(mu.shape)}, got {tuple(noise.shape)}")
            code = mu + (log_var / 2).exp() * noise.to(mu)
        wanted = drop.to(mu).view(-1, 1, *[1] * self.spatial_dims).expand(-1, 1, *mu.shape[2:])
        hidden = torch.cat([features, code], dim=1)
        for layer in self.decoder:
            hidden = layer(torch.cat([hidden, wanted], dim=1))
        hidden = torch.cat([hidden, wanted], dim=1)
        corners = [_to_corners(n, mu) for n in spatial]
        raw = {name: bspline_field(torch.tanh(HEAD_GAIN * head(hidden)), corners) for name, head in self.heads.items()}
        return {**raw, "mu": mu, "log_var": log_var}

    def config(self) -> dict[str, Any]:
        """The arguments that build this generator again, plain data."""
        return {
            "spatial_dims": self.spatial_dims,
            "in_channels": self.in_channels,
            "channels": list(self.channels),
            "latent": self.latent,
            "effect": dict(self.effect),
        }


class SynthesisCritic(nn.Module):
    """Tells real from synthetic images patch by patch: MONAI's ``PatchDiscriminator`` with spectral normalisation.

    It sees images z-scored over their foreground, so that the scale of the scanner tells nothing. Spectral
    normalisation bounds its slope, which keeps the training stable without a gradient penalty; it has no other
    normalisation, which batches of one would not bear.

    Reference:
        Miyato et al., Spectral normalization for generative adversarial networks, ICLR 2018.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the image.
        channels: features of the first layer, doubled in every following one.
        layers: convolutions after the first; the last of them keeps the size, the others halve it as the first does.

    Example:
        >>> SynthesisCritic(spatial_dims=2, in_channels=1, channels=4)(torch.rand(1, 1, 16, 16)).shape
        torch.Size([1, 1, 4, 4])
    """

    def __init__(self, spatial_dims: int = 3, in_channels: int = 4, channels: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.network = PatchDiscriminator(
            spatial_dims, channels, in_channels, num_layers_d=layers, kernel_size=3, norm=None, bias=True  # type: ignore[arg-type]
        )  # fmt: skip
        for module in list(self.network.modules()):
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                spectral_norm(module)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, 1, *patches)`` of images ``(B, C, *spatial)``, high for real ones; background exactly 0."""
        return self.network(NormalizeNonzeroBatch()(image))[-1]


def effect_arguments(effect: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of :class:`monai_adv.transforms.Synthesis` with its defaults filled in: later ones change nothing.

    Raises:
        ConfigError: for an argument it does not have, or a value it does not take.
    """
    defaults = {name: p.default for name, p in inspect.signature(Synthesis).parameters.items()}
    unknown = sorted(set(effect or {}) - set(defaults))
    if unknown:
        raise ConfigError(f"the effect has no {', '.join(unknown)}: use {', '.join(defaults)}")
    arguments = {**defaults, **(effect or {})}
    Synthesis(**arguments)
    return arguments


def _padding(spatial: Sequence[int]) -> list[int]:
    """Zeros after the image, last axis first: three strides of two then put a feature on every eighth voxel and one on
    either end (``8 k + 1`` voxels), and at least two along every axis, which instance normalisation needs."""
    return [p for n in reversed(spatial) for p in (0, 8 * _cells(n) + 1 - n)]


def _cells(size: int) -> int:
    return max(1, -(-(size - 1) // 8))


def _to_corners(size: int, like: Tensor) -> Tensor:
    """Linear interpolation along one axis from features on every eighth voxel to as many points between its ends.

    The padding would shift and stretch the fields otherwise.
    """
    cells = _cells(size)
    place = torch.linspace(0, (size - 1) / 8, cells + 1, dtype=torch.float64).view(-1, 1)
    weight = (1 - (place - torch.arange(cells + 1)).abs()).clamp_min(0)
    return weight.to(like)
