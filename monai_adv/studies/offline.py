"""Adversarial training with offline copies: the training set attacked once, as files, beside the originals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_adv.attacks import attack_class
from monai_adv.errors import ConfigError
from monai_adv.studies.export import attack_files
from monai_adv.studies.units import read_json, safe_name


def adversarial_copies(
    items: Sequence[Mapping[str, Any]],
    root: str | Path,
    checkpoint: str | Path,
    output: str | Path,
    attack: Mapping[str, Any],
    *,
    scheme: str | None = None,
    on_subject: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Attack a trained network once on each of its training subjects, and give back originals and copies.

    The copies are NIfTI files on the scans' own grid, stored as the scans are (see
    ``monai_adv.studies.export.attack_files``), so that they go through loading and normalisation as the originals
    do. Their labels are the true ones (moved with the anatomy where the attack moves it). Train on the result,
    starting from the same checkpoint: ``TrainConfig(init=checkpoint)``.

    Reference:
        Liu et al. 2019 (arXiv 1908.00656): adversarial training by data augmentation.

    Args:
        items: datalist with labels, subjects of ``root``.
        root: their folder.
        checkpoint: the trained network that is attacked.
        output: folder to write the copies to.
        attack: ``{"name": "ifgsm", "eps": 0.1, **options}`` for :func:`monai_adv.attacks.create`.
        scheme: label scheme where the names do not settle it.
        on_subject: called with subjects done and their number (for a progress bar).

    Returns:
        The items followed by a copy of each, with ``subject`` and the attack's name joined by ``+``; and one line for
        every subject that could not be attacked (its original stays).

    Raises:
        ConfigError: for an unknown subject or attack.
        WriteError: if the folder cannot be written.
    """
    if "name" not in attack:
        raise ConfigError("offline copies need an attack by its name, e.g. attack=ifgsm")
    by_subject = {str(item["subject"]): item for item in items}
    copies, problems = [], []
    done = attack_files(root, checkpoint, output, attack, list(by_subject), scheme)
    for count, exported in enumerate(done, start=1):
        if on_subject is not None:
            on_subject(count, len(by_subject))
        if exported.error is not None:
            problems.append(exported.error)
            continue
        assert exported.folder is not None
        item, stem = by_subject[exported.subject], safe_name(exported.subject)
        written = read_json(exported.folder / f"{stem}_attack.json") or {}
        moved = exported.folder / f"{stem}_seg.nii.gz"
        copies.append(
            {
                # one file per modality, in canonical order, whatever the original was
                **{key: value for key, value in item.items() if key != "channels"},
                "image": [str(exported.folder / name) for name in written["adversarial"]],
                "label": str(moved) if attack_class(attack["name"]).moves_voxels else item["label"],
                "subject": f"{exported.subject}+{attack['name']}",
            }
        )
    return [*map(dict, items), *copies], problems
