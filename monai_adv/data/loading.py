"""Load one case: every check first, then MONAI's reader."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, Transform
from monai.utils import get_equivalent_dtype
from nibabel.spatialimages import HeaderDataError

from monai_adv.data.findings import Finding, raise_for_errors
from monai_adv.data.headers import ImageHeader, check_integrity, geometry_findings, read_header
from monai_adv.data.itk_formats import itk_reader
from monai_adv.data.labels import MODALITIES, LabelScheme
from monai_adv.errors import DataError


def load_case(item: Mapping[str, Any], *, dtype: Any = torch.float32) -> dict[str, Any]:
    """Load a datalist item with MONAI's ``LoadImage`` after checking its files.

    NIfTI is read by NibabelReader, NRRD and MetaImage by ITKReader; affines are RAS millimetres either way.

    Headers and file integrity are checked before anything is allocated: size, shape, affine and spacing of the
    modalities and the label (tolerance 1e-3), truncation and checksum. Voxels are checked after reading: NaN or Inf,
    an all-zero channel, label values outside the scheme. The orientation stays the file's own.

    Args:
        item: as :func:`monai_adv.data.brats_datalist` makes it.
        dtype: floating type of the image (torch or NumPy).

    Returns:
        ``"image"``: MetaTensor (4, X, Y, Z), channels in the order of :data:`MODALITIES`, in the file's intensity
        units; ``"label"``: MetaTensor uint8 (1, X, Y, Z) of canonical class indices (absent when the item has no
        label); ``"subject"``: the ID. Both carry ``affine`` and ``meta["filename_or_obj"]``.

    Raises:
        DataError: names every file of the case that is wrong, what is wrong and what to do.
    """
    subject, _, label_path = _unpack(item)
    headers, findings = read_case_headers(item)
    raise_for_errors(findings)
    volumes: list[torch.Tensor] = []
    meta: dict[Any, Any] = {}
    for modality, volume in read_modalities(item, headers, dtype):
        findings += voxel_findings(subject, headers[modality].path, modality, volume)
        meta = meta or {key: value for key, value in volume.meta.items() if key != "original_channel_dim"}
        volumes.append(volume.as_tensor())
    raise_for_errors(findings)
    case: dict[str, Any] = {"image": MetaTensor(torch.stack(volumes), meta=meta), "subject": subject}
    if label_path is not None:
        raw = read_volume(headers["label"], torch.float64)
        classes = LabelScheme.get(item["scheme"]).to_classes(raw, where=label_path)
        case["label"] = MetaTensor(torch.from_numpy(classes), meta=dict(raw.meta))
    return case


class LoadCased(Transform):
    """:func:`load_case` as the first member of a MONAI ``Compose``.

    Args:
        dtype: floating type of the image.

    Returns:
        (of a call) the item with ``"image"`` and ``"label"`` replaced by MetaTensors; ``"label"`` and ``"channels"``
        are dropped when they no longer mean anything (no label; channels are canonical by then); other keys are kept.

    Example:
        >>> from monai.transforms import Compose, CropForegroundd
        >>> pipeline = Compose([LoadCased(), CropForegroundd(["image", "label"], "image", allow_smaller=False)])
    """

    def __init__(self, dtype: Any = torch.float32) -> None:
        self.dtype = dtype

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in data.items() if key not in ("image", "label", "channels")}
        return {**kept, **load_case(data, dtype=self.dtype)}


def _unpack(item: Mapping[str, Any]) -> tuple[str, dict[str, tuple[str, int | None]], str | None]:
    """Subject, modality -> (path, channel in that file or None), label path."""
    missing = [key for key in ("image", "subject", "scheme") if key not in item]
    if missing:
        raise DataError(f"datalist item {dict(item)!r} lacks {missing}. Make items with brats_datalist(root).")
    subject, image = str(item["subject"]), item["image"]
    images: dict[str, tuple[str, int | None]]
    if isinstance(image, (list, tuple)):
        if len(image) != len(MODALITIES):
            raise DataError(f"{subject}: {len(image)} image files; expected {len(MODALITIES)}, {', '.join(MODALITIES)}")
        images = {modality: (str(path), None) for modality, path in zip(MODALITIES, image)}
    else:
        channels = item.get("channels")
        if channels is None or sorted(channels) != list(range(len(MODALITIES))):
            raise DataError(
                f"{subject}: one image file but channels={channels!r}; expected a permutation of 0..3 that says "
                f"which channels are {', '.join(MODALITIES)}"
            )
        images = {modality: (str(image), int(channel)) for modality, channel in zip(MODALITIES, channels)}
    label = item.get("label")
    return subject, images, None if label is None else str(label)


def read_case_headers(item: Mapping[str, Any]) -> tuple[dict[str, ImageHeader], list[Finding]]:
    """Headers of all files of an item (role -> header) and everything that is wrong with the files or the geometry.

    The voxels are not allocated. For a Decathlon item the four modalities share one header.
    """
    subject, images, label_path = _unpack(item)
    roles: dict[str, tuple[str, int]] = {
        modality: (path, 3 if channel is None else 4) for modality, (path, channel) in images.items()
    }
    if label_path is not None:
        roles["label"] = (label_path, 3)
    headers: dict[str, ImageHeader] = {}
    findings: list[Finding] = []
    read: dict[str, ImageHeader | None] = {}
    for role, (path, ndim) in roles.items():
        if path not in read:
            read[path] = None
            try:
                header = read_header(path, ndim)
                if ndim == 4 and header.shape[3] != len(MODALITIES):
                    raise DataError(f"{path}: {header.shape[3]} channels; expected {len(MODALITIES)}. Wrong file?")
                check_integrity(header)
                read[path] = header
            except DataError as error:
                findings.append(finding_of(subject, path, error))
        known = read[path]
        if known is not None:
            headers[role] = known
    return headers, findings + geometry_findings(subject, headers)


def read_volume(header: ImageHeader, dtype: Any = torch.float32) -> MetaTensor:
    """Read one file with MONAI, channel first: (1, X, Y, Z), or (C, X, Y, Z) of a 4D file.

    Raises:
        DataError: if the voxels cannot be read.
    """
    numpy_dtype = get_equivalent_dtype(dtype, np.ndarray)
    reader: Any = "NibabelReader" if header.format == "NIfTI" else itk_reader(header.dtype)
    load = LoadImage(reader=reader, image_only=True, ensure_channel_first=True, dtype=numpy_dtype)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # a number too large for the type is found as infinite
            return load(header.path)
    except (OSError, EOFError, ValueError, RuntimeError, MemoryError, zlib.error, HeaderDataError) as error:
        raise DataError(f"{header.path}: the voxels cannot be read ({error}). Copy or download it again.") from error


def read_modalities(
    item: Mapping[str, Any], headers: Mapping[str, ImageHeader], dtype: Any = torch.float32
) -> Iterator[tuple[str, MetaTensor]]:
    """Read the modalities that have a header, one after the other: pairs of name and MetaTensor (X, Y, Z)."""
    _, images, _ = _unpack(item)
    shared: MetaTensor | None = None
    for modality, (_, channel) in images.items():
        if modality not in headers:
            continue
        if channel is None:
            yield modality, _first_axis(read_volume(headers[modality], dtype), 0)
        else:
            shared = read_volume(headers[modality], dtype) if shared is None else shared
            yield modality, _first_axis(shared, channel)


def _first_axis(volume: MetaTensor, channel: int) -> MetaTensor:
    return MetaTensor(volume.as_tensor()[channel], meta=dict(volume.meta))


def voxel_findings(subject: str, path: str, modality: str, volume: torch.Tensor) -> list[Finding]:
    """What makes the voxels of one modality unusable: NaN or Inf, all zero, constant.

    One NaN becomes a whole volume of NaN in ``NormalizeIntensity``, and NaN logits look like a perfect attack.
    """
    broken = int((~torch.isfinite(volume)).sum())
    if broken:
        what = f"{modality} has {broken} NaN or Inf voxels of {volume.numel()}"
        return [Finding("error", subject, path, what, "Export the volume again, or exclude the subject")]
    low, high = float(volume.min()), float(volume.max())
    if low == high:
        what = f"{modality} is all zero" if low == 0 else f"{modality} is constant ({low:g})"
        return [Finding("error", subject, path, what, "Restore the modality from its source, or exclude the subject")]
    return []


def finding_of(subject: str, path: str, error: Exception) -> Finding:
    """A :class:`DataError` about a file as a finding: the file is cut off its message, the last sentence is advice."""
    text = str(error).removeprefix(f"{path}: ").rstrip(".")
    what, _, advice = text.rpartition(". ")
    return Finding("error", subject, path, what or text, advice if what else "Repair or exclude the file")
