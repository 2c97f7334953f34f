"""What looks like a tumour and is none: white-matter lesions, vessels, dura, choroid plexus."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monai_adv.data.simulation.anatomy import Axes, Tissues
from monai_adv.data.simulation.fields import Draws, SmoothField, blur


class Mimics(NamedTuple):
    """Fractions (X, Y, Z) of the look-alikes, and the field of choroid plexus and CSF flow."""

    white_matter_lesions: Tensor
    enhancing: Tensor
    flow: SmoothField


def draw_mimics(seed: int, tissues: Tissues, axes: Axes, spacing: float) -> Mimics:
    """Look-alikes that keep the task honest: bright on FLAIR or after contrast, and not part of any label.

    Args:
        seed: the subject's seed.
        tissues: the brain on the grid; its white matter is what the lesions replace.
        axes: the grid.
        spacing: of the grid in mm.
    """
    draws = Draws(seed, "mimics")
    lesions, vessels, flow = draws.field(7.0, 2), draws.field(12.0, 2), draws.field(6.0)
    load = max(0.0, draws.normal(0.55) + 0.35)
    sinus_strength, dura_strength = draws.uniform(0.3, 1.0), draws.uniform(0.1, 0.9)
    csf, gm, wm, _ = tissues.fractions

    # white-matter hyperintensities: caps around the ventricles and deep spots (Fazekas)
    near = 2 * blur((tissues.ventricles > 0.4).float(), [3 / spacing] * 3).clamp(0, 0.5)
    spots = lesions(axes)[0] + 2.2 * load * near - 2.1 + 0.25 * load
    white_matter_lesions = wm * torch.sigmoid(6 * spots) * float(load > 0.05)

    # vessels: tubes along the common zero lines of two fields, mostly in the sulci
    tubes = vessels(axes)
    lines = torch.exp(-(tubes / 0.17).square().sum(0))
    vessel = 1.1 * lines * (csf + 0.55 * gm + 0.1 * wm) * ((tissues.depth > 1) & (tissues.depth < 32))

    x, y, z = axes.x[:, None, None], axes.y[None, :, None], axes.z[None, None, :]
    sinus = sinus_strength * torch.exp(-((x / 4.0) ** 2)) * ((tissues.depth < 7) & (z > 0) & (y < 40))
    dura = dura_strength * (tissues.depth < 2.5) * torch.sigmoid(2 * (tubes[1] - 0.4))
    choroid = 0.7 * tissues.ventricles * torch.sigmoid(5 * (flow(axes)[0] - 1.1)) * ((y < -10) & (z < 22))
    bright = torch.stack([vessel, sinus * csf, dura * csf, choroid]).amax(0).clamp(0, 1)
    return Mimics(white_matter_lesions, bright, flow)
