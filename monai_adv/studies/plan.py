"""What a study consists of: subjects, settings and the keys of its units, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from monai_adv.data import scan
from monai_adv.errors import ConfigError, DataError, did_you_mean
from monai_adv.handlers import setting_label
from monai_adv.studies import cases
from monai_adv.studies.config import FILES, AttackEntry, StudyConfig
from monai_adv.studies.cost import CLEAN, Passes, header_shape, passes, votes, windows
from monai_adv.studies.shards import Shard, assign
from monai_adv.studies.units import SCHEMA, digest, read_checked, write_checked
from monai_adv.victims import Victim, read_checkpoint
from monai_adv.victims.checkpoint import file_hash

PLAN = "plan.json"
KEYS = "keys"
_SAID = ("victim", "attack", "method", "eps", "units", "norm", "setting")


@dataclass(frozen=True, slots=True)
class Setting:
    """A victim under an attack at a budget: everything of a unit but its subject.

    Attributes:
        victim, attack, method, eps, units, norm, setting: as in the table of records.
        entry: of the study; None for the clean images.
        described: what the key says of the attack.
        about: what the key says of data and threat.
        mask: hash of the mask on disk that the attack aims at, or None.
        victim_hash: of the victim.
        passes: that it is declared to need over the volume.
    """

    victim: str
    attack: str
    method: str
    eps: float
    units: str
    norm: str
    setting: str
    entry: AttackEntry | None = field(compare=False)
    described: Any = field(compare=False)
    about: Any = field(compare=False)
    mask: str | None
    victim_hash: str
    passes: Passes

    def identity(self, subject: str) -> dict[str, Any]:
        """Columns that say which unit it is."""
        return {"subject": subject, **{name: getattr(self, name) for name in _SAID}}

    def key(self, subject: str, case_hash: str, seed: int) -> str:
        """Under which the unit's result counts: everything that decides it."""
        about = [self.victim_hash, case_hash, self.described, self.mask, self.about, seed]
        return digest([SCHEMA, self.identity(subject), *about])


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit: who is attacked by what, and the key under which its result counts."""

    subject: str
    setting: Setting
    key: str

    @property
    def identity(self) -> dict[str, Any]:
        """Columns that say which unit it is."""
        return self.setting.identity(self.subject)

    @property
    def entry(self) -> AttackEntry | None:
        """The attack's entry of the study; None for the clean image."""
        return self.setting.entry

    @property
    def eps(self) -> float:
        """The budget."""
        return self.setting.eps


@dataclass
class Plan:
    """What a study consists of, and what of it is this process's.

    Units stand in the order of subjects, victims as the study names them, the clean image, attacks, budgets. The
    budgets of one attack are a group: they share passes and stay together.

    Attributes:
        study: the study.
        items: datalist items of its subjects.
        by_subject: every usable item of the folder; a target may be another subject.
        groups: settings by victim and attack.
        victims: by name.
        problems: what is wrong with the data, one line each.
        shard: this process's part.
        own: of every subject the indices of the groups that are this process's.
        keys: of every subject that was read, the keys of its own groups; a subject that cannot be read is None.
    """

    study: StudyConfig
    items: list[dict[str, Any]]
    by_subject: dict[str, dict[str, Any]]
    groups: list[list[Setting]]
    victims: Mapping[str, Victim]
    problems: list[str]
    shard: Shard = field(default_factory=lambda: Shard(1, 1))
    own: list[list[int]] = field(default_factory=list)
    keys: dict[str, list[list[str]] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dealt = [[0] * len(self.groups)] * len(self.items)
        if not self.shard.whole:
            dealt = assign(self.costs(), self.shard.count)
        mine = self.shard.index - 1
        self.own = [[group for group, shard in enumerate(shards) if shard == mine] for shards in dealt]

    @property
    def total(self) -> int:
        """Units of this process."""
        return sum(len(self.groups[group]) for own in self.own for group in own)

    @property
    def digest(self) -> str:
        """Hash of everything but the files of the subjects: those a shard knows of its own only."""
        settings = [
            [[getattr(s, n) for n in _SAID], s.victim_hash, s.described, s.mask, s.about]
            for g in self.groups
            for s in g
        ]
        return digest([SCHEMA, [item["subject"] for item in self.items], settings, self.study.seed])

    def read_keys(self) -> None:
        """Hash the files of this process's subjects; one that cannot be read is a problem."""
        for item, own in zip(self.items, self.own):
            subject = item["subject"]
            if not own:
                continue
            try:
                content = cases.item_hash(item)
            except OSError as error:
                self.problems.append(f"{subject}: cannot read {error.filename}: {error.strerror}")
                self.keys[subject] = None
                continue
            seed = self.study.seed
            self.keys[subject] = [[s.key(subject, content, seed) for s in self.groups[group]] for group in own]

    def units(self) -> Iterator[tuple[dict[str, Any], list[list[Unit]]]]:
        """This process's units: of every subject its item and the groups."""
        for item, own in zip(self.items, self.own):
            subject = item["subject"]
            keys = self.keys.get(subject)
            if keys is not None:
                yield (
                    item,
                    [
                        [Unit(subject, setting, key) for setting, key in zip(self.groups[group], found)]
                        for group, found in zip(own, keys)
                    ],
                )

    def windows(self, item: Mapping[str, Any]) -> dict[str, int]:
        """Windows of one pass of every victim over a subject, by the header's size.

        The crop to the brain makes them fewer. A header that cannot be read counts as one: nor can the subject.
        """
        found = header_shape(item, self.study.data.orientation)
        if found is None:
            return dict.fromkeys(self.victims, 1)
        shape, spacing = found
        return {
            name: windows(victim.resampled(spacing, self.spacings[name]) if name in self.spacings else victim, shape)
            for name, victim in self.victims.items()
        }

    @cached_property
    def spacings(self) -> dict[str, Sequence[float]]:
        """Voxel size of the network, of every victim that is run at it."""
        found = {v.name: read_checkpoint(v.source)[1].spacing for v in self.study.victims if v.resample}
        return {name: spacing for name, spacing in found.items() if spacing is not None}

    def costs(self) -> list[list[float]]:
        """Cost of every subject's groups: forward and backward passes x windows."""
        found = []
        for item in self.items:
            count = self.windows(item)
            found.append([float(sum(s.passes.total for s in g) * count[g[0].victim]) for g in self.groups])
        return found

    def write(self, folder: Path) -> None:
        """Write ``plan.json``, alike in every shard, and the keys of this process's units."""
        whole = self.digest
        settings = [s.identity("") for group in self.groups for s in group]
        content = {"schema": SCHEMA, "digest": whole, "subjects": [item["subject"] for item in self.items],
                   "settings": [{k: v for k, v in s.items() if k != "subject"} for s in settings]}  # fmt: skip
        if read_checked(folder / PLAN) != content:
            write_checked(folder / PLAN, content)
        starts = [sum(len(g) for g in self.groups[:k]) for k in range(len(self.groups))]
        keys: dict[str, Any] = {}
        for item, own in zip(self.items, self.own):
            found = self.keys.get(item["subject"])
            if own:
                places = [starts[group] + k for group in own for k in range(len(self.groups[group]))]
                flat = [] if found is None else [key for group in found for key in group]
                keys[item["subject"]] = None if found is None else dict(zip(map(str, places), flat))
        path = folder / KEYS / f"{self.shard.name}.json"
        body = {"schema": SCHEMA, "plan": whole, "problems": self.problems, "keys": keys}
        write_checked(path, body, indent=None)
        for other in (folder / KEYS).glob("*.json"):
            if not other.stem.endswith(f"-of-{self.shard.count}"):
                other.unlink(missing_ok=True)  # of an earlier run with another number of shards


def find_items(study: StudyConfig) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], list[str]]:
    """The items to run, every usable item of the folder by subject, and what is wrong with wanted ones.

    Raises:
        ConfigError: for a subject that is not there.
        DataError: if no subject is left.
    """
    found = scan(study.data.root, study.data.scheme)
    errors = [p for p in found.problems if p.severity == "error"]
    names = sorted({i["subject"] for i in found.items} | {p.subject for p in found.problems if p.subject})
    if study.data.every is not None:
        names = names[:: study.data.every]
    if study.data.subjects is not None:
        missing = sorted(set(study.data.subjects) - set(names))
        if missing:
            near = did_you_mean(missing[0], names) or f"; names: monai-adv check {study.data.root}"
            raise ConfigError(f"subjects {', '.join(missing)} are not in {study.data.root}{near}")
        names = list(study.data.subjects)
    wanted = set(names)
    items = [item for item in found.items if item["subject"] in wanted]
    if not items:
        raise DataError("\n".join([f"no usable subject in {study.data.root}", *map(str, errors)]))
    problems = [str(p) for p in errors if not p.subject or p.subject in wanted]
    return items, {item["subject"]: item for item in found.items}, problems


def study_settings(
    study: StudyConfig, victims: Mapping[str, Victim | None], hashes: Mapping[str, str], masks: Mapping[str, str | None]
) -> list[list[Setting]]:
    """Every setting of a study, those of one victim and attack together.

    Args:
        study: the study.
        victims: by name; they tell how many passes a scored prediction takes.
        hashes: of the victims.
        masks: of attacks by title, see :func:`target_hashes`.
    """
    budgets = study.budgets
    data = study.data.model_dump(mode="json", include={"orientation", "crop"})
    # what a description of the threat does not tell: support, bounds, slope of the stored values
    changed = budgets.model_dump(mode="json", exclude={"eps", "units", "norm"}, exclude_defaults=True)
    groups = []
    for victim, loaded in victims.items():
        scored = Passes((votes(loaded) if loaded is not None else 1) - 1, 0)
        for entry in (None, *(a for a in study.attacks if a.runs_on(victim))):
            group = []
            for eps in [0.0] if entry is None else entry.eps(budgets.eps):
                title = "clean" if entry is None else entry.title
                attack = None if entry is None else study.create(entry, eps)
                units, norm = budgets.units, budgets.norm
                if attack is not None:
                    units, norm = attack.threat.units, attack.threat.norm
                told = None if entry is None else entry.model_dump(exclude={"only"})  # who else gets it decides nothing
                group.append(
                    Setting(
                        victim, title, "clean" if entry is None else entry.name, eps, units, norm,
                        setting_label(title, eps, units, norm), entry,
                        None if told is None or attack is None else attack.parameters() | told,
                        data if entry is None or not changed else {**data, "budgets": changed},
                        masks.get(title), hashes[victim], (CLEAN if attack is None else passes(attack)) + scored,
                    )
                )  # fmt: skip
            groups.append(group)
    return groups


def target_hashes(study: StudyConfig, items: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """Of every attack by title: hash of the mask that it aims at, and of other files that its options name.

    Raises:
        ConfigError: if one cannot be read.
    """
    return {entry.title: _target_hash(entry, items) for entry in study.attacks}


def _target_hash(entry: AttackEntry, items: Mapping[str, Mapping[str, Any]]) -> str | None:
    files = [file_hash(path) for path in _files(entry.options)]
    rule = entry.options.get("target")
    if not isinstance(rule, dict) or not set(rule) & {"subject", "file"}:
        return digest(files) if files else None
    if "subject" in rule and rule["subject"] not in items:
        raise ConfigError(
            f"attack {entry.title}: target subject {rule['subject']!r} is not in the data: {', '.join(sorted(items))}"
        )
    path = rule["file"] if "file" in rule else items[rule["subject"]]["label"]
    try:
        return digest([file_hash(path), *files]) if files else file_hash(path)
    except OSError as error:
        raise ConfigError(f"attack {entry.title}: target {path} cannot be read: {error.strerror}") from error


def _files(options: Any) -> list[str]:
    """Files that an attack's options name (a surrogate's checkpoint, a perturbation), also in attacks of attacks."""
    if isinstance(options, list):
        return [path for member in options for path in _files(member)]
    if not isinstance(options, dict):
        return []
    own = [v for k, v in options.items() if k in FILES and isinstance(v, str)]
    return own + [path for k in ("attack", "attacks") for path in _files(options.get(k))]
