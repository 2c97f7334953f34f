"""How large a perturbation is, in the three units a budget may be stated in."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._arrays import image_pair, robust_range, to_support

UNITS = ("absolute", "std", "range")


def perturbation_norms(clean: Any, adversarial: Any, support: Any) -> dict[str, Any]:
    """Measure the perturbation of one volume in absolute units, standard deviations and shares of the range.

    Each channel's difference is divided by that channel's unit, taken from the clean image inside the support:
    1 (``absolute``), the standard deviation (``std``, population form as in MONAI's NormalizeIntensity) or the
    distance from the 0.5 to the 99.5 percentile (``range``). Norms run over the whole volume, so what lies outside
    the support counts too. Everything is computed in float64.

    Args:
        clean: ``(C, *spatial)``, two or three spatial axes.
        adversarial: the same shape and intensity units as `clean`.
        support: boolean, ``(*spatial)``, ``(1, *spatial)`` or, with a mask for each channel,
            ``(C, *spatial)``: where the attack was allowed to change the image.

    Returns:
        For each unit ``u`` of absolute, std, range:

        - ``linf_u``: largest change over all channels; ``l2_u``: root of the sum of squares over all channels;
          ``rms_u``: ``l2_u`` divided by the root of the number of support voxels, summed over the channels;
        - ``linf_u_per_channel``, ``l2_u_per_channel``, ``rms_u_per_channel``: the same, a list with one per channel.

        Further ``changed`` (share of the union of the channels' supports that is changed in any channel, inside that
        channel's support), ``changed_per_channel``, ``outside_max`` (largest absolute change outside the support, 0
        for an attack that kept to it) and ``support_voxels`` (of the union). A channel that is constant in its
        support, or has no voxel in it, has no unit: its std and range norms are 0 where it is unchanged and infinite
        where it is changed.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or the support is empty.

    Example:
        >>> import numpy as np
        >>> clean = np.array([[[-1.0, 1.0], [-1.0, 1.0]]])
        >>> norms = perturbation_norms(clean, clean + 0.5, np.ones((2, 2), bool))
        >>> norms["linf_std"], norms["l2_absolute"], norms["rms_std"]
        (0.5, 1.0, 0.5)
    """
    x, y = image_pair(clean, adversarial)
    masks = to_support(support, x.shape)
    counts = [int(mask.sum()) for mask in masks]
    linf: dict[str, list[float]] = {unit: [] for unit in UNITS}
    l2: dict[str, list[float]] = {unit: [] for unit in UNITS}
    share: list[float] = []
    anywhere = np.zeros(x.shape[1:], dtype=bool)
    outside_max = 0.0
    for before, after, inside in zip(x, y, masks):  # one channel at a time: float64 copies of a whole volume are large
        delta = np.abs(after.astype(np.float64) - before.astype(np.float64))
        values = before[inside].astype(np.float64)
        low, high = robust_range(values) if values.size else (0.0, 0.0)
        # rounding gives a constant a tiny standard deviation instead of none
        std = float(values.std()) if values.size and values.min() < values.max() else 0.0
        largest, length = float(delta.max()), float(np.linalg.norm(delta))
        for unit, scale in zip(UNITS, (1.0, std, high - low)):
            linf[unit].append(_in_units(largest, scale))
            l2[unit].append(_in_units(length, scale))
        touched = (delta > 0) & inside
        anywhere |= touched
        share.append(float(touched.sum() / max(1, values.size)))
        outside_max = max(outside_max, float(np.max(delta, where=~inside, initial=0.0)))

    norms: dict[str, Any] = {}
    for unit in UNITS:
        norms[f"linf_{unit}"] = max(linf[unit])
        norms[f"l2_{unit}"] = float(np.linalg.norm(l2[unit]))
        norms[f"rms_{unit}"] = norms[f"l2_{unit}"] / float(np.sqrt(sum(counts)))
        norms[f"linf_{unit}_per_channel"] = linf[unit]
        norms[f"l2_{unit}_per_channel"] = l2[unit]
        norms[f"rms_{unit}_per_channel"] = [length / float(np.sqrt(max(1, n))) for length, n in zip(l2[unit], counts)]
    union = int(masks.any(axis=0).sum())
    norms["changed"] = float(anywhere.sum() / union)
    norms["changed_per_channel"] = share
    norms["outside_max"] = outside_max
    norms["support_voxels"] = union
    return norms


def _in_units(size: float, scale: float) -> float:
    """Divide by the unit; a unit of zero gives 0 for no change and infinity for any."""
    if scale > 0:
        return size / scale
    return 0.0 if size == 0 else float("inf")
