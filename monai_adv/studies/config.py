"""A study as validated plain data: which subjects, victims, attacks and budgets."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from monai_adv.attacks import create
from monai_adv.errors import ConfigError, MonaiAdvError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataConfig(_Strict):
    """Where the subjects are.

    Args:
        root: folder of NIfTI files in a BraTS or MSD layout.
        scheme: label scheme where the names do not settle it.
        subjects: names of the subjects to take; all if None.
        every: take every n-th subject by name, from the first (the held-out sixth of a fold).
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
    """A checkpoint and how it is deployed; None keeps what the checkpoint says.

    Args:
        name: how tables call it.
        checkpoint: file written by ``monai-adv train``.
        overlap: overlap of windows.
        mode: blending.
        roi_size: window in voxels.
        sw_batch_size: windows per forward.
        resample: run the network at the voxel size it was trained at, whatever the scan's is.
    """

    name: str
    checkpoint: Path
    overlap: float | None = Field(default=None, ge=0, lt=1)
    mode: Literal["gaussian", "constant"] | None = None
    roi_size: list[int] | None = Field(default=None, min_length=3, max_length=3)
    sw_batch_size: int | None = Field(default=None, ge=1)
    resample: bool = False


class AttackEntry(BaseModel):
    """An attack by name with its options, and what tables call it."""

    model_config = ConfigDict(extra="allow")

    name: str
    label: str | None = None

    @property
    def title(self) -> str:
        """Name in tables."""
        return self.label or self.name

    @property
    def options(self) -> dict[str, Any]:
        """Options for ``attacks.create``."""
        return dict(self.model_extra or {})


class BudgetConfig(_Strict):
    """The threat model every attack gets.

    Args:
        eps: budgets in ``units``.
        units: "std", "range" or "absolute".
        norm: "linf" or "l2".
        channels: indices of the modalities that may change; all if None.
        support: "foreground" (non-zero voxels of each channel) or "all".
        bounds: "data", a pair of numbers, or None.
    """

    eps: list[float] = Field(min_length=1)
    units: Literal["std", "range", "absolute"] = "std"
    norm: Literal["linf", "l2"] = "linf"
    channels: list[int] | None = None
    support: Literal["foreground", "all"] = "foreground"
    bounds: Literal["data"] | tuple[float, float] | None = "data"

    @field_validator("eps")
    @classmethod
    def _sane(cls, eps: list[float]) -> list[float]:
        if any(not 0 < value < float("inf") for value in eps) or len(set(eps)) != len(eps):
            raise ValueError("eps must be different finite numbers > 0 (the clean images are always scored)")
        return eps


class FigureConfig(_Strict):
    """What is drawn: montages for the first subjects at one budget (the largest if None)."""

    montages: int = Field(default=2, ge=0)
    eps: float | None = None


class CompareConfig(_Strict):
    """The family of tests, declared before looking."""

    metric: str = "dice"
    baseline: str = "clean"
    alpha: float = Field(default=0.05, gt=0, lt=1)
    zero_method: Literal["pratt", "wilcox", "zsplit"] = "pratt"
    alternative: Literal["two-sided", "less", "greater"] = "two-sided"


class StudyConfig(_Strict):
    """A study: victims x attacks x budgets x subjects."""

    title: str = "Vulnerability of a segmentation network"
    data: DataConfig
    victims: list[VictimEntry] = Field(min_length=1)
    attacks: list[AttackEntry] = Field(min_length=1)
    budgets: BudgetConfig
    seed: int = 0
    output: Path
    compare: CompareConfig = Field(default_factory=CompareConfig)
    figures: FigureConfig = Field(default_factory=FigureConfig)
    device: str = "cpu"

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        for name in [v.name for v in self.victims] + [a.title for a in self.attacks]:
            if not name or name[0] in "=+-@" or not name.isprintable():
                raise ValueError(f"name {name!r}: use printable text that does not begin with = + - @")
        for attack in self.attacks:
            taken = sorted(set(attack.options) & set(BudgetConfig.model_fields))
            if taken:
                raise ValueError(
                    f"attack {attack.title}: {', '.join(taken)} belong under budgets: every attack of a study has the "
                    "same threat model"
                )
        for what, names in (("victims", [v.name for v in self.victims]), ("attacks", [a.title for a in self.attacks])):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what} named twice: {', '.join(twice)}; give them different names or labels")
        if "clean" in [a.title for a in self.attacks]:
            raise ValueError("'clean' is scored always; leave it out of attacks")
        for attack in self.attacks:
            try:
                self.create(attack, self.budgets.eps[0])
            except MonaiAdvError as error:
                raise ValueError(f"attack {attack.title}: {error}") from error
        if self.figures.eps is not None and self.figures.eps not in self.budgets.eps:
            raise ValueError(f"figures.eps {self.figures.eps} is not one of the budgets {self.budgets.eps}")
        return self

    def create(self, attack: AttackEntry, eps: float) -> Any:
        """The attack object of an entry."""
        shared = self.budgets.model_dump(exclude={"eps"})
        target = attack.options.get("target")
        options = dict(attack.options)
        if isinstance(target, dict) and set(target) & {"subject", "file"}:
            options["target"] = "background"  # a mask on disk is read per subject and given in the call
        return create(attack.name, eps=eps, **{**shared, **options})

    def fingerprint(self) -> str:
        """Hash of what decides the result of a unit; not title, output, figures, or which subjects are taken."""
        content = self.model_dump(
            mode="json", include={"data", "victims", "attacks", "budgets", "seed"}, exclude_defaults=True
        )
        content["data"] = {k: v for k, v in content["data"].items() if k not in ("subjects", "every")}
        content["data"]["root"] = str(self.data.root.resolve())
        for entry, victim in zip(content["victims"], self.victims):
            entry["checkpoint"] = str(victim.checkpoint.resolve())
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_study(path: str | Path) -> StudyConfig:
    """Read and validate a study from YAML; relative paths in it are relative to the file.

    Raises:
        ConfigError: names the file, the key, and for an unknown key the nearest known one.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"study {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"study {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"study {path} must be a mapping with the keys {', '.join(StudyConfig.model_fields)}")
    study = study_from(content, where=str(path))
    folder = path.parent
    study.data.root = folder / study.data.root
    study.output = folder / study.output
    for victim in study.victims:
        victim.checkpoint = folder / victim.checkpoint
    for attack in study.attacks:
        target = attack.options.get("target")
        if isinstance(target, dict) and "file" in target:
            target["file"] = str(folder / target["file"])
    return study


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
            place = ".".join(str(part) for part in problem["loc"]) or "study"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = "unknown key" + _suggestion(problem["loc"])
            lines.append(f"{where}: {place}: {message}")
        raise ConfigError("\n".join(lines)) from error


_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "victims": VictimEntry,
    "budgets": BudgetConfig,
    "figures": FigureConfig,
    "compare": CompareConfig,
}


def _suggestion(location: tuple[int | str, ...]) -> str:
    section = _SECTIONS.get(str(location[0]), StudyConfig) if len(location) > 1 else StudyConfig
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
