"""Evaluate a MONAI bundle on its own validation data, clean and attacked, without a study file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_adv.attacks import Attack, attack_class, create
from monai_adv.bundle import BundleVictim, load_bundle
from monai_adv.data.files import check_writable
from monai_adv.data.headers import stem
from monai_adv.data.meta import plain, spacing_of
from monai_adv.errors import ConfigError, DataError, MonaiAdvError, NonFiniteError, WriteError
from monai_adv.handlers import case_rows, setting_label
from monai_adv.studies.provenance import versions
from monai_adv.studies.records import in_order, write_records
from monai_adv.studies.runner import Progress, StudyResult
from monai_adv.studies.units import SCHEMA, UnitStore, digest, read_json, write_json
from monai_adv.victims.checkpoint import file_hash


def run_bundle(
    folder: str | Path,
    output: str | Path,
    *,
    trust: str | None = None,
    attack: str = "pgd",
    eps: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_found: Callable[[BundleVictim], None] | None = None,
    **load: Any,
) -> StudyResult:
    """Score a bundle's own validation cases, clean and attacked, paired, per region.

    Cases go through the bundle's own preprocessing; the attack acts on what it gives (its budget in standard
    deviations of that, by default), through the bundle's inferer and network; clean and attacked batches are scored
    through exactly what the bundle deploys. Finished units are reused. A case that cannot be read, or on which
    something fails, costs only itself.

    Args:
        folder: the bundle.
        output: folder for ``records.csv`` (read by ``monai-adv compare``), ``bundle.json`` and the units.
        trust: see :func:`monai_adv.bundle.load_bundle`.
        attack: name of the attack.
        eps: budgets; the attack's own default, or .1, if None.
        options: options of threat and attack, see :func:`monai_adv.attacks.create`.
        limit: evaluate only the first cases.
        on_progress: called before each case and attack.
        on_found: called with what was found in the bundle, before anything is computed.
        **load: further arguments of :func:`monai_adv.bundle.load_bundle`.

    Raises:
        ConfigError: see :func:`monai_adv.bundle.load_bundle`; also if the folder holds results of another bundle.
        WriteError: if the output cannot be written.
    """
    output = Path(output)
    attacker, budgets = _attack(attack, eps, dict(options or {}))
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be 1 or more cases, got {limit}")
    bundle = load_bundle(folder, trust, **load)
    items = bundle.items()
    if on_found is not None:
        on_found(bundle)
    result, store = StudyResult(output), UnitStore(output / "units")
    subjects = _subjects(items)[:limit]
    overrides = {key: repr(value) for key, value in (load.get("overrides") or {}).items()}
    identity = {"sha256": bundle.sha256, "weights": file_hash(bundle.weights), "regions": bundle.head.regions,
                "head": bundle.head.kind, "overrides": overrides}  # fmt: skip
    _claim(output, bundle, digest(identity))
    expected: list[tuple[dict[str, Any], str]] = []
    total = len(subjects) * (1 + len(budgets))
    try:
        for subject, item in zip(subjects, items):
            try:
                groups = _units(bundle, subject, _case_hash(item), attacker, budgets, digest(identity))
            except DataError as error:
                result.problems.append(f"{subject}: {error}")
                continue
            expected += [unit for group in groups for unit in group]
            wanted = [u for group in groups for u in group if (store.read(*u) or {}).get("status") != "ok"]
            result.reused += sum(len(group) for group in groups) - len(wanted)
            if on_progress is not None and wanted:
                on_progress(Progress(result.computed + result.reused, total, subject))
            _run_case(bundle, item, subject, attacker, wanted, store, result)
    finally:  # an interrupted run leaves its table too
        write_records(output, in_order(store, expected))
        write_json(output / "problems.json", result.problems)
    return result


def _run_case(
    bundle: BundleVictim,
    item: Mapping[str, Any],
    subject: str,
    attack: Attack,
    wanted: list[tuple[dict[str, Any], str]],
    store: UnitStore,
    result: StudyResult,
) -> None:
    """Compute and store the wanted units of a case; a failure is recorded and goes no further."""
    if not wanted:
        return
    left = list(wanted)
    try:
        image, label = _case(bundle, item)
        for unit, content in _compute(bundle, image, label, attack, wanted):
            store.write(*unit, content)
            left.remove(unit)
            result.computed += 1
    except WriteError:
        raise  # the next unit could not be written either
    except Exception as error:  # whatever one case stumbles over, the others go on
        status = "invalid_nonfinite" if isinstance(error, NonFiniteError) else "failed"
        message = _message(error)
        for unit in left:
            store.write(*unit, {"status": status, "error": message, "rows": []})
        result.problems.append(f"{subject}: {status}: {message}")


def _attack(name: str, eps: Sequence[float] | None, options: dict[str, Any]) -> tuple[Attack, list[float]]:
    kind = attack_class(name)
    budgets = [float(e) for e in (eps or kind.default_eps or (0.1,))]
    if any(not e > 0 for e in budgets) or len(set(budgets)) != len(budgets):
        raise ConfigError(f"eps must be different numbers > 0, got {budgets}")
    return create(name, eps=budgets[0], **options), budgets


def _case(bundle: BundleVictim, item: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A case as the bundle's evaluator gets it, image and label with a batch axis."""
    data = bundle.preprocessing(dict(item))
    if isinstance(data, (list, tuple)):
        raise ConfigError("the preprocessing makes several samples of a case; a whole volume was expected")
    missing = [key for key in ("image", "label") if key not in data]
    if missing:
        raise DataError(f"no {' and no '.join(missing)} after the bundle's preprocessing: there are {sorted(data)}")
    return _batch(data["image"]).float(), _batch(data["label"])


def _batch(data: Any) -> Tensor:
    tensor = torch.as_tensor(data)
    if isinstance(data, MetaTensor):
        batch = MetaTensor(plain(data)[None], affine=torch.as_tensor(data.affine)[None])
        batch.is_batch = True
        return batch
    return tensor[None]


def _compute(
    bundle: BundleVictim, image: Tensor, label: Tensor, attack: Attack, wanted: list[tuple[dict[str, Any], str]]
) -> Iterator[tuple[tuple[dict[str, Any], str], dict[str, Any]]]:
    head, spacing = bundle.head, spacing_of(image)
    clean = plain(image)
    if not bool(torch.isfinite(clean).all()):
        raise NonFiniteError("the preprocessed image holds NaN or infinite voxels: check the files (monai-adv check)")
    device = next(iter(bundle.network.parameters())).device
    attacked = [unit for unit in wanted if unit[0]["attack"] != "clean"]
    shared: dict[str, Any] = {"head": head, "spacing": spacing, "clean": clean}
    for unit in wanted:
        if unit[0]["attack"] == "clean":
            prediction, truth = _scored(bundle, clean, label)
            yield unit, {"status": "ok", "rows": case_rows(
                {**unit[0], "status": "ok", "seconds": None}, prediction=prediction, label=truth, adversarial=clean,
                **shared,
            )}  # fmt: skip
    if not attacked:
        return
    results = attack.curve(
        bundle.victim, image.to(device), plain(label).to(device), [float(u[0]["eps"]) for u in attacked]
    )
    for unit, found in zip(attacked, results):
        adversarial = plain(found.image).cpu()
        moved = found.label if attack.moves_voxels else label
        prediction, truth = _scored(bundle, adversarial, moved)
        cost = {"seconds": found.cost.seconds, "forwards": found.cost.forwards, "backwards": found.cost.backwards}
        rows = case_rows(
            {**unit[0], "status": "ok", **cost, "success": bool(found.success[0])},
            prediction=prediction, label=truth, adversarial=adversarial, **shared,
        )  # fmt: skip
        yield unit, {"status": "ok", "rows": rows, "attack": attack.parameters(), "seed": attack.seed}


def _scored(bundle: BundleVictim, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction of what the bundle deploys, and the label as the head has it."""
    logits = bundle.logits(image).cpu()
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("the network gave NaN or infinite logits: the case cannot be scored")
    return bundle.head.predict(logits), bundle.head.check_label(plain(label).cpu(), logits)


def _units(
    bundle: BundleVictim, subject: str, case: str, attack: Attack, budgets: Sequence[float], victim: str
) -> list[list[tuple[dict[str, Any], str]]]:
    """Identity and key of the clean unit and of those of the attack."""
    threat = attack.threat
    made = []
    for name, eps in [("clean", 0.0), *((attack.name, e) for e in budgets)]:
        identity = {
            "subject": subject, "victim": bundle.victim.name, "attack": name, "method": name, "eps": eps,
            "units": threat.units, "norm": threat.norm,
            "setting": setting_label(name, eps, threat.units, threat.norm),
        }  # fmt: skip
        described = None if name == "clean" else [attack.parameters(), repr(threat.with_eps(eps))]
        made.append((identity, digest([SCHEMA, identity, victim, case, described])))
    return [made[:1], made[1:]]


def _case_hash(item: Mapping[str, Any]) -> str:
    """Hash of a case's entries and of the files they name."""
    files = [str(path) for value in item.values() for path in (value if isinstance(value, (list, tuple)) else [value])
             if isinstance(path, (str, Path))]  # fmt: skip
    hashes = []
    for path in files:
        if Path(path).is_dir():
            hashes += [file_hash(p) for p in sorted(Path(path).rglob("*")) if p.is_file()]
        elif Path(path).suffix:
            try:
                hashes.append(file_hash(path))
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from error
    return digest([{k: str(v) for k, v in item.items()}, hashes])


def _subjects(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for every case: its own, or that of its first file, with the folder where that alone is not unique."""
    for level in range(3):
        names = [_subject(item, level) for item in items]
        if len(set(names)) == len(names):
            return names
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ConfigError(
        f"the bundle's data list names {', '.join(twice[:5])} twice: a duplicated case is a wrong p-value"
    )


def _subject(item: Mapping[str, Any], level: int) -> str:
    for key in ("subject", "subject_id", "case", "id"):
        if item.get(key):
            return str(item[key])
    image = item.get("image")
    first = image[0] if isinstance(image, (list, tuple)) and image else image
    if not isinstance(first, (str, Path)):
        raise ConfigError(f"a case of the bundle's data list has no image file: {dict(item)}")
    path = Path(first)
    parts = [*path.parts[-1 - level : -1], stem(path) or path.stem]
    return "/".join(parts)


def _claim(output: Path, bundle: BundleVictim, fingerprint: str) -> None:
    """The folder belongs to one bundle; what was found is written beside its results."""
    setup = output / "bundle.json"
    check_writable(setup)
    before = read_json(setup)
    if before is not None and before.get("fingerprint") != fingerprint:
        raise ConfigError(
            f"{output} holds the results of another bundle, other weights or regions; give this one another output"
        )
    write_json(setup, {"schema": SCHEMA, "fingerprint": fingerprint, "bundle": str(bundle.folder),
                       "found": bundle.found, "versions": versions()})  # fmt: skip


def _message(error: BaseException) -> str:
    """What went wrong: MONAI's transforms wrap it in sentences about themselves."""
    if isinstance(error, MonaiAdvError):
        return str(error)
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    while error.__cause__ is not None:
        error = error.__cause__
    cause = f"{type(error).__name__}: {error}".splitlines()[0]
    return told if cause.endswith(told) else f"{told}: {cause}"
