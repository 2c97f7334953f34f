"""What is shipped of the notebooks: their opening and closing, the one cell to change, whole and clean outputs.

That they run is nbmake's to test (see ``tutorials/conftest.py``); here nothing is executed.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_000_000  # bytes
# folders of a machine; /data/BraTS2021 is the example that readers replace
MACHINE = re.compile(r"(?<![\w.:/\\])(?:/(?:home|root|work|tmp|Users|opt|private|usr|mnt|var|srv)/|[A-Z]:\\\\?\w)")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    """Each notebook in turn."""
    return request.param


@pytest.fixture
def cells(path: Path) -> list[dict[str, Any]]:
    """Its cells, each with its source as one text under ``"text"``."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "text": "".join(cell["source"])} for cell in found]


@pytest.fixture
def code(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Its code cells that hold anything."""
    return [cell for cell in cells if cell["cell_type"] == "code" and cell["text"].strip()]


@pytest.fixture
def outputs(code: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything that its cells have put out."""
    return [output for cell in code for output in cell["outputs"]]


def test_the_notebooks_are_numbered_without_a_gap_and_are_the_only_sources() -> None:
    assert [path.stem[:3] for path in NOTEBOOKS] == [f"{number:02d}_" for number in range(1, 10)]
    assert {path.name for path in FOLDER.glob("*.py")} <= {"conftest.py"}


def test_it_opens_with_what_the_reader_will_be_able_to_do(cells: list[dict[str, Any]]) -> None:
    first = cells[0]
    assert first["cell_type"] == "markdown"
    assert first["text"].startswith("# ")
    assert "After this notebook you can" in first["text"]
    assert 3 <= len(re.findall(r"^- ", first["text"], re.MULTILINE)) <= 5
    assert re.search(r"minutes?\b", first["text"]), "say how long it takes"


def test_one_cell_switches_to_the_readers_own_data(code: list[dict[str, Any]]) -> None:
    tagged = [index for index, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == [1], "the second code cell, and no other"
    for name in ("DATA", "SMALL", "OUT"):
        here = [index for index, cell in enumerate(code) if f"MONAI_ADV_TUTORIAL_{name}" in cell["text"]]
        assert here == [1], f"MONAI_ADV_TUTORIAL_{name} belongs into that cell"


def test_it_closes_with_where_to_go_next_and_a_limitation(cells: list[dict[str, Any]], path: Path) -> None:
    last = cells[-1]
    assert last["cell_type"] == "markdown"
    assert re.search(r"under (this|these|\*this\*) threat models?", re.sub(r"\s+", " ", last["text"]))
    assert any(link.startswith("../docs/") for link in LINK.findall(last["text"]))


def test_links_lead_somewhere(cells: list[dict[str, Any]], path: Path) -> None:
    text = "\n".join(cell["text"] for cell in cells if cell["cell_type"] == "markdown")
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if re.match(r"https?:", link) or not target:
            continue
        file = (path.parent / target).resolve()
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), link


def headings(file: Path) -> set[str]:
    """Anchors of a Markdown file as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_it_was_executed_from_top_to_bottom_without_an_error(
    code: list[dict[str, Any]], outputs: list[dict[str, Any]]
) -> None:
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]


def test_nothing_tells_of_the_machine_it_was_made_on(
    code: list[dict[str, Any]], outputs: list[dict[str, Any]], path: Path
) -> None:
    told = [cell["text"] for cell in code]
    for output in outputs:
        told.append("".join(output.get("text", "")))
        told += ["".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
    assert not [found.group() for text in told for found in MACHINE.finditer(text)]
    assert not any("\r" in text or "it/s]" in text for text in told), "a progress bar"
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert "widgets" not in metadata


def test_it_shows_figures_and_stays_small(outputs: list[dict[str, Any]], path: Path) -> None:
    kinds = [set(output.get("data", {})) for output in outputs]
    assert any("image/png" in kind for kind in kinds)
    assert not any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds), (
        "a figure can be read anywhere"
    )
    assert not any(re.match(r"<(Notebook)?Figure size", "".join(output["data"].get("text/plain", "")))
                   and "image/png" not in output["data"] for output in outputs if "data" in output)  # fmt: skip
    assert path.stat().st_size < LARGEST


def test_it_uses_what_is_public(code: list[dict[str, Any]]) -> None:
    for cell in code:
        lines = cell["text"].splitlines()
        tree = ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))
        for node in ast.walk(tree):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            private = [name for name in names if name.startswith("_") and not name.startswith("__") and name != "_exit"]
            assert not private, f"{private} in line {getattr(node, 'lineno', 0)} of a cell"
