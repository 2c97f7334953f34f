"""Studies: configuration, units of work, the runner, shards and the merged table."""

from monai_adv.studies.config import StudyConfig, load_study, study_from
from monai_adv.studies.merge import Merged, merge_study
from monai_adv.studies.records import read_records
from monai_adv.studies.runner import Progress, StudyResult, run_study
from monai_adv.studies.shards import Shard

__all__ = [
    "Merged",
    "Progress",
    "Shard",
    "StudyConfig",
    "StudyResult",
    "load_study",
    "merge_study",
    "read_records",
    "run_study",
    "study_from",
]
