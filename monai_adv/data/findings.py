"""What a check found in a file: one record per problem, so that all of them can be shown at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from monai_adv.errors import DataError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One problem of one subject.

    Attributes:
        severity: ``"error"`` (the subject cannot be used), ``"warning"`` (it can, but look at it) or ``"note"``.
        subject: subject ID, or ``""`` when the problem is the whole folder's.
        file: the file concerned, or ``""``.
        what: what is wrong, with the values found.
        advice: what to do about it.
    """

    severity: Severity
    subject: str
    file: str
    what: str
    advice: str

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.subject, self.file) if part)
        return f"{where}: {self.what}. {self.advice}" if where else f"{self.what}. {self.advice}"


def raise_for_errors(findings: Iterable[Finding], summary: str = "", shown: int = 10) -> None:
    """Raise one :class:`DataError` that lists every finding of severity ``"error"``; nothing is done without one.

    Args:
        findings: what the checks found.
        summary: first line of the message when there is more than one error.
        shown: how many errors the message spells out.

    Raises:
        DataError: if at least one finding is an error.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    lines = [str(error) for error in errors[:shown]]
    if len(errors) > shown:
        lines.append(f"... and {len(errors) - shown} more; `monai-adv check` lists them all.")
    if summary or len(errors) > 1:
        lines = [f"{summary or f'{len(errors)} problems'}:"] + [f"  - {line}" for line in lines]
    raise DataError("\n".join(lines))
