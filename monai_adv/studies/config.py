"""A study as validated plain data: which subjects, victims, attacks and budgets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from monai_adv.attacks import attack_class, create
from monai_adv.errors import ConfigError, MonaiAdvError, did_you_mean
from monai_adv.studies.defended import KINDS
from monai_adv.studies.oom import Step
from monai_adv.studies.plain_yaml import read_yaml
from monai_adv.studies.trackers import MLflowConfig, TrackersConfig
from monai_adv.studies.trackers import Strict as _Strict
from monai_adv.studies.units import safe_name

FILES = ("surrogate", "perturbation")  # options of attacks that name a file


class DataConfig(_Strict):
    """Where the subjects are.

    Args:
        root: folder of NIfTI files in a BraTS or MSD layout.
        scheme: label scheme where the names do not settle it.
        subjects: names of the subjects to take; all if None.
        every: take every n-th subject by name, from the first: those that ``monai-adv train --hold-out n`` left out.
        orientation: axis codes everything is brought to without resampling.
        crop: crop to the foreground plus this margin in voxels before inference; None does not crop.
    """

    root: Path
    scheme: str | None = None
    subjects: list[str] | None = None
    every: int | None = Field(default=None, ge=1)
    orientation: str | None = Field(default="RAS", pattern="^[RLAPSI]{3}$")
    crop: int | None = Field(default=4, ge=0)


class VictimEntry(_Strict):
    """A checkpoint and how it is deployed (None keeps what it says), or a MONAI bundle as it deploys itself.

    Args:
        name: how tables call it.
        checkpoint: file written by ``monai-adv train``.
        bundle: folder of a MONAI bundle, instead of a checkpoint; see docs/bundles.md.
        trust: SHA-256 of the bundle's configuration, which is executed.
        overlap: overlap of windows.
        mode: blending.
        roi_size: window in voxels, one side per axis of the network.
        sw_batch_size: windows per forward.
        resample: run the network at the voxel size it was trained at, whatever the scan's is.
        purify: a filter in front of everything, ``{kind: median, radius: 1}``: see :class:`monai_adv.defenses.Purify`.
        smooth: randomized smoothing, ``{sigma: 0.25, samples: 20}``: see :func:`monai_adv.defenses.smoothed`.
        defense: what kind of defense the victim is, which decides what an adaptive attack is; found out from the
            entry and from the checkpoint's own method if None.
    """

    name: str
    checkpoint: Path | None = None
    bundle: Path | None = None
    trust: str | None = None
    overlap: float | None = Field(default=None, ge=0, lt=1)
    mode: Literal["gaussian", "constant"] | None = None
    roi_size: list[int] | None = Field(default=None, min_length=2, max_length=3)
    sw_batch_size: int | None = Field(default=None, ge=1)
    resample: bool = False
    purify: dict[str, Any] | None = None
    smooth: dict[str, Any] | None = None
    defense: Literal[KINDS] | None = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _one_source(self) -> VictimEntry:
        if (self.checkpoint is None) == (self.bundle is None):
            raise ValueError(f"victim {self.name}: give either a checkpoint or a bundle")
        given = self.model_dump(exclude={"name", "checkpoint", "bundle"}, exclude_defaults=True)
        if self.bundle is None and self.trust is not None:
            raise ValueError(f"victim {self.name}: trust goes with a bundle; a checkpoint executes nothing")
        own = set(given) - {"trust", "purify", "smooth", "defense"}
        if self.bundle is not None and own:
            raise ValueError(f"victim {self.name}: {', '.join(sorted(own))}: a bundle says how it is deployed")
        return self

    @property
    def source(self) -> Path:
        """The checkpoint or the bundle."""
        found = self.checkpoint if self.checkpoint is not None else self.bundle
        assert found is not None
        return found


class AttackEntry(BaseModel):
    """An attack by name with its options.

    Args:
        name: of the attack.
        label: what tables call it; its name if None.
        only: victims it is run on, e.g. an attack that adapts to one defense; all if None.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    label: str | None = None
    only: list[str] | None = None

    def runs_on(self, victim: str) -> bool:
        """Whether a victim gets this attack."""
        return self.only is None or victim in self.only

    @property
    def title(self) -> str:
        """Name in tables."""
        return self.label or self.name

    @property
    def options(self) -> dict[str, Any]:
        """Options for ``attacks.create``, without the entry's own budgets."""
        return {k: v for k, v in (self.model_extra or {}).items() if k != "eps"}

    @property
    def follows(self) -> bool:
        """Whether the attack is run at the study's budgets; others have budgets of their own (mm, unbounded ...)."""
        return attack_class(self.name).default_eps is None

    def eps(self, shared: Sequence[float]) -> list[float]:
        """The budgets of this attack: the study's, or its own (its default where the entry names none)."""
        default = attack_class(self.name).default_eps
        if default is None:
            return list(shared)
        own = (self.model_extra or {}).get("eps", default)
        return [float(e) for e in (own if isinstance(own, (list, tuple)) else [own])]


class BudgetConfig(_Strict):
    """The threat model every attack gets that searches a norm ball.

    Attacks whose budget is of another kind (mm, degrees, unbounded) take ``eps`` in their own entry; support and
    channels hold for them too.

    Args:
        eps: budgets in ``units``.
        units: "std", "range" or "absolute".
        norm: "linf" or "l2".
        channels: indices of the modalities that may change; all if None.
        support: "foreground" (non-zero voxels of each channel) or "all".
        bounds: "data", a pair of numbers, or None.
        proportions: budgets of the modalities as multiples of eps, one number each; equal if None.
        quantize: integer type the scans are stored in, e.g. "int16", or ``{dtype: int16, slope: 0.5, inter: 0}``:
            attacks use only values such files hold. None leaves values free.
    """

    eps: list[float] = Field(min_length=1)
    units: Literal["std", "range", "absolute"] = "std"
    norm: Literal["linf", "l2"] = "linf"
    channels: list[int] | None = None
    support: Literal["foreground", "all"] = "foreground"
    bounds: Literal["data"] | tuple[float, float] | None = "data"
    proportions: list[float] | None = None
    quantize: str | dict[str, Any] | None = None

    @field_validator("eps")
    @classmethod
    def _sane(cls, eps: list[float]) -> list[float]:
        if any(not 0 < value < float("inf") for value in eps) or len(set(eps)) != len(eps):
            raise ValueError("eps must be different finite numbers > 0 (the clean images are always scored)")
        return eps


class FigureConfig(_Strict):
    """What is drawn.

    Args:
        montages: subjects, the first by name, that are drawn and shown in the viewer.
        eps: at which budget; the largest if None.
    """

    montages: int = Field(default=2, ge=0)
    eps: float | None = None


class CompareConfig(_Strict):
    """The family of tests, declared before looking.

    Args:
        metric: column of the records that is compared: dice, hd95, iou.
        baseline: attack that the others are compared with.
        alpha: level of significance, of the whole family.
        zero_method: what becomes of pairs without a difference.
        alternative: of the test, setting against baseline.
    """

    metric: str = "dice"
    baseline: str = "clean"
    alpha: float = Field(default=0.05, gt=0, lt=1)
    zero_method: Literal["pratt", "wilcox", "zsplit"] = "pratt"
    alternative: Literal["two-sided", "less", "greater"] = "two-sided"


class ChecksConfig(_Strict):
    """The automatic checks that compute something, see :func:`monai_adv.studies.probes.run_probes`.

    Args:
        probes: whether they are run; the checks of the table and of the stored units always are.
        subjects: on how many subjects of the study, the smallest first.
    """

    probes: bool = True
    subjects: int = Field(default=1, ge=1)


class StudyConfig(_Strict):
    """A study: victims x attacks x budgets x subjects.

    Args:
        title: of the report.
        data: the subjects.
        victims: who is attacked.
        attacks: how.
        budgets: within what threat model.
        seed: of every random number.
        output: the run folder.
        compare: the family of tests.
        figures: what is drawn.
        checks: the automatic checks that compute something.
        device: "cpu", "cuda" (of several processes each takes its own) or "cuda:1".
        on_oom: what may be tried, in this order, when memory runs out: sw_batch_size (fewer windows per forward),
            recompute (no window's graph is kept), stitch_cpu, cpu. Nothing if empty; each step is recorded with the
            result, and the window and its overlap stay as they are.
        trackers: TensorBoard or MLflow, see :class:`monai_adv.studies.trackers.TrackersConfig`.
    """

    title: str = "Vulnerability of a segmentation network"
    data: DataConfig
    victims: list[VictimEntry] = Field(min_length=1)
    attacks: list[AttackEntry] = Field(min_length=1)
    budgets: BudgetConfig
    seed: int = 0
    output: Path
    compare: CompareConfig = Field(default_factory=CompareConfig)
    figures: FigureConfig = Field(default_factory=FigureConfig)
    checks: ChecksConfig = Field(default_factory=ChecksConfig)
    device: str = "cpu"
    on_oom: list[Step] = Field(default_factory=list)
    trackers: TrackersConfig = Field(default_factory=TrackersConfig)

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        for name in [v.name for v in self.victims] + [a.title for a in self.attacks]:
            if not name or name[0] in "=+-@" or not name.isprintable():
                raise ValueError(f"name {name!r}: use printable text that does not begin with = + - @")
            if len(name) > 100:
                raise ValueError(f"name {name[:20]!r}...: use at most 100 characters, or no figure has room for it")
        for attack in self.attacks:
            try:
                own = attack.eps(self.budgets.eps)
            except (MonaiAdvError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"attack {attack.title}: {error}") from error
            if any(not value > 0 for value in own) or len(set(own)) != len(own):
                raise ValueError(f"attack {attack.title}: eps must be different numbers > 0, got {own}")
            taken = sorted(set(attack.model_extra or {}) & (set(BudgetConfig.model_fields) - {"eps"}))
            if attack.follows and "eps" in (attack.model_extra or {}):
                taken.append("eps")
            if taken:
                raise ValueError(
                    f"attack {attack.title}: {', '.join(taken)} belong under budgets: every attack of a study has the "
                    "same threat model"
                )
        for what, names in (("victims", [v.name for v in self.victims]), ("attacks", [a.title for a in self.attacks])):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what} named twice: {', '.join(twice)}; give them different names or labels")
            files = [safe_name(n).casefold() for n in names]
            alike = [n for n, file in zip(names, files) if files.count(file) > 1]
            if alike:
                raise ValueError(f"{what} {', '.join(map(repr, alike))} would share files: give them other names")
        if "clean" in [a.title for a in self.attacks]:
            raise ValueError("'clean' is scored always; leave it out of attacks")
        for attack in self.attacks:
            strangers = sorted(set(attack.only or []) - {v.name for v in self.victims})
            if strangers or attack.only == []:
                raise ValueError(f"attack {attack.title}: only names no victim of the study: {', '.join(strangers)}")
            try:
                self.create(attack, attack.eps(self.budgets.eps)[0])
            except (MonaiAdvError, TypeError) as error:
                raise ValueError(f"attack {attack.title}: {error}") from error
        if self.figures.eps is not None and self.figures.eps not in self.budgets.eps:
            raise ValueError(f"figures.eps {self.figures.eps} is not one of the budgets {self.budgets.eps}")
        return self

    def create(self, attack: AttackEntry, eps: float) -> Any:
        """The attack object of an entry."""
        shared = self.budgets.model_dump(exclude={"eps"})
        kind = attack_class(attack.name)
        if kind.norms == ("parameter",):  # a physical change: no norm ball, and no bounds on what physics does
            shared = {"support": self.budgets.support, "quantize": self.budgets.quantize}
            if self.budgets.channels is not None:
                shared["channels"] = self.budgets.channels
        target = attack.options.get("target")
        options = dict(attack.options)
        if isinstance(target, dict) and set(target) & {"subject", "file"}:
            extra = set(target) - ({"subject"} if "subject" in target else {"file", "scheme"})
            if extra:
                raise ConfigError(f"target {target}: write {{subject: name}} or {{file: path, scheme: name}}")
            if not all(isinstance(value, str) for value in target.values()):
                raise ConfigError(f"target {target}: its values must be text")
            options["target"] = "background"  # a mask on disk is read per subject and given in the call
        return create(attack.name, eps=eps, **{**shared, **options})

    def drawn_eps(self, title: str) -> float:
        """The budget of an attack that is drawn and tabled as its strongest: ``figures.eps``, or its largest."""
        entry = next(a for a in self.attacks if a.title == title)
        if entry.follows and self.figures.eps is not None:
            return self.figures.eps
        return max(entry.eps(self.budgets.eps))

    def fingerprint(self) -> str:
        """Hash of what a run folder is about: data, victims and seed.

        Not title, output or figures; and not which subjects, attacks and budgets are taken, so that a study can grow
        in its folder (the key of every unit holds them, and the tables show what the study names).
        """
        return hashlib.sha256(json.dumps(self.fingerprint_parts(), sort_keys=True).encode()).hexdigest()

    def fingerprint_parts(self) -> dict[str, Any]:
        """What :meth:`fingerprint` is the hash of."""
        content = self.model_dump(mode="json", include={"data", "victims", "seed"}, exclude_defaults=True)
        content["data"] = {k: v for k, v in content["data"].items() if k not in ("subjects", "every")}
        content["data"]["root"] = str(self.data.root.resolve())
        for entry, victim in zip(content["victims"], self.victims):
            entry.pop("trust", None)  # whether the bundle may run; what it is stands in every unit's key
            entry["checkpoint" if victim.bundle is None else "bundle"] = str(victim.source.resolve())
        return content


def load_study(path: str | Path) -> StudyConfig:
    """Read and validate a study from YAML; relative paths in it are relative to the file.

    Raises:
        ConfigError: names the file, the key, and for an unknown key the nearest known one.
    """
    path = Path(path)
    content = read_yaml(path, "study")
    if not isinstance(content, dict):
        raise ConfigError(f"study {path} must be a mapping with the keys {', '.join(StudyConfig.model_fields)}")
    folder = path.parent
    _resolve(content.get("attacks"), folder)
    study = study_from(content, where=str(path))
    study.data.root = folder / study.data.root
    study.output = folder / study.output
    study.trackers = study.trackers.resolved(folder)
    for victim in study.victims:
        if victim.bundle is not None:
            victim.bundle = folder / victim.bundle
        else:
            victim.checkpoint = folder / victim.source
    for attack in study.attacks:
        target = attack.options.get("target")
        if isinstance(target, dict) and "file" in target:
            target["file"] = str(folder / target["file"])
    return study


def _resolve(options: Any, folder: Path) -> None:
    """Make the files that an attack's options name relative to the study, also inside attacks made of attacks."""
    if isinstance(options, list):
        for member in options:
            _resolve(member, folder)
    if not isinstance(options, dict):
        return
    for key, value in options.items():
        if key in FILES and isinstance(value, str):
            options[key] = str(folder / value)
        elif key in ("attack", "attacks"):
            _resolve(value, folder)


def study_from(content: dict[str, Any], where: str = "study") -> StudyConfig:
    """Validate a study given as plain data.

    Raises:
        ConfigError: see :func:`load_study`.
    """
    try:
        return StudyConfig.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place, message = ".".join(map(str, problem["loc"])) or "study", problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = "unknown key" + _suggestion(problem["loc"])
            elif problem["type"] == "missing":
                message = "is missing"
            elif problem["type"] == "list_type":
                message = f"must be a list: write [{problem['input']}]"
            lines.append(f"{where}: {place}: {message}")
        raise ConfigError("\n".join(lines)) from error


_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "victims": VictimEntry,
    "budgets": BudgetConfig,
    "figures": FigureConfig,
    "compare": CompareConfig,
    "checks": ChecksConfig,
    "trackers": TrackersConfig,
    "trackers.mlflow": MLflowConfig,
}


def _suggestion(location: tuple[int | str, ...]) -> str:
    section = _SECTIONS.get(".".join(part for part in location[:-1] if isinstance(part, str)), StudyConfig)
    known = list(section.model_fields)
    return did_you_mean(location[-1], known) or f"; known: {', '.join(known)}"
