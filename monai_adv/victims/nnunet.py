"""nnU-Net v2 as a victim: its plans, its preprocessing and its mirroring around a network, all differentiable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from monai_adv.data.meta import plain, voxel_size
from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.victims.head import Head
from monai_adv.victims.naming import head_of_classes, region
from monai_adv.victims.nnunet_network import dynunet
from monai_adv.victims.tta import MirrorInferer
from monai_adv.victims.victim import Victim
from monai_adv.victims.weights import read_checkpoint_file, state_dict_of

Plain = Mapping[str, Any] | str | Path
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
SCHEMES = ("ZScoreNormalization", "CTNormalization", "NoNormalization")


def nnunet_victim(
    plans: Plain,
    network: nn.Module | Plain,
    *,
    dataset: Plain | None = None,
    mirror: bool | Sequence[int] = True,
    configuration: str = "3d_fullres",
    sw_batch_size: int = 1,
    keep_windows: int | str = "auto",
    device: str | torch.device = "cpu",
    name: str = "nnU-Net",
) -> Victim:
    """A victim that deploys a network as nnU-Net v2 does, with an exact gradient from logits to scanner units.

    nnU-Net's own, from its plans: the order of axes, the crop to the non-zero voxels, normalisation per channel (over
    the filled non-zero mask where the plans say so), windows of the patch size with Gaussian weights and steps of half
    a window, mirroring along the axes the checkpoint allows (logits averaged), regions and their class order.
    Approximated: resampling to the plans' spacing is linear where nnU-Net's is cubic (and only done where an affine is
    known); windows lie on MONAI's grid (fixed steps, the last one moved inwards) where nnU-Net spreads them evenly;
    MONAI's Gaussian weights. Not done: cascades, ensembles of folds, its own post-processing files (give ``refine`` to
    a :class:`Victim`).

    Reference:
        Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation,
        Nature Methods 2021.

    Args:
        plans: ``plans.json`` (nnUNetPlans.json) or its content.
        network: the trained torch module; or a checkpoint (file, its content, or a state dict) of a ``PlainConvUNet``,
            whose weights go into MONAI's ``DynUNet`` of the plans' kernels, strides and features.
        dataset: ``dataset.json`` or its content; the file beside the plans if None.
        mirror: True mirrors along the axes that the checkpoint allows (all, where it does not say), False not at all;
            or the spatial axes, in the network's order.
        configuration: which of the plans' configurations.
        sw_batch_size: windows per forward.
        keep_windows: see :class:`monai_adv.inferers.GradientSlidingWindowInferer`.
        device: where it runs.
        name: how tables call it.

    Raises:
        ConfigError: if plans or dataset are not nnU-Net's, or ask for what is not done here.
        CheckpointError: if the weights cannot be read without executing them, or do not fit.
    """
    where = Path(plans).parent if isinstance(plans, (str, Path)) else None
    content = _plain_data(plans, "plans")
    if dataset is None:
        if where is None or not (where / "dataset.json").is_file():
            raise ConfigError("no dataset.json beside the plans: give it as dataset=, it says labels and channels")
        dataset = where / "dataset.json"
    described = _plain_data(dataset, "dataset")
    settings = _configuration(content, configuration)
    names = described.get("channel_names") or described.get("modality") or {}
    head, refine, outputs = _labels(described)
    allowed: Any = None
    if not isinstance(network, nn.Module):
        checkpoint = read_checkpoint_file(network) if isinstance(network, (str, Path)) else network
        allowed = checkpoint.get("inference_allowed_mirroring_axes") if isinstance(checkpoint, Mapping) else None
        source = str(network) if isinstance(network, (str, Path)) else "given"
        network = dynunet(settings, state_dict_of(checkpoint, source), len(names), outputs)
    dims = len(settings["patch_size"])
    inferer: Any = GradientSlidingWindowInferer(
        tuple(int(n) for n in settings["patch_size"]),
        sw_batch_size,
        overlap=0.5,
        mode="gaussian",
        keep_windows=keep_windows,
    )
    if mirror is True:
        axes = tuple(range(dims)) if allowed is None else tuple(int(a) for a in allowed)
    else:
        axes = () if mirror is False else tuple(mirror)
    if axes:
        inferer = MirrorInferer(inferer, axes)
    preprocessing = NnUNetPreprocessing(content, configuration)
    if len(names) != len(preprocessing.schemes):
        raise ConfigError(
            f"dataset.json names {len(names)} channels, the plans normalise {len(preprocessing.schemes)}: they are not "
            "of the same dataset"
        )
    return Victim(network.to(device).eval(), inferer, head, preprocessing, name=name, refine=refine)


class NnUNetPreprocessing:
    """nnU-Net's preprocessing of a batch in scanner units, with a gradient: a victim's ``preprocessing``.

    Axes in nnU-Net's order, crop to the non-zero voxels of any channel, normalisation, and linear resampling to the
    plans' spacing where an affine is known.

    Args:
        plans: content of ``plans.json``.
        configuration: which of its configurations.

    Raises:
        ConfigError: for a normalisation other than z-score, CT and none.
    """

    changes_grid = True

    def __init__(self, plans: Mapping[str, Any], configuration: str = "3d_fullres") -> None:
        settings = _configuration(plans, configuration)
        self.schemes = list(settings["normalization_schemes"])
        unknown = sorted(set(self.schemes) - set(SCHEMES))
        if unknown:
            raise ConfigError(f"normalisation {', '.join(unknown)} is not supported: {', '.join(SCHEMES)} are")
        self.use_mask = [bool(flag) for flag in settings.get("use_mask_for_norm") or [False] * len(self.schemes)]
        self.spacing = tuple(float(s) for s in settings["spacing"])
        self.intensities = plans.get("foreground_intensity_properties_per_channel") or {}
        if "CTNormalization" in self.schemes and not self.intensities:
            raise ConfigError("CTNormalization needs foreground_intensity_properties_per_channel in the plans")
        dims = len(self.spacing)
        forward = [int(a) for a in plans.get("transpose_forward") or range(dims)]
        # nnU-Net reads files as (z, y, x); these are (x, y, z), as MONAI and nibabel read them
        self.axes = tuple(dims - 1 - a for a in forward)

    def __call__(self, image: Tensor) -> Tensor:
        """The network's input for ``(B, C, *spatial)``; see :meth:`prepare`."""
        return self.prepare(image)[0]

    def prepare(self, image: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The network's input, and the way back for its logits.

        Args:
            image: ``(B, C, *spatial)`` in scanner units.
            affine: voxel to world; without one the image is taken to have the plans' spacing.

        Returns:
            Data on the network's grid, and a linear function that brings logits to the image's grid.
        """
        data = plain(image)
        dims = data.dim() - 2
        if dims != len(self.axes) or data.shape[1] != len(self.schemes):
            raise ConfigError(
                f"the plans are for {len(self.schemes)} channels and {len(self.axes)} axes, the image is "
                f"{tuple(data.shape)}"
            )
        data = data.permute(0, 1, *(a + 2 for a in self.axes))
        whole = data.shape[2:]
        mask = _nonzero(data)
        box = _bounding_box(mask)
        where = (slice(None), slice(None), *box)
        data, mask = data[where], mask[where]
        data = torch.cat([self._normalised(data[:, c : c + 1], mask, c) for c in range(data.shape[1])], dim=1)
        cropped = data.shape[2:]
        size = self._size(cropped, affine, dims)
        if size != tuple(cropped):
            data = F.interpolate(data, size=size, mode=_LINEAR[dims], align_corners=False)
        order = sorted(range(dims), key=lambda axis: self.axes[axis])

        def back(logits: Tensor) -> Tensor:
            if tuple(logits.shape[2:]) != tuple(cropped):
                logits = F.interpolate(logits, size=tuple(cropped), mode=_LINEAR[dims], align_corners=False)
            padding = [(part.start, full - part.stop) for part, full in zip(box, whole)]
            logits = F.pad(logits, [n for pair in reversed(padding) for n in pair])
            return logits.permute(0, 1, *(axis + 2 for axis in order))

        return data, back

    def _size(self, shape: Sequence[int], affine: Tensor | None, dims: int) -> tuple[int, ...]:
        if affine is None:
            return tuple(shape)
        own = voxel_size(affine, dims)
        return tuple(
            n if abs(own[a] - s) < 1e-3 * s else max(1, round(n * own[a] / s))
            for n, a, s in zip(shape, self.axes, self.spacing)
        )

    def _normalised(self, data: Tensor, mask: Tensor, channel: int) -> Tensor:
        """One channel ``(B, 1, *spatial)``; the statistics are part of the graph."""
        scheme = self.schemes[channel]
        if scheme == "NoNormalization":
            return data
        if scheme == "CTNormalization":
            known = self.intensities[str(channel)]
            clipped = data.clamp(known["percentile_00_5"], known["percentile_99_5"])
            return (clipped - known["mean"]) / max(known["std"], 1e-8)
        inside = mask if self.use_mask[channel] else torch.ones_like(mask)
        dims = tuple(range(1, data.dim()))
        count = inside.sum(dims, keepdim=True).clamp_min(1)
        nothing = torch.zeros((), dtype=data.dtype, device=data.device)
        mean = torch.where(inside, data, nothing).sum(dims, keepdim=True, dtype=torch.float64) / count
        centred = data - mean.to(data.dtype)
        variance = torch.where(inside, centred, nothing).square().sum(dims, keepdim=True, dtype=torch.float64) / count
        std = torch.where(variance > 1e-16, variance, torch.full_like(variance, 1e-16)).sqrt()
        return torch.where(inside, centred / std.to(data.dtype), data)


class RegionConversion:
    """What nnU-Net writes for overlapping regions: a label map, from which the regions are read again.

    Its regions are painted one over the other in ``order``, so that a voxel of ET that lies outside WT becomes WT too.
    It belongs to scoring: give it to a :class:`Victim` as ``refine``.

    Args:
        regions: label values of every channel's region.
        order: the value that each channel paints (``regions_class_order``).

    Example:
        >>> bits = torch.tensor([[[0]], [[1]]]).bool().view(1, 2, 1, 1)  # not WT, but ET
        >>> RegionConversion([(1, 2), (2,)], [1, 2])(bits).flatten().tolist()
        [True, True]
    """

    def __init__(self, regions: Sequence[Sequence[int]], order: Sequence[int]) -> None:
        if len(regions) != len(order):
            raise ConfigError(f"regions_class_order {list(order)} needs one value for each of {len(regions)} regions")
        self.regions = [tuple(int(v) for v in members) for members in regions]
        self.order = [int(value) for value in order]

    def __call__(self, prediction: Tensor) -> Tensor:
        """Convert bits ``(B, K, *spatial)``; same shape and dtype."""
        labels = torch.zeros_like(prediction[:, 0], dtype=torch.long)
        for channel, value in enumerate(self.order):
            labels = labels.masked_fill(prediction[:, channel].bool(), value)
        masks = [torch.isin(labels, torch.tensor(members, device=labels.device)) for members in self.regions]
        return torch.stack(masks, dim=1).to(prediction.dtype)


def _labels(dataset: Mapping[str, Any]) -> tuple[Head, RegionConversion | None, int]:
    """Head, region conversion and number of output channels of ``dataset.json``."""
    labels = {k: v for k, v in (dataset.get("labels") or {}).items() if k != "ignore"}
    if labels.get("background") != 0 or len(labels) < 2:
        raise ConfigError(f"dataset.json must have labels with background 0 and more, it has {labels}")
    foreground = {k: v for k, v in labels.items() if v != 0 and v != [0]}
    if not any(isinstance(v, (list, tuple)) and len(v) > 1 for v in foreground.values()):
        single = {int(v[0] if isinstance(v, (list, tuple)) else v): k for k, v in foreground.items()}
        if sorted(single) != list(range(1, len(single) + 1)):
            raise ConfigError(f"the labels of dataset.json must be 0, 1, 2, ..., they are {sorted(single)}")
        return head_of_classes(single), None, len(single) + 1
    order = dataset.get("regions_class_order")
    if order is None:
        raise ConfigError("dataset.json has regions (lists of labels) and no regions_class_order")
    members = [tuple(v) if isinstance(v, (list, tuple)) else (v,) for v in foreground.values()]
    return Head("sigmoid", tuple(region(name) for name in foreground)), RegionConversion(members, order), len(members)


def _configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits."""
    known = plans.get("configurations")
    if not isinstance(known, Mapping):
        raise ConfigError("these are no nnU-Net v2 plans: they have no 'configurations'")
    found: dict[str, Any] = {}
    seen: list[str] = []
    current: str | None = name
    while current is not None:
        if current not in known or current in seen:
            raise ConfigError(f"configuration {current!r} is not in the plans, or inherits from itself: {list(known)}")
        seen.append(current)
        found = {**known[current], **found}
        current = known[current].get("inherits_from")
    missing = [key for key in ("patch_size", "spacing", "normalization_schemes") if key not in found]
    if missing:
        raise ConfigError(f"configuration {name} of the plans has no {', '.join(missing)}")
    if found.get("previous_stage"):
        raise ConfigError(f"configuration {name} is the second stage of a cascade, which is not supported")
    if len(found["patch_size"]) != len(found["spacing"]):
        raise ConfigError(f"configuration {name}: patch_size and spacing differ in their number of axes")
    return found


def _plain_data(source: Plain, what: str) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    try:
        content = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {source} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{what} {source} must hold a JSON object")
    return content


def _nonzero(data: Tensor) -> Tensor:
    """Where any channel is not zero, holes filled: ``(B, 1, *spatial)``."""
    masks = (data.detach() != 0).any(1).cpu().numpy()
    filled = np.stack([ndimage.binary_fill_holes(mask) for mask in masks])
    return torch.from_numpy(filled).to(data.device)[:, None]


def _bounding_box(mask: Tensor) -> tuple[slice, ...]:
    """The box of all samples' masks; everything where they are empty."""
    together = mask.any(0)[0].cpu().numpy()
    found = ndimage.find_objects(together.astype(np.int8)) if together.any() else []
    return found[0] if found else tuple(slice(0, n) for n in together.shape)
