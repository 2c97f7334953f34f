"""HD95 of two masks that both hold a voxel: of surface voxels, and of surface elements by their area."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ._arrays import bounding_box


def voxel_hd95(prediction: np.ndarray, truth: np.ndarray, spacing: list[float]) -> float:
    """The larger 95th percentile of the distances in mm between surface voxels, as MONAI's HausdorffDistanceMetric."""
    from monai.metrics import compute_hausdorff_distance

    p, t = (mask[None, None] for mask in _cropped(prediction, truth))
    with _as_monai_calls_itself():
        distance = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=spacing)
    return float(distance)


def area_hd95(prediction: np.ndarray, truth: np.ndarray, spacing: list[float]) -> float:
    """The larger 95th percentile in mm by area of surface elements, as the evaluation of BraTS 2023 has it."""
    from monai.metrics.utils import get_edge_surface_distance

    p, t = _cropped(prediction, truth)
    with _as_monai_calls_itself():
        edges, distances, areas = get_edge_surface_distance(
            p, t, spacing=spacing, use_subvoxels=True, symmetric=True, warn_empty=False
        )
    found = []
    for edge, distance, area in zip(edges, distances, areas):
        values, weights = (np.asarray(part, dtype=np.float64) for part in (distance, area[edge]))
        order = np.lexsort((weights, values))
        share = np.cumsum(weights[order]) / weights.sum()
        found.append(values[order][min(int(np.searchsorted(share, 0.95)), len(values) - 1)])
    return float(max(found))


def _cropped(*masks: np.ndarray) -> list[Any]:
    """The joint box as tensors: surfaces lie inside it and beyond an array's border is outside, so it is exact."""
    import torch

    box = bounding_box(np.logical_or(*masks))
    return [torch.from_numpy(np.ascontiguousarray(mask[box])) for mask in masks]


@contextmanager
def _as_monai_calls_itself() -> Iterator[None]:
    with warnings.catch_warnings():
        # MONAI 1.6 warns about an argument that its own code passes on
        warnings.filterwarnings("ignore", message=r".*get_mask_edges:always_return_as_numpy", category=FutureWarning)
        yield
