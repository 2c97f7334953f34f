"""Studies: configuration, units of work, the runner and the merged table."""

from monai_adv.studies.config import StudyConfig, load_study, study_from
from monai_adv.studies.records import collect, read_records
from monai_adv.studies.runner import Progress, StudyResult, run_study

__all__ = ["Progress", "StudyConfig", "StudyResult", "collect", "load_study", "read_records", "run_study", "study_from"]
