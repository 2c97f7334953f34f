"""Volumes of a run for the report's viewer: cropped, quantised, as compressed NIfTI in base64 within a budget."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from monai_adv.data.labels import CLASSES, MODALITIES
from monai_adv.studies.volumes import load_volumes

from .montage import _symmetric_scale, _unit, _window
from .slices import most_changed_slice
from .style import REGION_COLOURS

BUDGET = 8_000_000
"""Characters of base64 that the volumes of one report may take."""
KEPT_FIRST = ("FLAIR", "T1c", "T2", "T1")
"""Modalities in the order in which they are kept when the budget is short."""
_MARGIN = 2
_LOST = 0.05  # share of changed voxels that eight bits may round to no change


@dataclass(frozen=True)
class Drawn:
    """One attacked subject whose volumes a run kept; they are read when they are asked for.

    Attributes:
        identity: subject, victim, attack, eps, units, setting ... of the unit.
        clean: file of the clean image, see ``monai_adv.studies.volumes.save_volumes``.
        attacked: file of the adversarial image.
        dice: region -> (Dice on the clean, Dice on the adversarial image).
    """

    identity: Mapping[str, Any]
    clean: Path
    attacked: Path
    dice: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Subject, victim and setting."""
        return f"{self.identity['subject']}, {self.identity['victim']}, {self.identity['setting']}"

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
        """Clean and attacked ``image`` (C, X, Y, Z), ``prediction``, ``truth``, ``affine``, ``spacing``; None if
        a file is missing or damaged."""
        clean, attacked = load_volumes(self.clean), load_volumes(self.attacked)
        return None if clean is None or attacked is None else (clean, attacked)


@dataclass
class ViewerContent:
    """What the viewer of one report shows.

    Attributes:
        volumes: gzip NIfTI files in base64.
        scenes: plain data, one entry per subject and victim: ``subject``, ``victim``, ``truth``, ``prediction``,
            ``modalities`` (name, volume, window) and ``settings`` (name, prediction, truth, where to look, Dice and
            per modality the perturbation and its scale). Whole numbers are positions in ``volumes``.
        notes: what was left out and what the reader has to know.
    """

    volumes: list[str] = field(default_factory=list)
    scenes: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def viewer_content(
    drawn: Iterable[Drawn],
    *,
    budget: int = BUDGET,
    modalities: Sequence[str] = MODALITIES,
    first: Sequence[str] = (),
) -> ViewerContent | None:
    """Pack attacked subjects for the viewer.

    Volumes are cropped to the brain. Clean images take 256 steps of their window, perturbations 127 steps either side
    of zero (32767 where that would round more than 5 % of the changed voxels to zero); the true values stand in the
    slope and intercept of each file. The adversarial image is the sum of both, made in the browser. What exceeds the
    budget is left out: modalities first, then subjects, then settings of the first subject; ``notes`` say what.

    Args:
        drawn: subjects in the order of their importance, all settings of a subject together.
        budget: characters of base64 for all volumes.
        modalities: name of each channel.
        first: modalities to keep longest, as those that alone may change; then FLAIR, T1c, T2, T1.

    Returns:
        The content (without scenes if nothing fits), or None if the run kept no volume that can be shown.
    """
    order = [m for m in dict.fromkeys([*first, *KEPT_FIRST, *modalities]) if m in modalities]
    kept, packed, left_out = list(order), [], []
    pending = iter(drawn)
    for one in pending:
        volumes = one.load()
        if volumes is None or volumes[0]["image"].ndim != 4 or len(volumes[0]["image"]) != len(modalities):
            continue
        packed.append(_Packed.of(one, *volumes, modalities, kept))
        while len(kept) > 1 and _size(packed, kept) > budget:
            kept.pop()
        if _size(packed, kept) > budget:  # one modality is still too much
            subject = one.identity["subject"]
            partly = subject == packed[0].drawn.identity["subject"]  # only the first subject may lack settings
            dropped = packed[-1:] if partly else [p for p in packed if p.drawn.identity["subject"] == subject]
            packed = [p for p in packed if p not in dropped]
            left_out = [p.drawn.title for p in dropped] + [p.title for p in pending]
    content = ViewerContent()
    if not packed and not left_out:
        return None
    for found in packed:
        _add(content, found, kept)
    missing = [m for m in order if m not in kept]
    if missing and packed:
        content.notes.append(
            f"To keep this page small, only {', '.join(kept)} can be chosen, not {', '.join(missing)}."
        )
    if left_out:
        content.notes.append(f"Left out to keep this page small: {'; '.join(left_out)}.")
    cut = sum(p.cut for p in packed)
    if cut:
        content.notes.append(f"Volumes are cropped to the brain; {cut} voxels of predictions outside it are not shown.")
    return content


@dataclass(eq=False)
class _Packed:
    """Encoded volumes of one attacked subject; those of the clean image are the same for all its settings."""

    drawn: Drawn
    labels: dict[str, str]
    moved: bool
    images: dict[str, dict[str, Any]]
    changes: dict[str, dict[str, Any]]
    look_at: list[float]
    units: str
    cut: int

    @classmethod
    def of(
        cls,
        drawn: Drawn,
        clean: Mapping[str, np.ndarray],
        attacked: Mapping[str, np.ndarray],
        modalities: Sequence[str],
        kept: Sequence[str],
    ) -> _Packed:
        box = _box(clean["image"], clean["truth"])
        affine = np.asarray(clean["affine"], dtype=float).copy()
        affine[:3, 3] += affine[:3, :3] @ [s.start for s in box]
        units = str(drawn.identity["units"])
        units = units if units in ("std", "range") else "absolute"
        images, changes = {}, {}
        for name in kept:
            channel = list(modalities).index(name)
            x, y = (np.asarray(v["image"][channel], dtype=np.float64) for v in (clean, attacked))
            images[name] = _image(x[box], affine, _window(x[x != 0]))
            changes[name] = _change((y - x)[box], affine, _unit(x[x != 0], units))
        masks = {f"{kind}_{name}": v[name] for kind, v in (("clean", clean), ("attacked", attacked))
                 for name in ("truth", "prediction")}  # fmt: skip
        before, after = clean["prediction"], attacked["prediction"]
        return cls(
            drawn=drawn,
            labels={name: _nifti(mask[box].astype(np.uint8), affine) for name, mask in masks.items()},
            moved=not np.array_equal(clean["truth"], attacked["truth"]),
            images=images,
            changes=changes,
            look_at=_look_at(before[box], after[box], clean["truth"][box], affine),
            units=units,
            cut=sum(int((p > 0).sum() - (p[box] > 0).sum()) for p in (before, after)),
        )

    def files(self, kept: Sequence[str]) -> set[str]:
        """Every file that this one needs with these modalities."""
        own = [v["file"] for group in (self.images, self.changes) for name, v in group.items() if name in kept]
        return {*self.labels.values(), *own}


def _size(packed: Sequence[_Packed], kept: Sequence[str]) -> int:
    return sum(map(len, set().union(*(p.files(kept) for p in packed))))


def _add(content: ViewerContent, one: _Packed, kept: Sequence[str]) -> None:
    """Put a pair into its scene."""
    known = {volume: index for index, volume in enumerate(content.volumes)}

    def place(volume: str) -> int:
        if volume not in known:
            known[volume] = len(content.volumes)
            content.volumes.append(volume)
        return known[volume]

    identity = one.drawn.identity
    who = {"subject": str(identity["subject"]), "victim": str(identity["victim"])}
    scene = next((s for s in content.scenes if {k: s[k] for k in who} == who), None)
    if scene is None:
        scene = {
            **who,
            "truth": place(one.labels["clean_truth"]),
            "prediction": place(one.labels["clean_prediction"]),
            "modalities": [
                {"name": m, "volume": place(one.images[m]["file"]), "window": one.images[m]["window"]} for m in kept
            ],
            "settings": [],
        }
        content.scenes.append(scene)
    scene["settings"].append(
        {
            "name": str(identity["setting"]),
            "prediction": place(one.labels["attacked_prediction"]),
            "truth": place(one.labels["attacked_truth"]),
            "moved": one.moved,
            "at": one.look_at,
            "dice": {r: [None if v != v else round(v, 4) for v in both] for r, both in one.drawn.dice.items()},
            "units": one.units,
            "changes": [
                {"volume": place(one.changes[m]["file"]), **{k: one.changes[m][k] for k in ("scale", "size")}}
                for m in kept
            ],
        }
    )


def _box(image: np.ndarray, truth: np.ndarray) -> tuple[slice, ...]:
    """Box around the brain with a margin."""
    inside = np.asarray(image != 0).any(axis=0) | (np.asarray(truth) > 0)
    if not inside.any():
        return tuple(slice(0, n) for n in inside.shape)
    found = [np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(
        slice(max(0, int(f[0]) - _MARGIN), min(n, int(f[-1]) + 1 + _MARGIN)) for f, n in zip(found, inside.shape)
    )


def _image(values: np.ndarray, affine: np.ndarray, window: tuple[float, float]) -> dict[str, Any]:
    """A clean image in 256 steps, from the smaller of 0 and the window's low end to a tenth beyond its high end."""
    low = min(0.0, window[0])
    high = max(window[1] + 0.1 * (window[1] - low), low + 1e-6)
    steps = np.clip(np.rint((values - low) * (255 / (high - low))), 0, 255).astype(np.uint8)
    return {"file": _nifti(steps, affine, (high - low) / 255, low), "window": [low, window[1]]}


def _change(values: np.ndarray, affine: np.ndarray, unit: float) -> dict[str, Any]:
    """A perturbation in steps symmetric to zero; its colour scale in image units and in the study's units."""
    largest = float(np.abs(values).max(initial=0.0))
    kind, ends = np.int8, 127
    steps = np.rint(values * (ends / (largest or 1.0)))
    changed = values != 0
    if changed.any() and float((steps[changed] == 0).mean()) > _LOST:
        kind, ends = np.int16, 32767  # type: ignore[assignment]
        steps = np.rint(values * (ends / largest))
    scale = _symmetric_scale(values)[0] if largest else 1.0
    return {"file": _nifti(steps.astype(kind), affine, (largest or 1.0) / ends), "scale": scale, "size": scale / unit}


def _look_at(before: np.ndarray, after: np.ndarray, truth: np.ndarray, affine: np.ndarray) -> list[float]:
    """Position in mm: the middle of what changed in the slice where most voxels changed their class."""
    index = most_changed_slice(before, after, affine)
    changed = np.argwhere(before != after)
    if not len(changed):
        changed = np.argwhere(truth > 0)
    if not len(changed):
        voxel = (np.array(before.shape) - 1) / 2
    else:
        axis = int(np.abs(affine[2, :3]).argmax())
        here = changed[changed[:, axis] == index]
        here = here if len(here) else changed
        voxel = here[np.linalg.norm(here - here.mean(axis=0), axis=1).argmin()].astype(float)
    return [round(float(v), 3) for v in affine[:3, :3] @ voxel + affine[:3, 3]]


def _nifti(steps: np.ndarray, affine: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> str:
    """A gzip NIfTI-1 in base64 without any free text; the same bytes for the same volume."""
    header = nib.Nifti1Header()
    header.set_data_dtype(steps.dtype)
    header.set_data_shape(steps.shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["vox_offset"], header["magic"] = 352, b"n+1"
    content = header.binaryblock + bytes(4) + steps.tobytes(order="F")
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode("ascii")


LEGEND = [
    {"index": CLASSES.index(name), "name": name, "words": words, "colour": REGION_COLOURS[region]}
    for name, region, words in (("ED", "WT", "oedema"), ("NCR", "TC", "necrotic core"), ("ET", "ET", "enhancing"))
]
"""Classes of the label volumes: a class has the colour of the region whose outer part it is."""
