"""The report is one safe, well-formed page that loads nothing and says everything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from monai_adv.errors import DataError
from monai_adv.stats import compare
from monai_adv.visualize import LIMITATIONS, dice_curves, report, save_figure, write_report
from monai_adv.visualize.viewer import ViewerContent

HOSTILE = "<script>alert('x')</script><img src=\"http://evil.example/x.png\" onerror=alert(1)>&\"'{{ 7 * 7 }}"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: tags must nest; collects text, tags, ids and what would be loaded."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"
        self.pieces.append(" ")

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.pieces.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def figure() -> Figure:
    drawn = Figure(figsize=(2, 1))
    drawn.subplots().plot([0, 1])
    return drawn


def content(**changes: Any) -> dict[str, Any]:
    return {
        "title": "A study",
        "summary": ["Dice fell.", "A lot."],
        "threat": {"victim": "U-Net", "attacks": [{"name": "fgsm", "steps": 1}, {"name": "ifgsm", "steps": 10}]},
        "tables": {"Results": pd.DataFrame({"region": ["WT"], "dice": [0.9], "p_holm": [1e-9]})},
        "figures": {"A curve": figure()},
        "provenance": {"seed": 0, "versions": {"torch": "2.13"}, "command": "monai-adv demo"},
    } | changes


def test_the_page_is_well_formed_and_complete(tmp_path: Path, records: Callable[..., pd.DataFrame]) -> None:
    frame = records(budgets=(0.1,))
    comparison = compare(frame, resamples=99)
    tables = [("Against clean", comparison), ("Raw", frame.head(3))]
    path = write_report(
        tmp_path / "run" / "report.html",
        **content(
            tables=tables,
            figures=[("Curves", dice_curves(frame)), ("Another", figure())],
            checks=[
                {"name": "norm within budget", "status": "PASS", "value": 0.1, "threshold": 0.1, "n": 8},
                {"name": "monotone in eps", "status": "warn", "value": 0.0123456, "threshold": 0.0, "n": 8},
                {"name": "large eps", "status": "NOT RUN", "value": None, "threshold": None, "n": 0},
            ],
        ),
    )
    page = Page(path.read_text(encoding="utf-8"))
    for section in ("summary", "threat", "results", "figures", "checks", "limitations", "provenance"):
        assert section in page.values("id")
    for words in ("Dice fell.", "ifgsm 10", "Against clean", "Figure 2. Another", "norm within budget", "1 WARN"):
        assert words in page.text
    for note in (*comparison.notes, *LIMITATIONS):
        assert " ".join(note.split()) in page.text
    headers, rows = comparison.table["verdict"], frame.head(3)["dice"]
    assert all(verdict in page.text for verdict in headers)
    assert all(f"{value:.3f}" in page.text for value in rows)
    assert page.tags.count("table") == 5  # nested attacks, two results, checks, versions
    assert page.tags.count("h1") == 1
    assert "At least one automatic check failed" not in page.text
    images = [value for value in page.values("src") if value.startswith("data:image/png;base64,")]
    assert len(images) == 2
    assert all(base64.b64decode(image.split(",")[1]).startswith(b"\x89PNG") for image in images)


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    html = write_report(tmp_path / "r.html", **content()).read_text(encoding="utf-8")
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert all(value.startswith("data:") for value in page.values("src"))
    assert all(value.startswith("#") for value in page.values("href"))
    assert {value[1:] for value in page.values("href")} <= set(page.values("id"))
    policies = [value for value in page.values("content") if "default-src" in value]
    assert policies == [
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]


def test_only_scripts_of_the_package_may_run(tmp_path: Path) -> None:
    """The policy names exactly the scripts that the page holds to be run."""
    subjects = pd.DataFrame({"subject": ["a"], "dice": [0.5]})
    viewer = ViewerContent(["AAAA"], [{"subject": "a", "victim": "v", "settings": []}], ["a note"])
    html = write_report(tmp_path / "r.html", **content(subjects=subjects, viewer=viewer)).read_text(encoding="utf-8")
    policy = next(value for value in Page(html).values("content") if "default-src" in value)
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    run = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    run += re.findall(r'<script type="text/plain" id="niivue-script">(.*?)</script>', html, re.DOTALL)
    assert len(run) == 3
    assert {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in run} == allowed
    assert "unsafe" not in policy.split("script-src")[1]
    assert "a note" in Page(html).text
    assert "Copyright (c) 2021, Niivue" in Page(html).text


def test_the_vendored_script_is_the_released_one() -> None:
    folder = resources.files("monai_adv.visualize") / "assets" / "niivue"
    digest = hashlib.sha256((folder / "niivue.umd.js").read_bytes()).hexdigest()
    assert digest in (folder / "README.md").read_text()
    assert "BSD 2-Clause License" in (folder / "LICENSE").read_text()


def test_a_script_that_would_end_its_element_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("x = '</SCRIPT>'", "x = '<!-- <script>'"):
        monkeypatch.setattr(report, "_read", lambda name, text=text: text)
        with pytest.raises(ValueError, match="cannot stand inside a page"):
            report._script("templates/a.js")
    assert report._script("templates/a.css")


def test_every_string_is_escaped(tmp_path: Path) -> None:
    """The same hostile text in every slot that takes text."""
    hostile = content(
        title=HOSTILE,
        summary=[HOSTILE],
        threat={HOSTILE: HOSTILE, "nested": {HOSTILE: HOSTILE}, "rows": [{HOSTILE: HOSTILE}]},
        tables={HOSTILE: pd.DataFrame({HOSTILE: [HOSTILE, f"{HOSTILE} [1, 2]"]})},
        figures={HOSTILE: figure()},
        provenance={"command": HOSTILE, HOSTILE: f"{HOSTILE}\n{HOSTILE}"},
        checks=[{"check": HOSTILE, "status": "FAIL", HOSTILE: HOSTILE}],
        limitations=[HOSTILE],
        pictures={HOSTILE: figure()},
        subjects=pd.DataFrame({HOSTILE: [f"</script>{HOSTILE}", "b"]}),
        viewer=ViewerContent(["AAAA"], [{"subject": f"</script>{HOSTILE}"}], [HOSTILE]),
    )
    html = write_report(tmp_path / "r.html", **hostile).read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("script") == 6  # three that run, two with data, one volume
    assert page.tags.count("img") == 2
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:") for value in page.values("src"))
    assert page.values("alt") == [HOSTILE] * 2
    for name in ("subject-data", "viewer-data"):
        data = re.search(rf'id="{name}">(.*?)</script>', html, re.DOTALL)
        assert data
        assert not set("<>&") & set(data[1])
        assert HOSTILE in json.dumps(json.loads(data[1]), ensure_ascii=False).replace('\\"', '"')
    assert page.text.count("<script>alert('x')</script>") >= 15
    assert "{{ 7 * 7 }}" in page.text  # not evaluated


def test_hostile_subjects_of_a_comparison_are_escaped(tmp_path: Path, records: Callable[..., pd.DataFrame]) -> None:
    frame = records(budgets=(0.1,), attacks=("fgsm", HOSTILE))
    page = Page(write_report(tmp_path / "r.html", **content(tables={"c": compare(frame, resamples=99)})).read_text())
    assert "script" not in page.tags
    assert HOSTILE in page.text


def test_a_failed_check_is_said_first(tmp_path: Path) -> None:
    checks = [{"check": "support", "status": "FAIL", "value": 3.0}, {"check": "bounds", "status": "PASS", "value": 0.0}]
    text = Page(write_report(tmp_path / "r.html", **content(checks=checks)).read_text()).text
    assert text.index("At least one automatic check failed") < text.index("What was attacked, and how")
    assert "1 FAIL" in text


@pytest.mark.parametrize("checks", [None, [], pd.DataFrame()])
def test_no_checks_is_said(tmp_path: Path, checks: Any) -> None:
    assert (
        "No automatic check was run"
        in Page(write_report(tmp_path / "r.html", **content(checks=checks)).read_text()).text
    )


def test_unknown_statuses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MAYBE"):
        write_report(tmp_path / "r.html", **content(checks=[{"check": "a", "status": "maybe"}]))
    with pytest.raises(ValueError, match="no status"):
        write_report(tmp_path / "r.html", **content(checks=[{"check": "a"}]))
    assert not list(tmp_path.iterdir())


def cells(tmp_path: Path, frame: pd.DataFrame) -> list[str]:
    html = write_report(tmp_path / "r.html", **content(tables={"t": frame})).read_text(encoding="utf-8")
    results = html[html.index('id="results"') : html.index('id="checks"')]
    return re.findall(r"<td[^>]*>(.*?)</td>", results)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("dice", [0.5, 0.12345], ["0.500", "0.123"]),
        ("dice", [0.9, np.nan], ["0.900", "-"]),
        ("eps", [0.05, 8 / 255], ["0.05", "0.03137"]),
        ("p_holm", [3e-7, 0.0123], ["&lt;0.0001", "0.0123"]),
        ("n", [12, 11], ["12", "11"]),
        ("empty", [3.0, np.nan], ["3", "-"]),
        ("psnr", [np.inf, 41.25], ["∞", "41.25"]),
        ("absolute", [1e-7, 0.0], ["1.000e-07", "0"]),
        ("flag", [True, False], ["yes", "no"]),
        ("text", ["a", None], ["a", "-"]),
        ("list", [[1, 2.5], ("x",)], ["1, 2.5", "x"]),
    ],
)
def test_numbers_are_readable(tmp_path: Path, name: str, values: list[Any], expected: list[str]) -> None:
    assert cells(tmp_path, pd.DataFrame({name: pd.Series(values)})) == expected


def test_estimate_and_interval_stand_on_two_lines(tmp_path: Path) -> None:
    assert cells(tmp_path, pd.DataFrame({"d": ["-0.1 [-0.2, 0.0]"]})) == [
        '-0.1<br><span class="interval">[-0.2, 0.0]</span>'
    ]


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", **content(title="old"))

    class Broken(Figure):
        def savefig(self, *args: Any, **options: Any) -> None:
            raise RuntimeError("no ink")

    with pytest.raises(RuntimeError, match="no ink"):
        write_report(path, **content(title="new", figures={"x": Broken()}))
    assert "old" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"r\.html"):
        write_report(tmp_path / "file" / "r.html", **content())
    with pytest.raises(DataError, match="cannot write"):
        save_figure(figure(), tmp_path / "file" / "x")


@pytest.mark.parametrize("name", ["curve", "curve.png", "curve.SVG", "case.7"])
def test_save_figure_writes_png_and_svg(tmp_path: Path, name: str) -> None:
    png, svg = save_figure(figure(), tmp_path / "figures" / name)
    stem = "case.7" if name == "case.7" else "curve"
    assert (png.name, svg.name) == (f"{stem}.png", f"{stem}.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().rstrip().endswith("</svg>")
    assert sorted(p.name for p in png.parent.iterdir()) == sorted([png.name, svg.name])
    assert stat.S_ISREG(png.stat().st_mode)
    first = (png.read_bytes(), svg.read_bytes())
    save_figure(figure(), tmp_path / "figures" / name)
    assert (png.read_bytes(), svg.read_bytes()) == first  # the same figure gives the same bytes


def test_long_tables_are_folded_and_complete(tmp_path: Path) -> None:
    tables = {"short": pd.DataFrame({"a": range(3)}), "long": pd.DataFrame({"a": range(40)})}
    html = write_report(tmp_path / "r.html", **content(tables=tables)).read_text(encoding="utf-8")
    folded = re.findall(r"<details>(.*?)</details>", html, re.DOTALL)
    assert len(folded) == 1
    assert "long" in folded[0]
    assert folded[0].count("<td") == 40
