"""A run in TensorBoard and MLflow as they read it back, and what happens when they cannot be written to."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.utils import optional_import
from recorded_run import HOSTILE

from monai_adv.errors import ConfigError
from monai_adv.studies import StudyConfig, load_study, study_from
from monai_adv.studies.tracking import track
from monai_adv.studies.units import read_json, write_json

TINY = "Dice/tiny/noise_0.8_std/WT"


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "my run", copy_function=os.link))


def with_trackers(run: Path, **trackers: Any) -> StudyConfig:
    return study_from({**read_json(run / "study.json")["study"], "trackers": trackers})


def scalars(folder: Path) -> dict[str, list[float]]:
    """Values of every tag in a folder of events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size, as on a full disk: the system's own error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# configuration


def test_paths_are_relative_to_the_study_and_nothing_of_a_result_changes(
    content: dict[str, Any], tmp_path: Path
) -> None:
    plain = study_from(content)
    mlflow = {"tracking_uri": "../ml", "experiment": "e"}
    file = tmp_path / "sub" / "study.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump({**content, "trackers": {"tensorboard": "tb", "mlflow": mlflow}}))
    study = load_study(file)
    assert study.trackers.tensorboard == tmp_path / "sub" / "tb"
    assert study.trackers.mlflow is not None
    assert study.trackers.mlflow.tracking_uri == str(tmp_path / "ml")
    assert study.fingerprint() == plain.fingerprint()
    for uri, wanted in (
        ("sqlite:///a.db", f"sqlite:///{tmp_path}/sub/a.db"),
        ("sqlite:////x/a.db", "sqlite:////x/a.db"),
        ("http://host:5000", "http://host:5000"),
    ):
        file.write_text(yaml.safe_dump({**content, "trackers": {"mlflow": {"tracking_uri": uri}}}))
        found = load_study(file).trackers.mlflow
        assert found is not None
        assert found.tracking_uri == wanted


@pytest.mark.parametrize(
    ("trackers", "says"),
    [
        ({"tensorbord": "x"}, r"trackers\.tensorbord: unknown key; did you mean 'tensorboard'"),
        ({"mlflow": {"tracking_url": "x"}}, r"trackers\.mlflow\.tracking_url: .*did you mean 'tracking_uri'"),
        ({"mlflow": {"tracking_uri": "http://me:secret@host"}}, "MLFLOW_TRACKING_PASSWORD"),
        ({"mlflow": {"tracking_uri": "file:///x"}}, "a folder without file:"),
        ({"mlflow": {"experiment": ""}}, "experiment"),
    ],
)
def test_a_wrong_tracker_is_named(content: dict[str, Any], trackers: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        study_from({**content, "trackers": trackers})


# TensorBoard


def test_tensorboard_reads_back_the_means_of_the_summary(run: Path, tmp_path: Path) -> None:
    study = with_trackers(run, tensorboard=str(tmp_path / "tb"))
    assert track(study, run) == []
    (folder,) = (tmp_path / "tb").iterdir()
    assert folder.name.startswith("my_run-")
    found = scalars(folder)
    summary = read_json(run / "summary.json")
    means = {(r["victim"], r["attack"], r["region"]): r for r in summary["mean_dice"]}
    row = means["tiny", "noise", "WT"]
    assert found[TINY] == [pytest.approx(row["dice"])]
    assert found[TINY.replace("Dice", "drop")] == [pytest.approx(row["drop"], abs=1e-6)]
    assert len(found[TINY.replace("Dice", "subjects")]) == 2
    assert sum(found[TINY.replace("Dice", "subjects")]) / 2 == pytest.approx(row["dice"])
    assert sum(tag.startswith("Dice/") for tag in found) == len(means)
    assert sum(tag.startswith("drop/") for tag in found) == len(means) * 2 // 3
    assert "Dice/filtered_NOT_ADAPTIVE_/clean/WT" in found
    assert found["units/scored"] == [12.0]
    assert found["units/without_result"] == [6.0]
    before = sorted(p.name for p in (tmp_path / "tb").rglob("*"))
    assert track(study, run) == []  # the same run again
    assert sorted(p.name for p in (tmp_path / "tb").rglob("*")) == before
    assert track(with_trackers(run, tensorboard=str(tmp_path / "tb")).model_copy(update={"seed": 5}), run) == []
    assert len(list((tmp_path / "tb").iterdir())) == 2  # another one beside it


@pytest.mark.parametrize("size", [0, 200, 3000])
def test_a_full_disk_costs_tensorboard_only(
    run: Path, tmp_path: Path, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    study = with_trackers(run, tensorboard=str(tmp_path / "tb"))
    capfd.readouterr()
    with largest_file(size):
        (line,) = track(study, run)
    assert line.startswith(f"tracker tensorboard ({tmp_path / 'tb'}) did not record the run: ")
    assert "File too large" in line
    assert "free some space" in line
    assert "`monai-adv report" in line
    assert list((tmp_path / "tb").iterdir()) == []  # nothing half
    assert capfd.readouterr() == ("", "")  # no traceback of a thread
    assert track(study, run) == []


def test_a_file_in_the_way_and_a_missing_package_are_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (line,) = track(with_trackers(run, tensorboard=str(tmp_path / "file" / "tb")), run)
    assert "Not a directory" in line
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (line,) = track(with_trackers(run, tensorboard=str(tmp_path / "tb")), run)
    assert "pip install 'monai_adv[trackers]'" in line


def test_without_trackers_or_without_results_nothing_is_recorded(run: Path, tmp_path: Path) -> None:
    assert track(with_trackers(run), run) == []
    (line,) = track(with_trackers(run, tensorboard=str(tmp_path / "tb")), tmp_path / "none")
    assert "nothing to record" in line
    assert not (tmp_path / "tb").exists()


# MLflow


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MLflow's database, which takes seconds to make."""
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    return tmp_path_factory.mktemp("data base")


def client(database: Path) -> Any:
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{database}/mlflow.db")


def runs_of(database: Path, experiment: str) -> list[Any]:
    reader = client(database)
    return list(reader.search_runs([reader.get_experiment_by_name(experiment).experiment_id]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_reads_back_means_parameters_and_artifacts(
    run: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the study's own address counts
    environment = dict(os.environ)
    study = with_trackers(run, mlflow={"tracking_uri": str(database), "experiment": "first"})
    assert track(study, run) == []
    assert dict(os.environ) == environment
    (found,) = runs_of(database, "first")
    summary = read_json(run / "summary.json")
    assert found.info.status == "FINISHED"
    row = next(r for r in summary["mean_dice"] if (r["attack"], r["region"]) == ("noise", "WT"))
    assert found.data.metrics[TINY] == pytest.approx(row["dice"])
    assert found.data.metrics[TINY.replace("Dice", "drop")] == pytest.approx(row["drop"])
    assert sum(tag.startswith("Dice/") for tag in found.data.metrics) == len(summary["mean_dice"])
    assert not any(tag.startswith("subjects/") for tag in found.data.metrics)
    params = found.data.params
    assert params["fingerprint"] == study.fingerprint()
    assert (params["seed"], params["threat.units"], params["threat.eps"]) == ("0", "std", "[0.8]")
    assert params["version.monai_adv"] == read_json(run / "study.json")["versions"]["monai_adv"]
    assert HOSTILE in params["attacks"]
    files = {f.path for f in client(database).list_artifacts(found.info.run_id)}
    assert files == {"records.csv", "report.html", "summary.json"}
    assert next(database.rglob("artifacts/records.csv")).read_bytes() == (run / "records.csv").read_bytes()

    # the same run again: no second one, the artifacts of now
    (run / "report.html").unlink()
    (run / "report.html").write_text("a new report")
    assert track(study, run) == []
    (again,) = runs_of(database, "first")
    assert again.data.metrics == found.data.metrics
    assert len(client(database).get_metric_history(found.info.run_id, TINY)) == 1
    assert next(database.rglob("artifacts/report.html")).read_text() == "a new report"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_that_broke_off_is_continued_and_an_old_report_is_no_artifact(
    run: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai.handlers import MLFlowHandler

    study = with_trackers(run, mlflow={"tracking_uri": str(database), "experiment": "second"})

    def broken(self: Any, *arguments: Any, **more: Any) -> None:
        raise ConnectionError("https://me:secret@host went away")

    with monkeypatch.context() as patch:
        patch.setattr(MLFlowHandler, "epoch_completed", broken)
        (line,) = track(study, run)
    assert "https://...@host went away" in line
    (found,) = runs_of(database, "second")
    assert found.info.status == "RUNNING"
    summary = read_json(run / "summary.json")
    summary["provenance"]["records_sha256"] = "0" * 64
    (run / "summary.json").unlink()
    write_json(run / "summary.json", summary)
    assert track(study, run) == []
    (again,) = runs_of(database, "second")
    assert (again.info.run_id, again.info.status) == (found.info.run_id, "FINISHED")
    assert TINY in again.data.metrics
    assert [f.path for f in client(database).list_artifacts(again.info.run_id)] == ["records.csv"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_reports_its_use_to_nobody(run: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.telemetry.track as reporting
    import mlflow.telemetry.utils as switches

    reported: list[Any] = []

    class Listener:
        config = None

        def add_record(self, record: Any) -> None:
            reported.append(record)

    monkeypatch.setattr(switches, "_IS_IN_CI_ENV_OR_TESTING", False)
    monkeypatch.setattr(reporting, "get_telemetry_client", lambda: Listener())
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    mlflow = {"tracking_uri": str(database), "experiment": "third", "artifacts": False}
    assert track(with_trackers(run, mlflow=mlflow), run) == []
    assert reported == []
    (found,) = runs_of(database, "third")
    assert client(database).list_artifacts(found.info.run_id) == []
    reported.clear()
    client(database).create_experiment("told")  # what it would have been
    assert len(reported) == 1


def test_a_server_that_is_down_or_silent_costs_seconds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "http://127.0.0.1:9"
    start = time.monotonic()
    (line,) = track(with_trackers(run, mlflow={"tracking_uri": uri}), run)
    assert line.startswith(f"tracker mlflow ({uri}) did not record the run: ")
    assert "start the server or correct trackers.mlflow in the study" in line
    assert time.monotonic() - start < 20
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the user's own setting counts
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        (line,) = track(with_trackers(run, mlflow={"tracking_uri": uri}), run)
        assert time.monotonic() - start < 8
    assert uri in line


def test_one_tracker_that_fails_leaves_the_other_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai.handlers.mlflow_handler.mlflow", optional_import("no_such_mlflow")[0])
    study = with_trackers(run, tensorboard=str(tmp_path / "tb"), mlflow={"tracking_uri": "http://127.0.0.1:9"})
    (line,) = track(study, run)
    assert "mlflow" in line
    assert "pip install 'monai_adv[trackers]'" in line
    assert len(list((tmp_path / "tb").iterdir())) == 1


def test_a_database_without_its_packages_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sqlalchemy", "alembic"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [])  # nothing can be found
    monkeypatch.setattr(sys, "meta_path", [])
    (line,) = track(with_trackers(run, mlflow={"tracking_uri": str(tmp_path / "ml")}), run)
    assert "sqlalchemy and alembic" in line
    assert "pip install 'monai_adv[trackers]'" in line


def test_mlflow_without_an_address_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (line,) = track(with_trackers(run, mlflow={}), run)
    assert "MLFLOW_TRACKING_URI" in line
    assert "correct trackers.mlflow" in line
