"""Handlers of ignite engines and the rows they write."""

from monai_adv.handlers.handler import AttackRecordSaver
from monai_adv.handlers.records import NORMS, case_rows, jsonable, setting_label

__all__ = ["NORMS", "AttackRecordSaver", "case_rows", "jsonable", "setting_label"]
