"""One simulated subject, from a seed to images and labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monai_adv.data.simulation.acquisition import Scanner
from monai_adv.data.simulation.anatomy import Anatomy, Axes, Tissues
from monai_adv.data.simulation.fields import Draws, single_thread
from monai_adv.data.simulation.geometry import HEAD_LIMITS, Geometry
from monai_adv.data.simulation.mimics import draw_mimics
from monai_adv.data.simulation.template import load_growth_template, load_template
from monai_adv.data.simulation.tumour import Compartments, Tumour, invaded
from monai_adv.errors import ConfigError, DataError

RECIPE = 1
"""Version of the recipe: any change of the bits it makes raises this number, and old subjects are made anew."""

_DEFAULT = Geometry.from_spacing(2.0)


@dataclass(frozen=True)
class SimulatedSubject:
    """Images and labels of one subject.

    Args:
        image: (4, X, Y, Z) float32: T1, T1 after contrast, T2, FLAIR; background exactly zero.
        label: (X, Y, Z) uint8 with the file values of BraTS 2017-2020: 0, 1 NCR, 2 oedema, 4 enhancing.
        affine: (4, 4) float64, voxel indices to RAS mm.
        info: plain data: seed, grade, volumes in ml, sequence parameters.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray
    info: dict[str, object]


@torch.no_grad()
def simulate_subject(seed: int, geometry: Geometry = _DEFAULT) -> SimulatedSubject:
    """Draw the multi-contrast MRI of a subject with a glioma, and its labels.

    The same seed gives the same bits (one CPU thread, same versions of the libraries); at another geometry it gives
    the same brain and tumour, sampled differently.

    Args:
        seed: 0 or more.
        geometry: the voxel grid.

    Returns:
        Images, labels, affine and facts of the subject.

    Raises:
        ConfigError: the seed is negative.
        DataError: nilearn, whose template is needed, is not installed; or the grid does not contain the head.

    Example:
        >>> subject = simulate_subject(1, Geometry.from_spacing(4.0))
        >>> subject.image.shape, sorted(set(subject.label.flat)) <= [0, 1, 2, 4]
        ((4, 40, 48, 48), True)
    """
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {seed}.")
    with single_thread():
        return _simulate(int(seed), geometry)


def _simulate(seed: int, geometry: Geometry) -> SimulatedSubject:
    spacing = geometry.spacing
    box, axes = _head(geometry)
    anatomy = Anatomy(seed)
    tumour = Tumour(seed, anatomy, load_growth_template())
    tissues = anatomy(load_template(spacing), axes, tumour.mass)
    edge = Draws(seed, "skull stripping").uniform(0.35, 0.60)
    inside = tissues.brain > edge
    tissues.fractions.mul_(tissues.brain)

    window = tumour.window(axes)
    if window[0].stop == 0:
        raise _no_tumour(seed, geometry)
    part = Axes(*(a[w] for a, w in zip(axes, window)))
    near = _cut(tissues, window)
    compartments = tumour(part, near.brain, spacing)
    label = torch.zeros(axes.shape, dtype=torch.uint8)
    label[window] = compartments.labels(near)
    label[~inside] = 0
    fractions = {n: torch.zeros(axes.shape) for n in ("oedema", "non_enhancing", "necrosis", "enhancing")}
    for name, values in _replace(near.fractions, compartments).items():
        fractions[name][window] = values

    mimics = draw_mimics(seed, tissues, axes, spacing)
    csf, gm, wm, deep_gm = tissues.fractions
    csf = (csf - mimics.enhancing).clamp_min(0)
    lesions = mimics.white_matter_lesions
    healthy = {"csf": csf, "gm": gm, "wm": wm - lesions, "deep_gm": deep_gm, "wmh": lesions}
    scanner = Scanner(seed)
    mixture = healthy | fractions | {"vessel": mimics.enhancing}
    image = torch.zeros((4, *geometry.shape))
    image[(slice(None), *box)] = scanner(mixture, inside, axes, spacing, mimics.flow)
    full = torch.zeros(geometry.shape, dtype=torch.uint8)
    full[box] = label
    volumes = _volumes(full, inside, lesions, spacing)
    if volumes["whole_tumour"] == 0:
        raise _no_tumour(seed, geometry)
    info: dict[str, object] = {"seed": seed, "recipe": RECIPE, "geometry": geometry.as_dict(), "volumes_ml": volumes}
    return SimulatedSubject(image.numpy(), full.numpy(), geometry.affine, info | tumour.info | scanner.info)


def _no_tumour(seed: int, geometry: Geometry) -> DataError:
    return DataError(
        f"The tumour of the subject with seed {seed} lies outside {geometry}: use a grid that holds the whole head, "
        f"for example Geometry.from_spacing({geometry.spacing})."
    )


def _head(geometry: Geometry) -> tuple[tuple[slice, slice, slice], Axes]:
    """The part of the grid inside the head's limits, and its axes."""
    inside = [np.flatnonzero((a >= low) & (a <= high)) for a, (low, high) in zip(geometry.axes, HEAD_LIMITS)]
    if min(map(len, inside)) < 2:
        raise DataError(f"No voxel of {geometry} lies in the head; centre it near (0, -17, 7.5) mm.")
    x, y, z = (slice(int(i[0]), int(i[-1]) + 1) for i in inside)
    return (x, y, z), Axes(*(torch.tensor(a[i], dtype=torch.float32) for a, i in zip(geometry.axes, inside)))


def _cut(tissues: Tissues, window: tuple[slice, slice, slice]) -> Tissues:
    """A view of part of the brain."""
    return Tissues(
        tissues.fractions[(slice(None), *window)],
        tissues.brain[window],
        tissues.ventricles[window],
        tissues.depth[window],
        tissues.midline[window],
    )


def _replace(healthy: Tensor, tumour: Compartments) -> dict[str, Tensor]:
    """Put the tumour into the healthy fractions (4, X, Y, Z), in place, and return the fractions of its parts."""
    share = invaded() * tumour.oedema
    outside = healthy * (1 - tumour.core)
    oedema = (outside * share).sum(0)
    healthy.copy_(outside * (1 - share))
    return {
        "oedema": oedema,
        "non_enhancing": tumour.non_enhancing,
        "necrosis": tumour.necrosis,
        "enhancing": tumour.enhancing,
    }


def _volumes(label: Tensor, inside: Tensor, lesions: Tensor, spacing: float) -> dict[str, float]:
    voxel = spacing**3 / 1000
    counts = {
        "whole_tumour": (label > 0).sum(),
        "tumour_core": ((label == 1) | (label == 4)).sum(),
        "enhancing": (label == 4).sum(),
        "brain": inside.sum(),
        "white_matter_lesions": lesions.sum(),
    }
    return {name: round(float(n) * voxel, 2) for name, n in counts.items()}
