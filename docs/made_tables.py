"""Tables of files_and_schemas.md, made from the classes that read and write the files."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from monai_adv.studies import StudyConfig
from monai_adv.studies.records import FIRST, _arrow_type
from monai_adv.victims import VictimConfig

COLUMNS = {
    "subject": "name of the subject",
    "victim": "name of the victim",
    "attack": "how tables call the attack: its `label`, or its name; `clean` for the images as they are",
    "method": "name of the attack",
    "eps": "budget, in `units`; 0 for clean, inf without a bound",
    "units": "`std`, `range`, `absolute`, or the attack's own (mm, share ...)",
    "norm": "`linf`, `l2`, or `parameter` for a budget of the attack's own",
    "setting": "attack with its budget, as tables call it",
    "region": "WT, TC, ET, or as the victim's head names them",
    "dice": "Dice; 1 where truth and prediction are empty",
    "hd95": "95th percentile of the surface distances in mm; 0 where both are empty, 373.13 where one is",
    "iou": "intersection over union",
    "truth_voxels": "voxels of the truth",
    "prediction_voxels": "voxels of the prediction",
    "truth_empty": "whether the truth has none",
    "prediction_empty": "whether the prediction has none",
    "voxel_accuracy": "share of the voxels whose class (or all of whose bits) is right",
    "linf_std": "largest change of a voxel, in standard deviations of the support",
    "linf_range": "the same in shares of the support's robust range",
    "linf_absolute": "the same in the file's numbers",
    "l2_std": "root of the sum of squared changes, in standard deviations",
    "l2_range": "the same in shares of the robust range",
    "l2_absolute": "the same in the file's numbers",
    "outside_max": "largest change outside the support, in the file's numbers",
    "ssim": "structural similarity in the support, mean over the modalities",
    "psnr": "peak signal-to-noise ratio in dB",
    "success": "whether the attack reached its goal; empty for clean",
    "zero_gradient": "largest share of the support's voxels whose gradient was exactly zero",
    "status": "`ok`, `failed`, `invalid_nonfinite`, `oom` or `skipped`",
}
_NAMES = {"string": "text", "int64": "whole number", "bool": "true or false", "double": "number"}


def study_keys() -> str:
    """Every key of a study with its default, a table for each mapping."""
    return "\n".join(_model(StudyConfig, "")).strip() + "\n"


def checkpoint_keys() -> str:
    """The keys of ``config`` in a checkpoint."""
    rows = []
    texts = _arguments(VictimConfig)
    for item in fields(VictimConfig):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        rows.append((f"`{item.name}`", "required" if default is MISSING else _shown(default), texts[item.name]))
    return _table(("key", "default", "what it is"), rows)


def record_columns() -> str:
    """The columns of records.csv."""
    rows = [(f"`{name}`", _NAMES[str(_arrow_type(name))], COLUMNS[name]) for name in FIRST]
    return _table(("column", "type", "what it is"), rows)


def _model(model: type[BaseModel], path: str) -> list[str]:
    texts, rows, below = _arguments(model), [], []
    for name, item in model.model_fields.items():
        inner = _inner(item.annotation)
        if inner is not None:
            below += _model(inner, f"{path}{name}{'[]' if get_origin(item.annotation) is list else ''}.")
        if item.is_required():
            default = "required"
        elif item.default is PydanticUndefined and inner is not None:
            default = "see below"
        else:
            default = _shown(item.get_default(call_default_factory=True))
        rows.append((f"`{name}`", _kind(item.annotation), default, texts[name]))
    title = f"`{path.rstrip('.')}`" if path else "The study"
    return [f"### {title}", "", _table(("key", "type", "default", "what it is"), rows), *below]


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation, if there is one."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _kind(annotation: Any) -> str:
    """An annotation as a reader of YAML understands it."""
    if annotation is Any:
        return "anything"
    if annotation is type(None):
        return "null"
    origin, parts = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and origin is None:
        if issubclass(annotation, BaseModel):
            return "mapping"
        plain = {"Path": "path", "str": "text", "int": "integer", "float": "number", "bool": "true or false"}
        return plain[annotation.__name__]
    if str(origin) == "typing.Literal":
        return " or ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of {_kind(parts[0])}"
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"{len(parts)} of {_kind(parts[0])}"
    return " or ".join(_kind(part) for part in parts if part is not type(None))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _arguments(kind: type) -> dict[str, str]:
    """The section "Args" of a docstring: name to text, roles and literals as code."""
    text = inspect.cleandoc(kind.__doc__ or "").split("Args:\n", 1)[1]
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.match(r"    (\w+): (.*)", line)
        if match:
            name = match[1]
            found[name] = match[2]
        elif line.startswith("        "):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return {name: _markdown(text) for name, text in found.items()}


def _markdown(text: str) -> str:
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"(?<!`)docs/(\w+\.md)(?!`)", r"[\1](\1)", text)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
