"""A section for a victim's model card (Hugging Face, or the README of a MONAI bundle), in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from monai_adv.errors import ConfigError
from monai_adv.stats import tables
from monai_adv.studies.check import COMPLETE
from monai_adv.studies.summary import SCHEMA_ID

_STATUSES = ("FAIL", "WARN", "NOT RUN", "PASS")
_SUPPORT = {"foreground": "non-zero voxels of each channel", "all": "every voxel, background too"}
_UNITS = {
    "std": "standard deviations of the support, per channel",
    "range": "shares of the support's intensity range, per channel",
    "absolute": "the file's own intensity unit",
}
_LIMITS = (
    "These numbers are empirical lower bounds on vulnerability under the threat model above: a stronger attack may "
    "find more, and nothing follows for attacks outside it.",
    "They hold for the data, the preprocessing and the deployment named here; for another scanner, population or "
    "version of the weights the study has to be run again.",
    "The worst setting is chosen per region by its mean over subjects, among the settings of this study only.",
)


def model_card(summary: Mapping[str, Any]) -> str:
    """A section for a model card, from the content of a run's ``summary.json``.

    Threat model, data, clean and worst mean Dice per region with n, automatic checks, limitations, the commands, and
    the metadata of Hugging Face's ``model-index``. Every name is escaped: it is text and nothing else.

    Args:
        summary: as :func:`monai_adv.studies.summary.machine_summary` returns it.

    Returns:
        Markdown.

    Raises:
        ConfigError: if it is no such summary.
    """
    if summary.get("schema") != SCHEMA_ID:
        raise ConfigError(
            f"this is no summary of {SCHEMA_ID} (schema: {summary.get('schema')!r}): make it again with `monai-adv "
            "report RUN`"
        )
    worst = _worst(summary)
    parts = [
        "## Vulnerability under adversarial perturbation",
        f"Study: {escape(summary['title'])}. {escape(summary['statement'])}",
        *_failed(summary["checks"]),
        "### Threat model",
        _list(_threat(summary)),
        "### Data and victims",
        _list(_data(summary)),
        "### Results",
        "Mean Dice over n subjects, on the clean images and under the setting with the lowest mean; the drop is over "
        "the subjects that have both.",
        _results(summary, worst),
        "### Automatic checks",
        _list(_checks(summary["checks"])),
        *_missing(summary),
        "### Limitations",
        _list([*_LIMITS, *_unadapted(summary)]),
        "### How to make it again",
        _fenced("\n".join(summary["provenance"]["commands"]), "sh"),
        _list(_provenance(summary)),
        "Metadata for the head of a Hugging Face README (`model-index`):",
        _fenced(yaml.safe_dump(_index(summary, worst), sort_keys=False, allow_unicode=True, width=1000), "yaml"),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def escape(text: object) -> str:
    """Text as Markdown that shows exactly it: no markup, link, mention, table cell or HTML can come of it.

    Example:
        >>> escape("a|b `c` <i>")
        'a&#124;b &#96;c&#96; &lt;i&gt;'
    """
    found = re.sub(r"\s+", " ", str(text)).strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # an underscore within a word is none of emphasis; a colon and a dot make links by themselves in front of these
    special = r"[|`*~\\\[\]$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.|^[#+=-]|^\d+(?=[.)])"
    return re.sub(special, lambda match: "".join(f"&#{ord(c)};" for c in match[0]), found, flags=re.IGNORECASE)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _fenced(text: str, language: str) -> str:
    """A block of code, whatever backticks are in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _numbers(values: Sequence[Any] | None, none: str) -> str:
    return none if values is None else ", ".join("unbounded" if v is None else f"{v:g}" for v in values)


def _threat(summary: Mapping[str, Any]) -> list[str]:
    threat = summary["threat_model"]
    bounds = threat["bounds"]
    if bounds == "data":
        limits = "each channel stays between the clean image's smallest and largest value"
    else:
        limits = "none" if bounds is None else f"{_numbers(bounds, '')} in the file's intensity unit"
    lines = [
        f"Norm ball: {escape(threat['norm'])}, eps {_numbers(threat['eps'], '')} in {_UNITS[threat['units']]}",
        f"Channels that may change: {_numbers(threat['channels'], 'all')}",
        f"Voxels that may change: {_SUPPORT[threat['support']]}",
        f"Bounds of intensities: {limits}",
    ]
    if threat["proportions"] is not None:
        lines.append(f"Budget of each channel: eps times {_numbers(threat['proportions'], '')}")
    if threat["quantize"] is not None:
        lines.append(f"Stored values: {escape(json.dumps(threat['quantize']))}")
    for attack in summary["attacks"]:
        options = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in attack["options"].items())
        method = "" if attack["method"] == attack["name"] else f" ({escape(attack['method'])})"
        knows = "white box" if attack["white_box"] else "without the victim's gradient"
        eps = f"; eps {_numbers(attack['eps'], '')}" if attack["eps"] != threat["eps"] else ""
        who = f"; only on {escape(', '.join(attack['only']))}" if attack["only"] else ""
        lines.append(
            f"Attack {escape(attack['name'])}{method}: {knows}{eps}{'; ' + escape(options) if options else ''}{who}"
        )
    return lines


def _data(summary: Mapping[str, Any]) -> list[str]:
    data = summary["data"]
    scheme = f", labels {escape(data['scheme'])}" if data["scheme"] else ""
    every = f", every n-th subject, n={data['every']}" if data["every"] else ""
    lines = [f"Data: folder {escape(data['folder'])}{scheme}{every}"]
    for victim in summary["victims"]:
        known = [f"{victim['kind']} {escape(victim['source'])}", f"defense: {escape(victim['defense'])}"]
        known += [f"SHA-256 {victim['sha256']}"] if victim["sha256"] else []
        known += [escape(json.dumps(victim["deployment"], ensure_ascii=False))] if victim["deployment"] else []
        known.append(f"{victim['n_subjects']} subjects")
        lines.append(f"Victim {escape(victim['label'])}: {', '.join(known)}")
    return lines


def _worst(summary: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Of every victim and region the clean mean and the lowest one under an attack, if there is one."""
    known = [row for row in summary["mean_dice"] if row["dice"] is not None]
    found = []
    for row in known:
        if row["attack"] == "clean":
            here = [r for r in known if r["attack"] != "clean" and _place(r) == _place(row)]
            found.append((row, min(here, key=lambda r: r["dice"]) if here else None))
    return found


def _place(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["victim"], row["region"]


def _results(summary: Mapping[str, Any], worst: Sequence[tuple[Any, Any]]) -> str:
    headers = [
        "victim",
        "region",
        "n",
        "Dice, clean",
        "n under attack",
        "Dice, worst",
        "drop",
        "setting",
        "p Holm",
        "verdict",
    ]
    rows = []
    for clean, low in worst:
        cells = [escape(clean["victim"]), escape(clean["region"]), str(clean["n"]), f"{clean['dice']:.3f}"]
        if low is None:
            rows.append([*cells, "0", "-", "-", "no attack has a result", "-", "-"])
            continue
        drop = "-" if low["drop"] is None else f"{low['drop']:.3f}"
        test = _test(summary["comparisons"].get(low["victim"], []), low)
        rows.append([*cells, str(low["n"]), f"{low['dice']:.3f}", drop, escape(low["setting"]), *test])
    family = summary["family"]
    note = (
        f"p: Wilcoxon signed-rank against {escape(family['baseline'])} ({escape(family['metric'])}, "
        f"{family['alternative']}), Holm over all settings and regions of the victim; - where no test was made."
    )
    return f"{tables.markdown(headers, rows)}\n{note}"


def _test(comparison: Sequence[Mapping[str, Any]], low: Mapping[str, Any]) -> tuple[str, str]:
    """Adjusted p of a setting, and what the test says in words."""
    for row in comparison:
        if all(row.get(key) == low[key] for key in ("attack", "eps", "region")):
            p = "-" if row["p_holm"] is None else tables.format_p(row["p_holm"])
            return p, escape(row["verdict"])
    return "-", "not compared"


def _failed(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    # a unit without a result invalidates no other
    failed = [escape(check["name"]) for check in checks if check["status"] == "FAIL" and check["name"] != COMPLETE]
    return [f"**Do not use these numbers: an automatic check failed ({'; '.join(failed)}).**"] if failed else []


def _checks(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    counts = {status: sum(check["status"] == status for check in checks) for status in _STATUSES}
    lines = [", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none was run"]
    for status in _STATUSES[:3]:
        for check in checks:
            if check["status"] == status:
                who = f" ({escape(check['victim'])})" if check["victim"] else ""
                lines.append(f"{status}: {escape(check['name'])}{who}: {escape(check['detail'])}")
    return lines


def _missing(summary: Mapping[str, Any]) -> list[str]:
    """How much has no score. Names of subjects and files are not for a public page."""
    if not summary["problems"]:
        return []
    lines = [f"{len(summary['problems'])} problems, named in the run's summary.json"]
    counts = [f"{count} {escape(status)}" for status, count in summary["units"]["without_result"].items()]
    lines += [f"units without a result: {', '.join(counts)}"] if counts else []
    return ["### Not scored", _list(lines)]


def _unadapted(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"{escape(victim['name'])}: NOT ADAPTIVE - an upper bound on robustness only; the study lacks "
        f"{escape(victim['lacking'])}"
        for victim in summary["victims"]
        if not victim["adaptive"]
    ]


def _provenance(summary: Mapping[str, Any]) -> list[str]:
    known = summary["provenance"]
    made = escape(", ".join(f"{name} {version}" for name, version in known["versions"].items()))
    lines = [f"Seed {known['seed']}, fingerprint {known['fingerprint']}", f"Computed with {made}"]
    return lines + ([f"SHA-256 of records.csv: {known['records_sha256']}"] if known["records_sha256"] else [])


def _index(summary: Mapping[str, Any], worst: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Metadata as ``model-index`` has it."""
    folder = summary["data"]["folder"]
    models = []
    for victim in summary["victims"]:
        metrics = []
        for clean, low in worst:
            if clean["victim"] != victim["label"]:
                continue
            region = clean["region"]
            metrics.append(_metric(f"mean Dice {region}, clean, n={clean['n']}", clean))
            if low is not None:
                name = f"mean Dice {region}, worst of the attacks tried: {low['setting']}, n={low['n']}"
                metrics.append(_metric(name, low))
        result = {
            "task": {"type": "image-segmentation", "name": "Segmentation under adversarial perturbation"},
            "dataset": {"type": folder, "name": folder},
            "metrics": metrics,
        }
        models.append({"name": victim["label"], "results": [result]})
    return {"model-index": models}


def _metric(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "dice", "name": name, "value": round(row["dice"], 4)}
