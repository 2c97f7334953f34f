"""Pre-flight: everything that is wrong with a folder of cases, found before hours of computing depend on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from monai_adv.data.datalist import scan
from monai_adv.data.findings import Finding
from monai_adv.data.headers import GEOMETRY_TOLERANCE, ImageHeader
from monai_adv.data.labels import REGIONS, LabelScheme, as_numpy, region_masks, whole_numbers
from monai_adv.data.loading import finding_of, read_case_headers, read_modalities, read_volume, voxel_findings
from monai_adv.errors import DataError

OUTLIER_FACTOR = 3.0
"""A maximum more than this many times the 99.9th percentile of the foreground is reported as an outlier."""
OUTSIDE_SHARE = 0.01
"""A larger share of the tumour label than this outside the foreground is reported."""


@dataclass
class PreflightReport:
    """What :func:`check_folder` found.

    Attributes:
        findings: every problem of every subject, errors and warnings.
        facts: one mapping per subject: shape, spacing, orientation, label values, region volumes, intensity ranges.
        items: the datalist items without an error.
    """

    findings: list[Finding] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def to_frame(self) -> pd.DataFrame:
        """One row per subject: status, number of errors and warnings, then the facts (empty where unreadable)."""
        counts = Counter((finding.subject, finding.severity) for finding in self.findings)
        facts = {row["subject"]: row for row in self.facts}
        subjects = sorted(set(facts) | {finding.subject for finding in self.findings if finding.subject})
        rows = []
        for subject in subjects:
            errors, warnings = counts[subject, "error"], counts[subject, "warning"]
            status = "error" if errors else "warning" if warnings else "ok"
            row = {"subject": subject, "status": status, "errors": errors, "warnings": warnings}
            rows.append({**row, **facts.get(subject, {})})
        return pd.DataFrame(rows, columns=None if rows else ["subject", "status", "errors", "warnings"])

    def findings_frame(self) -> pd.DataFrame:
        """One row per finding: severity, subject, file, what, advice; errors first."""
        order = {"error": 0, "warning": 1, "note": 2}
        columns = ["severity", "subject", "file", "what", "advice"]
        ranked = sorted(self.findings, key=lambda finding: (order[finding.severity], finding.subject, finding.file))
        return pd.DataFrame([[getattr(finding, name) for name in columns] for finding in ranked], columns=columns)


def check_folder(
    root: str | os.PathLike[str],
    scheme: str | LabelScheme | None = None,
    *,
    require_label: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> PreflightReport:
    """Check every case of a folder: all problems of all subjects, not the first one.

    Args:
        root: folder of cases, see :func:`monai_adv.data.brats_datalist`.
        scheme: label scheme, None to infer it from the names.
        require_label: whether a missing label is an error.
        progress: called as ``progress(done, total, subject)`` after each subject.

    Returns:
        The findings and a table of facts; ``report.ok`` says whether there is no error.

    Raises:
        DataError: if the folder does not exist or holds no case.
    """
    found = scan(root, scheme, require_label=require_label)
    report = PreflightReport(findings=list(found.problems))
    for done, item in enumerate(found.items, start=1):
        findings, facts = inspect_item(item)
        report.findings.extend(findings)
        report.facts.append(facts)
        if not any(finding.severity == "error" for finding in findings):
            report.items.append(item)
        if progress is not None:
            progress(done, len(found.items), item["subject"])
    report.findings.extend(_cohort_findings(report.facts))
    return report


def check_item(item: Mapping[str, Any]) -> list[Finding]:
    """Every problem of one datalist item; empty when there is none.

    Args:
        item: as :func:`monai_adv.data.brats_datalist` makes it.
    """
    return inspect_item(item)[0]


def inspect_item(item: Mapping[str, Any]) -> tuple[list[Finding], dict[str, Any]]:
    """Every problem of one datalist item, and the facts that could be read in spite of them.

    Returns:
        Findings, and a mapping: subject, scheme, shape, spacing (mm), orientation, dtype, foreground_voxels,
        ``<modality>_p0.5`` and ``_p99.5`` (of its non-zero voxels), label_dtype, label_values, ``<region>_ml``.
    """
    subject = str(item.get("subject", ""))
    facts: dict[str, Any] = {"subject": subject, "scheme": str(item.get("scheme", ""))}
    try:
        headers, findings = read_case_headers(item)
    except DataError as error:
        return [finding_of(subject, "", error)], facts
    findings += _header_findings(subject, headers)
    images = {role: header for role, header in headers.items() if role != "label"}
    if images:
        first = next(iter(images.values()))
        facts |= {
            "shape": first.shape[:3],
            "spacing": tuple(round(edge, 4) for edge in first.spacing),
            "orientation": first.orientation,
            "dtype": "/".join(sorted({str(header.dtype) for header in images.values()})),
        }
    foreground = _inspect_images(item, headers, findings, facts)
    if "label" in headers:
        _inspect_label(item, headers["label"], foreground, findings, facts)
    return findings, facts


def _header_findings(subject: str, headers: Mapping[str, ImageHeader]) -> list[Finding]:
    findings = []
    for path, (role, header) in {header.path: (role, header) for role, header in headers.items()}.items():
        if header.sform_code == 0 and header.qform_code == 0:
            codes = "sform code 0 and qform code 0" if header.format == "NIfTI" else "no orientation in its header"
            what = f"{role} has {codes}: left and right are a guess"
            findings.append(Finding("warning", subject, path, what, "Compare it with a viewer before trusting sides"))
        elif header.sform_code == 0:
            what = f"{role} has sform code 0; the qform (code {header.qform_code}) is used"
            findings.append(Finding("note", subject, path, what, "Nothing to do; some other tools guess differently"))
        if header.sform_qform_distance > GEOMETRY_TOLERANCE:
            what = f"sform and qform of {role} differ by up to {header.sform_qform_distance:.4g}; the sform is used"
            findings.append(Finding("warning", subject, path, what, "Other tools may use the qform: make them agree"))
    return findings


def _inspect_images(
    item: Mapping[str, Any], headers: Mapping[str, ImageHeader], findings: list[Finding], facts: dict[str, Any]
) -> torch.Tensor | None:
    """Voxels of every readable modality; returns the voxels that are non-zero in any of them."""
    subject, foreground = facts["subject"], None
    seen: dict[str, torch.Tensor] = {}
    modalities = read_modalities(item, headers)
    while True:
        try:
            modality, volume = next(modalities, (None, None))
        except DataError as error:
            findings.append(finding_of(subject, "", error))
            break
        if modality is None or volume is None:
            break
        path, voxels = headers[modality].path, volume.as_tensor()
        broken = voxel_findings(subject, path, modality, voxels)
        findings += broken
        if broken:
            continue
        findings += _intensity_findings(subject, path, modality, voxels, facts)
        for other, twin in seen.items():
            if twin.shape == voxels.shape and torch.equal(twin, voxels):
                what = f"{modality} and {other} are the same volume"
                findings.append(Finding("warning", subject, path, what, "Was one copied over the other?"))
        seen[modality] = voxels
        if foreground is None or foreground.shape == voxels.shape:
            foreground = voxels != 0 if foreground is None else foreground | (voxels != 0)
    if foreground is not None:
        facts["foreground_voxels"] = int(foreground.sum())
        share = facts["foreground_voxels"] / foreground.numel()
        if share > 0.9:
            what = f"{share:.0%} of the voxels are non-zero: no zero background"
            advice = "Extract the brain, or give the support of the attack yourself"
            findings.append(Finding("warning", subject, "", what, advice))
    return foreground


def _intensity_findings(
    subject: str, path: str, modality: str, voxels: torch.Tensor, facts: dict[str, Any]
) -> list[Finding]:
    findings = []
    low, high, extreme = np.percentile(voxels[voxels != 0].numpy(), [0.5, 99.5, 99.9]).tolist()
    facts[f"{modality}_p0.5"], facts[f"{modality}_p99.5"] = round(low, 4), round(high, 4)
    negative, largest = int((voxels < 0).sum()), float(voxels.max())
    if negative:
        what = f"{modality} has {negative} negative voxels (lowest {float(voxels.min()):g})"
        findings.append(
            Finding("warning", subject, path, what, "Is the volume normalised already? Budgets count twice")
        )
    if extreme > 0 and largest > OUTLIER_FACTOR * extreme:
        what = f"{modality} has outliers: maximum {largest:g}, 99.9th percentile {extreme:g}"
        findings.append(Finding("warning", subject, path, what, "Do not scale by minimum and maximum"))
    return findings


def _inspect_label(
    item: Mapping[str, Any],
    header: ImageHeader,
    foreground: torch.Tensor | None,
    findings: list[Finding],
    facts: dict[str, Any],
) -> None:
    subject, path = facts["subject"], header.path
    facts["label_dtype"] = str(header.dtype)
    try:
        raw = as_numpy(read_volume(header, torch.float64))[0]
        facts["label_values"] = tuple(whole_numbers(raw, path)[0])
        classes = LabelScheme.get(item["scheme"]).to_classes(raw, where=path)
    except DataError as error:
        findings.append(finding_of(subject, path, error))
        return
    for region, mask in region_masks(classes).items():
        facts[f"{region}_ml"] = round(float(mask.sum()) * header.voxel_ml, 3)
    empty = [region for region in REGIONS if facts[f"{region}_ml"] == 0]
    if empty:
        what = "the label is empty: no tumour" if "WT" in empty else f"no voxel of {', '.join(empty)} in the label"
        advice = "Legitimate in BraTS; the empty-region rule of the metrics decides what its Dice is"
        findings.append(Finding("warning", subject, path, what, advice))
    if foreground is not None and foreground.shape == classes.shape and classes.any():
        outside = int(((classes > 0) & ~foreground.numpy()).sum())
        if outside > OUTSIDE_SHARE * np.count_nonzero(classes):
            what = f"{outside} of {np.count_nonzero(classes)} tumour voxels lie where every modality is zero"
            findings.append(Finding("warning", subject, path, what, "Do label and images belong to the same patient?"))


def _cohort_findings(facts: list[dict[str, Any]]) -> list[Finding]:
    findings = []
    for name in ("spacing", "orientation", "scheme"):
        counts = Counter(str(row[name]) for row in facts if name in row)
        if len(counts) > 1:
            what = f"subjects differ in {name}: " + ", ".join(f"{value} x {n}" for value, n in counts.most_common())
            advice = {
                "spacing": "Resample in the preprocessing, or study each spacing on its own",
                "orientation": "Put monai.transforms.Orientationd into the preprocessing",
                "scheme": "Nothing to do: every label is translated by its own scheme",
            }[name]
            findings.append(Finding("note" if name == "scheme" else "warning", "", "", what, advice))
    return findings
