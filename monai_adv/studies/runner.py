"""Run a study: every unit once, each result on disk at once, a bad subject costs only itself."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from monai_adv.errors import ConfigError, MonaiAdvError, NonFiniteError, WriteError
from monai_adv.handlers import case_rows
from monai_adv.studies import cases
from monai_adv.studies.config import StudyConfig
from monai_adv.studies.lock import run_lock
from monai_adv.studies.merge import Failures, merge_study
from monai_adv.studies.oom import Ladder, out_of_memory
from monai_adv.studies.plan import Plan, Unit, find_items, study_settings, target_hashes
from monai_adv.studies.provenance import versions
from monai_adv.studies.shards import Shard, process_device, usable_device
from monai_adv.studies.units import SCHEMA, UnitStore, digest, read_json, write_json
from monai_adv.studies.victims import at_spacing, defense_kind, load_entry
from monai_adv.studies.volumes import save_volumes, volumes_key, volumes_path
from monai_adv.victims import Victim
from monai_adv.victims.checkpoint import file_hash

logger = logging.getLogger(__name__)

PARTS = ("data", "victims", "seed")
"""What makes a study a different one, see :meth:`StudyConfig.fingerprint`."""


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
        problems: one line per subject or unit that failed, now or before; empty if all is well.
    """

    folder: Path
    computed: int = 0
    reused: int = 0
    problems: list[str] = field(default_factory=list)


def run_study(
    study: StudyConfig,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    shard: Shard | None = None,
    retry_failed: bool = False,
    resume: bool = True,
) -> StudyResult:
    """Compute every unfinished unit of a study and write the merged table.

    Finished units are reused: a unit is finished when its file is whole and its key (victim weights, case files,
    setting, schema) matches. One whose status is not "ok" is left as it is and named as a problem. Everything is
    recorded in ``study.output``; a shard writes no tables, :func:`monai_adv.studies.merge_study` makes them.

    Args:
        study: the study.
        on_progress: called before each group of units.
        shard: which part of the study this process computes; all of it if None.
        retry_failed: compute units without a result again.
        resume: False refuses a folder that has units already.

    Raises:
        ConfigError: if the output folder belongs to a different study, another process is at work on it, or no
            subject is left.
        CheckpointError: if a victim cannot be loaded.
        WriteError: if the folder cannot be written.
    """
    shard = shard or Shard(1, 1)
    with run_lock(study.output, shard):
        store = UnitStore(study.output / "units")
        if not resume and store.any():
            raise ConfigError(f"{study.output} holds units already: leave --no-resume out to go on, or remove it")
        if shard.whole:
            _sweep(study.output)
        plan = make_plan(study, shard, claim=True)
        plan.read_keys()
        plan.write(study.output)
        result = StudyResult(study.output)
        try:
            failures = _run_units(plan, store, result, retry_failed, on_progress)
        except WriteError:
            raise
        except BaseException:  # an interrupted run leaves its table too
            if shard.whole:
                merge_study(study.output, partial=True)
            raise
        result.problems = merge_study(study.output).problems if shard.whole else plan.problems + failures.lines()
    if on_progress is not None:
        on_progress(Progress(plan.total, plan.total, "done"))
    return result


def _sweep(folder: Path) -> None:
    """Remove what killed processes were writing; nobody else writes there now."""
    for name in ("units", "volumes", "keys"):
        for path in (folder / name).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


def make_plan(study: StudyConfig, shard: Shard | None = None, *, claim: bool = False) -> Plan:
    """What a study consists of; its victims are loaded, on this process's device.

    Args:
        study: the study.
        shard: this process's part; all of it if None.
        claim: make the output folder this study's.

    Raises:
        ConfigError: if the folder belongs to a different study, or no subject is left.
        CheckpointError: if a victim cannot be loaded.
    """
    items, by_subject, problems = find_items(study)
    _require_same(study)
    if claim:
        _claim(study)
    device = usable_device(process_device(study.device))
    study = study if device == study.device else study.model_copy(update={"device": device})
    loaded = {v.name: load_entry(v, device) for v in study.victims}
    victims = {name: victim for name, (victim, _) in loaded.items()}
    hashes = {name: content for name, (_, content) in loaded.items()}
    groups = study_settings(study, victims, hashes, target_hashes(study, by_subject))
    return Plan(study, items, by_subject, groups, victims, problems, shard or Shard(1, 1))


def _require_same(study: StudyConfig) -> None:
    """Refuse a run folder of another study, and say what differs."""
    before = read_json(study.output / "study.json")
    if not isinstance(before, dict) or before.get("fingerprint") == study.fingerprint():
        return
    parts, stored = study.fingerprint_parts(), before.get("parts")
    if isinstance(stored, dict):
        changed = [name for name in PARTS if (digest(parts[name]) if name in parts else None) != stored.get(name)]
    else:  # of a version that did not store the parts
        known, now = before.get("study") or {}, study.model_dump(mode="json")
        changed = [name for name in PARTS if known.get(name) != now[name]]
    what = ", ".join(changed) or "paths"
    verb = "differs" if len(changed) == 1 and changed != ["victims"] else "differ"
    raise ConfigError(
        f"{study.output} holds the results of a different study ({what} {verb}); give this one another output folder, "
        "or remove that folder"
    )


def _claim(study: StudyConfig) -> None:
    setup = study.output / "study.json"
    parts = {name: digest(part) for name, part in study.fingerprint_parts().items()}
    content = {"schema": SCHEMA, "fingerprint": study.fingerprint(), "parts": parts,
               "study": study.model_dump(mode="json"),
               "defenses": {v.name: defense_kind(v) for v in study.victims},
               "hashes": {v.name: file_hash(v.source) for v in study.victims if v.source.is_file()},
               "versions": versions()}  # fmt: skip
    if read_json(setup) != content:  # shards write the same
        write_json(setup, content)


def _run_units(
    plan: Plan,
    store: UnitStore,
    result: StudyResult,
    retry_failed: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Failures:
    """Every unit of this process that is not finished."""
    study, failures = plan.study, Failures()
    montages = [item["subject"] for item in plan.items[: study.figures.montages]]
    for item, groups in plan.units():
        subject = item["subject"]
        case: cases.Case | None = None
        broken: Exception | None = None
        memory: dict[str, Any] | None = {} if len(plan.victims) > 1 else None  # what attacks keep between victims
        for group in groups:
            wanted = []
            for unit in group:
                content = _finished(study, store, unit, result.folder, subject in montages, retry_failed)
                if content is None:
                    wanted.append(unit)
                else:
                    result.reused += 1
                    failures.add(content)
            if not wanted:
                continue
            if on_progress is not None:
                on_progress(Progress(result.computed + result.reused, plan.total, f"{subject} {_title(wanted[0])}"))
            if case is None and broken is None:
                try:
                    case = cases.load(item, study.data)
                except Exception as error:
                    broken = error  # the subject cannot be loaded: said once, not tried for every setting
            if case is None:
                assert broken is not None
                status = "failed" if wanted[0].entry is None else "skipped"
                _failed(store, wanted, broken, failures, status)
                continue
            _run_group(plan, store, case, wanted, memory, result, failures, subject in montages)
    return failures


def _run_group(
    plan: Plan,
    store: UnitStore,
    case: cases.Case,
    units: list[Unit],
    memory: dict[str, Any] | None,
    result: StudyResult,
    failures: Failures,
    drawn: bool,
) -> None:
    """Compute and store units of one attack; out of memory, with less of it where the study allows that."""
    study, victim, left = plan.study, plan.victims[units[0].setting.victim], list(units)
    with Ladder(victim, study.on_oom, study.device) as ladder:
        while left:
            here = study if ladder.device == study.device else study.model_copy(update={"device": ladder.device})
            # a random victim's numbers go on from budget to budget: each is its own, whatever was computed before it
            together = left[:1] if victim.random else left
            try:
                for unit, content, volumes in _compute(here, victim, case, list(together), plan.by_subject, memory):
                    if volumes is not None and drawn and _drawn(study, unit):
                        save_volumes(volumes_path(result.folder, unit.identity), volumes, unit.key)
                    store.write(
                        unit.identity, unit.key, content | ({"oom_steps": ladder.taken} if ladder.taken else {})
                    )
                    left.remove(unit)
                    result.computed += 1
                continue
            except WriteError:
                raise  # the next unit could not be written either
            except Exception as error:  # whatever one subject stumbles over, the others go on
                if not (out_of_memory(error) and study.on_oom):
                    _failed(store, left, error, failures)
                    return
                problem: Exception = error.with_traceback(None)  # its frames hold what memory is short of
            if not ladder.down():
                _failed(store, left, problem, failures)
                return


def _finished(
    study: StudyConfig, store: UnitStore, unit: Unit, folder: Path, drawn: bool, retry_failed: bool
) -> dict[str, Any] | None:
    """What is stored of a unit, or None if it is to be computed."""
    content = store.read(unit.identity, unit.key)
    if content is None or (content["status"] != "ok" and retry_failed):
        return None
    if content["status"] == "ok" and drawn and _drawn(study, unit):
        return content if volumes_key(volumes_path(folder, unit.identity)) == unit.key else None
    return content


def _drawn(study: StudyConfig, unit: Unit) -> bool:
    """Whether a montage shows this unit: the clean images, and one budget of each attack."""
    return unit.entry is None or unit.eps == study.drawn_eps(unit.entry.title)


def _compute(
    study: StudyConfig,
    victim: Victim,
    case: cases.Case,
    units: list[Unit],
    items: dict[str, dict[str, Any]],
    memory: dict[str, Any] | None,
) -> Iterator[tuple[Unit, dict[str, Any], dict[str, Any] | None]]:
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
    unit: Unit,
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


def _failed(
    store: UnitStore, units: list[Unit], error: Exception, failures: Failures, status: str | None = None
) -> None:
    """Record why units have no result; the others go on."""
    if status is None:
        status = "invalid_nonfinite" if isinstance(error, NonFiniteError) else "failed"
        status = "oom" if out_of_memory(error) else status
    if not isinstance(error, MonaiAdvError):
        logger.debug("%s", "".join(traceback.format_exception(error)))
    for unit in reversed(units):  # stopped in between, the first one, which fails again, is still to be done
        content = {"status": status, "error": str(error) or type(error).__name__, "rows": []}
        store.write(unit.identity, unit.key, content)
        failures.add({"identity": unit.identity, **content})


def _title(unit: Unit) -> str:
    return f"{unit.setting.victim} {unit.setting.attack}"
