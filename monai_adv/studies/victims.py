"""The victims of a study: checkpoints of this package, or MONAI bundles."""

from __future__ import annotations

from monai_adv.bundle import load_bundle
from monai_adv.bundle.scans import scan_victim
from monai_adv.studies.config import VictimEntry
from monai_adv.studies.units import digest
from monai_adv.victims import Victim, load_victim
from monai_adv.victims.checkpoint import file_hash


def load_entry(entry: VictimEntry, device: str) -> tuple[Victim, str]:
    """The victim of an entry, and the hash under which its results count.

    Raises:
        CheckpointError: if weights cannot be read.
        ConfigError: for a bundle that is not trusted, or that does not say what is needed.
    """
    described = entry.model_dump(mode="json", exclude={"checkpoint", "bundle", "trust"}, exclude_defaults=True)
    if entry.bundle is not None:
        found = load_bundle(entry.bundle, entry.trust, device=device)
        return scan_victim(found, entry.name), digest([found.sha256, file_hash(found.weights), described])
    assert entry.checkpoint is not None
    changes = {k: getattr(entry, k) for k in ("overlap", "mode", "roi_size", "sw_batch_size")}
    victim = load_victim(entry.checkpoint, name=entry.name, device=device, **changes)
    return victim, digest([file_hash(entry.checkpoint), described])
