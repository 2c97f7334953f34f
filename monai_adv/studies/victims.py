"""The victims of a study: checkpoints of this package, or MONAI bundles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monai_adv.bundle import load_bundle
from monai_adv.bundle.scans import scan_victim
from monai_adv.data.datalist import scan
from monai_adv.data.loading import read_case_headers
from monai_adv.defenses import Purify, purified, smoothed
from monai_adv.errors import ConfigError, MonaiAdvError
from monai_adv.studies.config import VictimEntry
from monai_adv.studies.defended import KINDS, METHODS
from monai_adv.studies.units import digest
from monai_adv.victims import Victim, load_victim, read_checkpoint
from monai_adv.victims.checkpoint import file_hash


def load_entry(entry: VictimEntry, device: str) -> tuple[Victim, str]:
    """The victim of an entry, and the hash under which its results count.

    Raises:
        CheckpointError: if weights cannot be read.
        ConfigError: for a bundle that is not trusted, or that does not say what is needed.
    """
    told = {"checkpoint", "bundle", "trust", "defense"}
    described = entry.model_dump(mode="json", exclude=told, exclude_defaults=True)
    if entry.bundle is not None:
        found = load_bundle(entry.bundle, entry.trust, device=device)
        victim, content = scan_victim(found, entry.name), digest([found.sha256, file_hash(found.weights), described])
    else:
        assert entry.checkpoint is not None
        changes = {k: getattr(entry, k) for k in ("overlap", "mode", "roi_size", "sw_batch_size")}
        victim = load_victim(entry.checkpoint, name=entry.name, device=device, **changes)
        content = digest([file_hash(entry.checkpoint), described])
    try:
        if entry.purify is not None:
            victim = purified(victim, Purify(**entry.purify), entry.name)
        if entry.smooth is not None:
            victim = smoothed(victim, **entry.smooth, name=entry.name)
    except TypeError as error:
        raise ConfigError(f"victim {entry.name}: {error}") from error
    return victim, content


def at_spacing(victim: Victim, checkpoint: str | Path, spacing: Sequence[float]) -> Victim:
    """The victim for images of a voxel size, its network run at the spacing that it was trained at.

    Args:
        victim: what was loaded from the checkpoint, with its defenses.
        checkpoint: says at which spacing.
        spacing: voxel size of the images in mm, one per axis.

    Raises:
        ConfigError: if the checkpoint does not say so.
    """
    working = read_checkpoint(checkpoint)[1].spacing
    if working is None:
        raise ConfigError(
            f"victim {victim.name}: {checkpoint} does not say at which spacing it was trained: leave resample out"
        )
    return victim.resampled(spacing, working)


def spacing_note(checkpoint: str | Path, root: str | Path, scheme: str | None = None) -> str | None:
    """What to say where a network was trained at another voxel size than that of a folder's first subject; else None.

    Args:
        checkpoint: of the victim.
        root: folder of images.
        scheme: label scheme where the names do not settle it.
    """
    try:
        working, items = read_checkpoint(checkpoint)[1].spacing, scan(root, scheme).items
    except MonaiAdvError:  # whoever uses them says so, after what is cheaper to check
        return None
    headers = read_case_headers(items[0])[0] if items and working is not None else {}
    if working is None or not headers:
        return None
    size = next(iter(headers.values())).spacing[: len(working)]
    if max(abs(a - b) for a, b in zip(sorted(size), sorted(working))) <= 0.01:
        return None
    trained, own = (" x ".join(f"{step:g}" for step in steps) for steps in (working, size))
    return (
        f"{checkpoint} was trained at {trained} mm and {items[0]['subject']} has {own} mm: use resample (--resample) "
        "unless the network is to see it as it is"
    )


def defense_kind(entry: VictimEntry) -> str:
    """What kind of defense a victim is, one of :data:`monai_adv.studies.defended.KINDS`.

    Raises:
        ConfigError: if its checkpoint names a method that is not known.
    """
    if entry.defense is not None:
        return str(entry.defense)
    if entry.smooth is not None:
        return "smoothing"
    if entry.purify is not None:
        return "purification"
    if entry.checkpoint is None:
        return "none"
    method = read_checkpoint(entry.checkpoint)[1].training.get("method") or {"name": "plain"}
    if method["name"] not in METHODS:
        raise ConfigError(
            f"victim {entry.name}: {entry.checkpoint} was trained by {method['name']!r}, which is not known here: say "
            f"defense: one of {', '.join(KINDS)}"
        )
    return METHODS[method["name"]]
