"""Which trackers a study is recorded in: plain data, no tracker is imported here."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

_SQLITE = "sqlite:///"


class Strict(BaseModel):
    """Plain data in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class MLflowConfig(Strict):
    """Where MLflow records a run of the study.

    Args:
        tracking_uri: address of a server (``http://host:5000``) or database (``sqlite:///file.db``), or a folder, in
            which ``mlflow.db`` and the artifacts in ``mlruns`` are kept; what ``MLFLOW_TRACKING_URI`` says if None.
        experiment: name of MLflow's experiment.
        artifacts: whether report, records, summary and model card are uploaded. The report holds volumes of the drawn
            subjects, the records hold the subjects' names.
    """

    tracking_uri: str | None = Field(default=None, min_length=1)
    experiment: str = Field(default="monai_adv", min_length=1)
    artifacts: bool = True

    @field_validator("tracking_uri")
    @classmethod
    def _without_secret(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in uri.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "an address with a user or password would be stored in the run folder: leave it out of the study and "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or all of it as MLFLOW_TRACKING_URI"
            )
        if uri is not None and uri.startswith("file:"):
            raise ValueError("MLflow keeps no file stores any more: give a folder without file:, for a database in it")
        return uri


class TrackersConfig(Strict):
    """Where a study is recorded besides its run folder; nothing of a result depends on it.

    Args:
        tensorboard: folder in which every run gets a folder of its own, for ``tensorboard --logdir``.
        mlflow: see :class:`MLflowConfig`.
    """

    tensorboard: Path | None = None
    mlflow: MLflowConfig | None = None

    @property
    def any(self) -> bool:
        """Whether there is a tracker."""
        return self.tensorboard is not None or self.mlflow is not None

    def resolved(self, folder: Path) -> TrackersConfig:
        """With paths that are relative to a folder made absolute: a report may be made again from elsewhere."""
        found = self.model_copy(deep=True)
        if found.tensorboard is not None:
            found.tensorboard = Path(os.path.abspath(folder / found.tensorboard))
        if found.mlflow is not None and found.mlflow.tracking_uri is not None:
            uri = found.mlflow.tracking_uri
            if uri.startswith(_SQLITE):
                uri = _SQLITE + os.path.abspath(folder / uri.removeprefix(_SQLITE))
            elif "://" not in uri:
                uri = os.path.abspath(folder / uri)
            found.mlflow.tracking_uri = uri
        return found
