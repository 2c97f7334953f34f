"""Run a study: every unit once, each result on disk at once, a bad subject costs only itself."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from monai_adv.data import scan
from monai_adv.errors import ConfigError, DataError, MonaiAdvError, NonFiniteError, WriteError
from monai_adv.handlers import case_rows, setting_label
from monai_adv.studies import cases
from monai_adv.studies.config import FILES, AttackEntry, StudyConfig
from monai_adv.studies.provenance import versions
from monai_adv.studies.records import write_records
from monai_adv.studies.units import SCHEMA, UnitStore, digest, read_json, write_json
from monai_adv.studies.victims import at_spacing, defense_kind, load_entry
from monai_adv.studies.volumes import save_volumes, volumes_key, volumes_path
from monai_adv.victims import Victim
from monai_adv.victims.checkpoint import file_hash

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a progress display is told: units done of all, and what is going on."""

    done: int
    total: int
    what: str


@dataclass
class StudyResult:
    """How a run ended.

    Attributes:
        folder: the run folder.
        computed: units computed now.
        reused: units found finished.
        problems: one line per subject or unit that failed; empty if all is well.
    """

    folder: Path
    computed: int = 0
    reused: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Unit:
    """One unit: who is attacked by what, and the key under which its result counts."""

    identity: dict[str, Any]
    key: str
    entry: AttackEntry | None

    @property
    def eps(self) -> float:
        return float(self.identity["eps"])


def run_study(study: StudyConfig, on_progress: Callable[[Progress], None] | None = None) -> StudyResult:
    """Compute every unfinished unit of a study and write the merged table.

    Finished units are reused: a unit is finished when its file is whole and its key (victim weights, case files,
    setting, schema) matches. Failed ones are tried again. Everything is recorded in ``study.output``.

    Args:
        study: the study.
        on_progress: called before each group of units.

    Raises:
        ConfigError: if the output folder belongs to a different study, or no subject is left.
        CheckpointError: if a victim cannot be loaded.
    """
    items, by_subject, result = _prepare(study)
    loaded = {v.name: load_entry(v, study.device) for v in study.victims}
    victims = {name: victim for name, (victim, _) in loaded.items()}
    hashes = {name: content for name, (_, content) in loaded.items()}
    store = UnitStore(result.folder / "units")
    montages = [item["subject"] for item in items[: study.figures.montages]]
    runs = [len(a.eps(study.budgets.eps)) for a in study.attacks for victim in victims if a.runs_on(victim)]
    total = len(items) * (len(victims) + sum(runs))
    expected: set[str] = set()
    try:
        _run_items(study, items, by_subject, victims, hashes, store, montages, total, expected, result, on_progress)
    finally:  # an interrupted run leaves its table too
        write_records(result.folder, store, expected)
        write_json(result.folder / "problems.json", result.problems)
    if on_progress is not None:
        on_progress(Progress(total, total, "done"))
    return result


def _run_items(
    study: StudyConfig,
    items: list[dict[str, Any]],
    by_subject: dict[str, dict[str, Any]],
    victims: dict[str, Victim],
    hashes: dict[str, str],
    store: UnitStore,
    montages: list[str],
    total: int,
    expected: set[str],
    result: StudyResult,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Every subject, victim and attack; ``expected`` collects the keys that belong to this run."""
    masks = {a.title: _target_hash(a, by_subject) for a in study.attacks}
    for item in items:
        subject = item["subject"]
        try:
            case_hash = cases.item_hash(item)
        except OSError as error:
            result.problems.append(f"{subject}: cannot read {error.filename}: {error.strerror}")
            continue
        case: cases.Case | None = None
        memory: dict[str, Any] | None = {} if len(victims) > 1 else None  # what attacks keep from victim to victim
        for name, victim in victims.items():
            for group in _groups(study, subject, name, hashes[name], case_hash, masks):
                expected |= {unit.key for unit in group}
                wanted = [u for u in group if not _finished(study, store, u, result.folder, subject in montages)]
                result.reused += len(group) - len(wanted)
                if not wanted:
                    continue
                if on_progress is not None:
                    on_progress(Progress(result.computed + result.reused, total, f"{subject} {_title(wanted[0])}"))
                open_units = list(wanted)
                try:
                    case = case or cases.load(item, study.data)
                    for unit, content, volumes in _compute(study, victim, case, wanted, by_subject, memory):
                        if volumes is not None and subject in montages and _drawn(study, unit):
                            save_volumes(volumes_path(result.folder, unit.identity), volumes, unit.key)
                        store.write(unit.identity, unit.key, content)
                        open_units.remove(unit)
                        result.computed += 1
                except WriteError:
                    raise  # the next unit could not be written either
                except Exception as error:  # whatever one subject stumbles over, the others go on
                    result.problems.append(_failed(store, open_units, error))
                if case is None:
                    break  # the subject cannot be loaded: said once, not for every setting
            else:
                continue
            break


def _target_hash(entry: AttackEntry, items: dict[str, dict[str, Any]]) -> str | None:
    """Hash of the mask that an attack aims at, where it comes from a file."""
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


def _prepare(study: StudyConfig) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], StudyResult]:
    """The items to run, every usable item of the folder by subject (targets may be others), and the result so far."""
    found = scan(study.data.root, study.data.scheme)
    result = StudyResult(study.output)
    problems = [str(p) for p in found.problems if p.severity == "error"]
    names = sorted({i["subject"] for i in found.items} | {p.subject for p in found.problems if p.subject})
    if study.data.every is not None:
        names = names[:: study.data.every]
    if study.data.subjects is not None:
        missing = sorted(set(study.data.subjects) - set(names))
        if missing:
            raise ConfigError(f"subjects {', '.join(missing)} are not in {study.data.root}")
        names = list(study.data.subjects)
    items = [item for item in found.items if item["subject"] in names]
    result.problems += [p for p, f in zip(problems, (q for q in found.problems if q.severity == "error"))
                        if not f.subject or f.subject in names]  # fmt: skip
    if not items:
        raise DataError("\n".join([f"no usable subject in {study.data.root}", *problems]))
    setup = study.output / "study.json"
    content = {"schema": SCHEMA, "fingerprint": study.fingerprint(), "study": study.model_dump(mode="json"),
               "defenses": {v.name: defense_kind(v) for v in study.victims}, "versions": versions()}  # fmt: skip
    before = read_json(setup)
    if before is not None and before.get("fingerprint") != content["fingerprint"]:
        raise ConfigError(
            f"{study.output} holds the results of a different study (data, victims or seed differ); "
            "give this one another output folder, or remove that folder"
        )
    write_json(setup, content)
    return items, {item["subject"]: item for item in found.items}, result


def _groups(
    study: StudyConfig,
    subject: str,
    victim: str,
    victim_hash: str,
    case_hash: str,
    masks: dict[str, str | None],
) -> Iterator[list[_Unit]]:
    """Units of one subject and victim, those of one attack together: they share passes."""
    budgets = study.budgets
    data = study.data.model_dump(mode="json", include={"orientation", "crop"})
    # what a description of the threat does not tell: support, bounds, slope of the stored values
    changed = budgets.model_dump(mode="json", exclude={"eps", "units", "norm"}, exclude_defaults=True)
    for entry in (None, *(a for a in study.attacks if a.runs_on(victim))):
        group = []
        for eps in [0.0] if entry is None else entry.eps(budgets.eps):
            title = "clean" if entry is None else entry.title
            attack = None if entry is None else study.create(entry, eps)
            units, norm = (budgets.units, budgets.norm) if attack is None else (attack.threat.units, attack.threat.norm)
            identity = {
                "subject": subject, "victim": victim, "attack": title,
                "method": "clean" if entry is None else entry.name, "eps": eps, "units": units,
                "norm": norm, "setting": setting_label(title, eps, units, norm),
            }  # fmt: skip
            told = None if entry is None else entry.model_dump(exclude={"only"})  # who else gets it decides nothing
            described = None if told is None or attack is None else attack.parameters() | told
            mask = masks.get(title)
            about = data if entry is None or not changed else {**data, "budgets": changed}
            key = digest([SCHEMA, identity, victim_hash, case_hash, described, mask, about, study.seed])
            group.append(_Unit(identity, key, entry))
        yield group


def _finished(study: StudyConfig, store: UnitStore, unit: _Unit, folder: Path, drawn: bool) -> bool:
    content = store.read(unit.identity, unit.key)
    if content is None or content["status"] != "ok":
        return False
    if drawn and _drawn(study, unit):
        return volumes_key(volumes_path(folder, unit.identity)) == unit.key
    return True


def _drawn(study: StudyConfig, unit: _Unit) -> bool:
    """Whether a montage shows this unit: the clean images, and one budget of each attack."""
    return unit.entry is None or unit.eps == study.drawn_eps(unit.entry.title)


def _compute(
    study: StudyConfig,
    victim: Victim,
    case: cases.Case,
    units: list[_Unit],
    items: dict[str, dict[str, Any]],
    memory: dict[str, Any] | None,
) -> Iterator[tuple[_Unit, dict[str, Any], dict[str, Any] | None]]:
    """Results of the units of one attack: content to store and volumes to draw."""
    victim = _at_spacing(study, victim, case)
    image = case.image.to(study.device)
    label = victim.head.label_from_classes(case.classes).to(study.device)
    entry = units[0].entry
    if entry is None:
        prediction = victim.predict(image, case.affine)
        rows = _rows(units[0], victim, case, label, prediction, image, image, {"seconds": None}, study.budgets.support)
        yield units[0], {"status": "ok", "rows": rows}, _volumes(case, image, prediction, victim)
        return
    attack = study.create(entry, units[0].eps)
    attack.memory = memory
    target = None
    rule = entry.options.get("target")
    if isinstance(rule, dict) and set(rule) & {"subject", "file"}:
        target = cases.target_mask(rule, case, items, victim.head)
    seed = int(digest([study.seed, case.subject, entry.title])[:15], 16)
    generator = torch.Generator().manual_seed(seed)
    victim.reseed(seed)
    results = attack.curve(
        victim, image, label, [u.eps for u in units],
        target=target, generator=generator, spacing=case.spacing, affine=case.affine,
    )  # fmt: skip
    for unit, found in zip(units, results):
        cost = {"seconds": found.cost.seconds, "forwards": found.cost.forwards, "backwards": found.cost.backwards}
        extra = {**cost, "success": bool(found.success[0]), "zero_gradient": _zero_gradient(found.trace)}
        prediction = found.predicted_by(victim, case.affine)
        rows = _rows(unit, victim, case, found.label, prediction, image, found.image, extra, study.budgets.support)
        content = {
            "status": "ok",
            "rows": rows,
            "attack": attack.parameters(),
            "seed": seed,
            "trace": [{k: v[0] if hasattr(v, "__len__") else v for k, v in step.items()} for step in found.trace],
            "best_step": int(found.best_step[0]),
            "details": {name: values[0] for name, values in found.details.items()},
        }
        volumes = _volumes(case, found.image, prediction, victim)
        volumes["truth"] = victim.head.classes_from_prediction(found.label)[0, 0].to(torch.uint8).cpu().numpy()
        yield unit, content, volumes


def _at_spacing(study: StudyConfig, victim: Victim, case: cases.Case) -> Victim:
    """The victim for this case's voxels; resampling only where the study asks for it."""
    entry = next(v for v in study.victims if v.name == victim.name)
    return at_spacing(victim, entry.source, case.spacing) if entry.resample else victim


def _rows(
    unit: _Unit,
    victim: Victim,
    case: cases.Case,
    label: torch.Tensor,
    prediction: torch.Tensor,
    clean: torch.Tensor,
    adversarial: torch.Tensor,
    extra: dict[str, Any],
    support: str,
) -> list[dict[str, Any]]:
    return case_rows(
        {**unit.identity, "status": "ok", **extra},
        head=victim.head,
        prediction=prediction,
        label=label,
        spacing=case.spacing,
        clean=clean,
        adversarial=adversarial,
        support=clean != 0 if support == "foreground" else torch.ones_like(clean, dtype=torch.bool),
        truth_outside=case.truth_outside(victim.head),
    )


def _zero_gradient(trace: list[dict[str, Any]]) -> float | None:
    """Largest share of support voxels without a gradient over the steps; None if no gradient was taken."""
    shares = [float(step["zero_gradient"][0]) for step in trace]
    known = [s for s in shares if s == s]
    return max(known) if known else None


def _volumes(case: cases.Case, image: torch.Tensor, prediction: torch.Tensor, victim: Victim) -> dict[str, Any]:
    classes = victim.head.classes_from_prediction(prediction)
    return {
        "image": image[0].cpu().numpy(),
        "prediction": classes[0, 0].cpu().numpy(),
        "truth": case.classes[0, 0].to(torch.uint8).numpy(),
        "affine": case.affine.numpy(),
        "spacing": case.spacing,
    }


def _failed(store: UnitStore, units: list[_Unit], error: Exception) -> str:
    """Record why units have no result; the others go on."""
    if isinstance(error, NonFiniteError):
        status = "invalid_nonfinite"
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        status = "oom"
    else:
        status = "failed"
    if not isinstance(error, MonaiAdvError):
        logger.debug("%s", traceback.format_exc())
    for unit in units:
        store.write(
            unit.identity, unit.key, {"status": status, "error": str(error) or type(error).__name__, "rows": []}
        )
    subject = units[0].identity["subject"]
    where = subject if isinstance(error, DataError) else f"{subject}, {_title(units[0])}"
    return f"{where}: {status}: {error}"


def _title(unit: _Unit) -> str:
    return f"{unit.identity['victim']} {unit.identity['attack']}"
