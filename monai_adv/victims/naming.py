"""The names that other people's pipelines give to modalities, classes and regions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from monai_adv.data.labels import MODALITIES, REGIONS
from monai_adv.errors import ConfigError
from monai_adv.victims.head import Head

_MODALITIES = {
    "T1": ("t1", "t1w", "t1n", "t1weighted", "t1native"),
    "T1c": ("t1c", "t1ce", "t1gd", "t1wce", "t1cw", "t1post", "t1contrast", "t1contrastenhanced", "cet1", "t1wgd"),
    "T2": ("t2", "t2w", "t2weighted"),
    "FLAIR": ("flair", "t2f", "t2flair", "fla"),
}
_REGIONS = {
    "TC": ("tc", "tumorcore", "tumourcore"),
    "WT": ("wt", "wholetumor", "wholetumour"),
    "ET": ("et", "enhancingtumor", "enhancingtumour", "enhancing"),
}
_CLASSES = {
    "NCR": ("ncr", "ncrnet", "net", "necrosis", "necroticcore", "necrotic", "necrotictumorcore", "nonenhancingtumor"),
    "ED": ("ed", "edema", "oedema", "peritumoraledema", "snfh"),
    "ET": _REGIONS["ET"],
}


def modality(name: str) -> str | None:
    """The canonical modality (T1, T1c, T2, FLAIR) of a name, or None.

    Example:
        >>> modality("T1-Gd"), modality("t2f"), modality("CT")
        ('T1c', 'FLAIR', None)
    """
    return _known(name, _MODALITIES)


def region(name: str) -> str:
    """The BraTS region (TC, WT, ET) of a name, or the name itself.

    Example:
        >>> region("Whole tumor"), region("spleen")
        ('WT', 'spleen')
    """
    return _known(name, _REGIONS) or str(name)


def channel_order(names: Sequence[str]) -> tuple[int, ...]:
    """For every channel of a network its place in T1, T1c, T2, FLAIR: what ``image[:, order]`` brings to its order.

    Raises:
        ConfigError: if the names are not the four modalities.

    Example:
        >>> channel_order(["T1c", "T1", "T2", "FLAIR"])
        (1, 0, 2, 3)
    """
    found = [modality(name) for name in names]
    if sorted(str(m) for m in found) != sorted(MODALITIES):
        raise ConfigError(
            f"the channels {', '.join(map(str, names))} are not {', '.join(MODALITIES)} in some order: name them, "
            "e.g. channels=['T1c', 'T1', 'T2', 'FLAIR']"
        )
    return tuple(MODALITIES.index(str(m)) for m in found)


def head_of_classes(classes: Mapping[int, str]) -> Head:
    """The softmax head of named classes: BraTS regions where they are BraTS classes, else one region each.

    Args:
        classes: class index -> name, without the background.

    Example:
        >>> head_of_classes({1: "edema", 2: "necrosis", 3: "enhancing tumor"}).regions
        {'WT': (1, 2, 3), 'TC': (2, 3), 'ET': (3,)}
        >>> head_of_classes({1: "spleen"}).regions
        {'spleen': (1,)}
    """
    known = {_known(name, _CLASSES): index for index, name in classes.items()}
    if set(known) == set(_CLASSES) and len(classes) == len(known):
        canonical = {1: known["NCR"], 2: known["ED"], 3: known["ET"]}
        return Head("softmax", {n: tuple(sorted(canonical[i] for i in members)) for n, members in REGIONS.items()})
    return Head("softmax", {region(name): (index,) for index, name in classes.items()})


def _known(name: str, names: Mapping[str, Sequence[str]]) -> str | None:
    plain = re.sub(r"[^a-z0-9]", "", str(name).lower())
    return next((canonical for canonical, others in names.items() if plain in others), None)
