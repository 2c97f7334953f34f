"""A finished run in TensorBoard and MLflow, by MONAI's handlers. A tracker that fails is a warning, never an error."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from ignite.engine import Engine, Events

from monai_adv.data.files import check_writable
from monai_adv.errors import ConfigError, MonaiAdvError, WriteError
from monai_adv.stats import tables
from monai_adv.studies.config import StudyConfig
from monai_adv.studies.defended import Declared
from monai_adv.studies.provenance import versions
from monai_adv.studies.records import CHECKSUMS, UNIT, read_records
from monai_adv.studies.summary import mean_dice
from monai_adv.studies.trackers import MLflowConfig
from monai_adv.studies.units import digest, read_checked, read_json, safe_name

ARTIFACTS = ("records.csv", "report.html", "summary.json", "model_card.md")
"""What MLflow is given of a run folder."""
PRIVATE = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
"""Environment during the call: MLflow reports its use to nobody."""
HASTY = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}  # fmt: skip
"""Likewise, unless the user has set them: MLflow's own defaults wait for minutes for a server that is down."""
_LONGEST = 250  # of a parameter's value
_CAUSE = 300  # characters of an error


@dataclass
class _Run:
    """What trackers are told of a run.

    Attributes:
        name: of the tracker's run; another one when anything of it changes.
        params: seed, threat, versions ...
        units: of every unit with a result the Dice by tag.
        metrics: mean Dice and its drop by tag, and how many units there are.
        artifacts: files of the run folder.
    """

    name: str
    params: dict[str, str]
    units: list[dict[str, float]]
    metrics: dict[str, float]
    artifacts: list[Path] = field(default_factory=list)


def track(study: StudyConfig, folder: str | Path) -> list[str]:
    """Record a finished run in the trackers of its study (``trackers`` in study.yaml).

    TensorBoard and MLflow get, by MONAI's ``TensorBoardStatsHandler`` and ``MLFlowHandler`` on an engine that goes over
    the units, the mean Dice and its drop per victim, setting and region (``Dice/VICTIM/SETTING/REGION``), the number of
    units, and threat, seed, fingerprint and versions. TensorBoard gets the Dice of every unit as well, MLflow the
    files of :data:`ARTIFACTS`. The same run is recorded once; its artifacts in MLflow are those of the last call.

    Args:
        study: the study.
        folder: its run folder, with merged tables; with a report if that is to be among the artifacts.

    Returns:
        A line for every tracker that failed: which, why, and what to do. Nothing is raised for it.
    """
    folder = Path(folder)
    failed: list[str] = []
    if not study.trackers.any:
        return failed
    try:
        run = _read(study, folder)
    except (MonaiAdvError, ValueError) as error:
        return [f"trackers: nothing to record in {folder}: {error}"]
    for name, start in (("tensorboard", _tensorboard), ("mlflow", _mlflow)):
        options = getattr(study.trackers, name)
        if options is None:
            continue
        try:
            with _quiet(), _environment():
                start(options, run)
        except Exception as error:  # whatever a tracker stumbles over, the run is not affected
            failed.append(_line(name, options, error, folder))
    return failed


def _read(study: StudyConfig, folder: Path) -> _Run:
    """A run as trackers are told of it."""
    stored = read_json(folder / "study.json") or {}
    declared = Declared.of(stored or {"study": study.model_dump(mode="json")})
    records = declared.tagged(declared.sorted(read_records(folder)))
    scored = records[(records["status"] == "ok") & records["region"].notna()]
    places = ["victim", "setting", "region"]
    tags = dict(zip(scored[places].drop_duplicates().itertuples(index=False, name=None), _tags(scored, places)))
    units = [
        {f"subjects/{tags[key]}": float(dice) for key, dice in zip(_keys(part, places), part["dice"]) if dice == dice}
        for _, part in scored.groupby(list(UNIT), sort=False)
    ]
    if not units:
        raise ConfigError("no unit has a result")
    count = len(records.drop_duplicates(list(UNIT)))
    metrics = {"units/scored": float(len(units)), "units/without_result": float(count - len(units))}
    means = mean_dice(records)
    for key, row in zip(_keys(means, places), means.to_dict("records")):
        for kind, column in (("Dice", "dice"), ("drop", "drop")):
            if row[column] == row[column] and not (kind == "drop" and row["attack"] == "clean"):
                metrics[f"{kind}/{tags[key]}"] = float(row[column])
    merged = (read_checked(folder / CHECKSUMS) or {}).get("files", {}).get("records.csv")
    params = _params(study, stored, merged)
    artifacts = [folder / name for name in ARTIFACTS if (folder / name).is_file()]
    summary = read_json(folder / "summary.json") or {}
    if merged is None or summary.get("provenance", {}).get("records_sha256") != merged:
        artifacts = [path for path in artifacts if path.name == "records.csv"]  # the report is of an earlier table
    return _Run(f"{safe_name(folder.resolve().name)}-{digest(params)[:8]}", params, units, metrics, artifacts)


def _keys(table: pd.DataFrame, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    return table[columns].itertuples(index=False, name=None)


def _tags(scored: pd.DataFrame, columns: list[str]) -> list[str]:
    """Names of metrics that both trackers take: letters, digits, dot, dash, underscore and slash; each once."""
    names = list(_keys(scored[columns].drop_duplicates(), columns))
    plain = ["/".join(safe_name(str(part))[:60] for part in name) for name in names]
    return [t if plain.count(t) == 1 else f"{t}-{digest(name)[:6]}" for t, name in zip(plain, names)]


def _params(study: StudyConfig, stored: Mapping[str, Any], records: str | None) -> dict[str, str]:
    found: dict[str, Any] = {"title": study.title, "seed": study.seed}
    found["fingerprint"] = stored.get("fingerprint", study.fingerprint())
    found["records_sha256"] = records
    found |= {f"threat.{k}": v for k, v in study.budgets.model_dump(mode="json").items()}
    found |= {f"version.{k}": v for k, v in (stored.get("versions") or versions()).items()}
    found["victims"], found["attacks"] = [v.name for v in study.victims], [a.title for a in study.attacks]
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in found.items()}
    return {k: v[:_LONGEST] for k, v in texts.items()}


def _engine(run: _Run) -> Engine:
    """An engine over the units, whose output is a unit's Dice, and whose metrics at the end are those of the run."""
    engine = Engine(lambda engine, unit: unit)
    engine.logger = logging.getLogger(f"{__name__}.engine")
    engine.logger.setLevel(logging.CRITICAL + 1)  # what goes wrong is said once, by the warning
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(run.metrics))
    return engine


def _tensorboard(folder: Path, run: _Run) -> None:
    """Events of a run in ``folder/NAME``, which is there with all of them or not at all."""
    from monai.handlers import TensorBoardStatsHandler
    from torch.utils.tensorboard import SummaryWriter

    final = folder / run.name
    if final.exists():
        return
    temporary = folder / f".{run.name}.{uuid.uuid4().hex}.tmp"
    check_writable(temporary)
    try:
        writer = SummaryWriter(log_dir=str(temporary))
        try:
            writer.add_text("study", tables.markdown(["", ""], list(run.params.items())))
            engine = _engine(run)
            TensorBoardStatsHandler(summary_writer=writer, output_transform=lambda unit: unit).attach(engine)
            engine.run(run.units, max_epochs=1, epoch_length=len(run.units))
        finally:
            writer.close()
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _mlflow(options: MLflowConfig, run: _Run) -> None:
    """A run in MLflow; one that is there with the same content is given the artifacts only."""
    from monai.handlers import MLFlowHandler

    uri, location = options.tracking_uri, None
    if uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ValueError("neither trackers.mlflow.tracking_uri nor MLFLOW_TRACKING_URI says where MLflow is")
    if uri is not None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # which MONAI's handler would prefer to the study's
        if "://" not in uri:
            check_writable(Path(uri) / "mlflow.db")
            uri = f"sqlite:///{Path(uri).absolute().as_posix()}/mlflow.db"
        if uri.startswith("sqlite:///"):
            missing = [name for name in ("sqlalchemy", "alembic") if find_spec(name) is None]
            if missing:  # MLflow's own error speaks of a model registry
                raise ImportError(f"{' and '.join(missing)}, which MLflow needs for a database, not installed")
            location = (Path(uri.removeprefix("sqlite:///")).parent / "mlruns").absolute().as_uri()
    handler = MLFlowHandler(
        tracking_uri=uri,
        iteration_log=False,  # a request to the server per unit
        experiment_name=options.experiment,
        run_name=run.name,
        experiment_param=run.params,
        artifacts=run.artifacts if options.artifacts else None,
        artifact_location=location,
        close_on_complete=True,
    )
    try:
        experiment = handler.client.get_experiment_by_name(options.experiment)
        if experiment is not None:
            same = handler.client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run.name}'")
            done = [found for found in same if found.info.status == handler.run_finish_status]
            if done:
                handler.cur_run, handler.epoch_log, handler.experiment_param = done[0], False, None
        engine = _engine(run)
        handler.attach(engine)
        engine.run(run.units, max_epochs=1, epoch_length=len(run.units))
    finally:
        handler.cur_run = None  # finished is what completed; the rest is continued by the next call
        handler.close()


@contextmanager
def _environment() -> Iterator[None]:
    """The environment that MLflow gets; the user's own afterwards."""
    before = dict(os.environ)
    os.environ.update(PRIVATE)
    for name, value in HASTY.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """No messages, warnings and tracebacks of the trackers' libraries."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels, hook = [logger.level for logger in loggers], threading.excepthook

    def only_others(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard"):  # which raises it again where it is asked
            hook(args)

    try:
        threading.excepthook = only_others
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        threading.excepthook = hook
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _line(name: str, options: Any, error: Exception, folder: Path) -> str:
    """Which tracker, why, and what to do."""
    where = options if name == "tensorboard" else options.tracking_uri or "MLFLOW_TRACKING_URI"
    if isinstance(error, WriteError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, ImportError):
        advice = "install it: pip install 'monai_adv[trackers]'"
    elif isinstance(error, ValueError):
        advice = f"correct trackers.{name} in the study"
    elif name == "tensorboard" or "://" not in str(where) or str(where).startswith("sqlite:"):
        advice = "make the place writable or free some space"
    else:
        advice = f"start the server or correct trackers.{name} in the study"
    text = re.sub(r"\s+", " ", str(error) or type(error).__name__)
    cause = re.sub(r"(?<=//)[^/@\s]+@", "...@", text)[:_CAUSE]  # no password of an address
    return (
        f"tracker {name} ({where}) did not record the run: {cause}; {advice}, then `monai-adv report {folder}` tries "
        "again; the run itself is not affected"
    )
