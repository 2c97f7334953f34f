"""Studies: configuration, units of work, the runner, shards and the merged table."""

from monai_adv.studies.analysis import Analysis, analyse_run
from monai_adv.studies.config import (
    AttackEntry,
    BudgetConfig,
    ChecksConfig,
    CompareConfig,
    DataConfig,
    FigureConfig,
    StudyConfig,
    VictimEntry,
    load_study,
    study_from,
)
from monai_adv.studies.merge import Merged, merge_study
from monai_adv.studies.records import read_records
from monai_adv.studies.runner import Progress, StudyResult, run_study
from monai_adv.studies.shards import Shard
from monai_adv.studies.trackers import MLflowConfig, TrackersConfig

__all__ = [
    "Analysis",
    "AttackEntry",
    "BudgetConfig",
    "ChecksConfig",
    "CompareConfig",
    "DataConfig",
    "FigureConfig",
    "MLflowConfig",
    "Merged",
    "Progress",
    "Shard",
    "StudyConfig",
    "StudyResult",
    "TrackersConfig",
    "VictimEntry",
    "analyse_run",
    "load_study",
    "merge_study",
    "read_records",
    "run_study",
    "study_from",
]
