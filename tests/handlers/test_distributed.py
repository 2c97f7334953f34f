"""Two processes evaluate what one does: every case once, and the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from ddp_worker import evaluate
from two_processes import run_two

pytestmark = pytest.mark.slow

CASES = {  # number of cases and how they are dealt, see ddp_worker.evaluate
    "partition": (5, "partition"),
    "sampler": (5, "sampler"),
    "padded": (5, "padded"),
    "twice": (2, "same"),
    "empty": (1, "dealt"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """The folders that two processes wrote, and what each said to each of ``CASES``."""
    root = tmp_path_factory.mktemp("two")
    run_two(Path(__file__).with_name("ddp_worker.py"), root, json.dumps(CASES), timeout=150)
    return root, [json.loads((root / f"said{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    evaluate(folder)
    return folder


def table(folder: Path, name: str, by: list[str]) -> pd.DataFrame:
    return pd.read_csv(folder / name).sort_values(by, ignore_index=True)


@pytest.mark.parametrize("case", ["partition", "sampler"])
def test_two_processes_with_uneven_cases_are_one(case: str, one: Path, two: tuple[Path, list[dict[str, str]]]) -> None:
    root, said = two
    assert [text[case] for text in said] == ["", ""]
    records = [table(folder, "records.csv", ["subject", "attack", "region"]) for folder in (one, root / case)]
    assert records[1]["subject"].nunique() == 5
    assert len(records[1]) == 5 * 2 * 3
    pd.testing.assert_frame_equal(*records)
    raw = [table(folder, "dice_raw.csv", ["filename"]) for folder in (one, root / case)]
    assert raw[1]["filename"].nunique() == len(raw[1]) == 5
    pd.testing.assert_frame_equal(*raw)
    assert [p.name for p in (root / case).glob("records*")] == ["records.csv"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("padded", "deals 6 cases from 5 to 2 processes and so repeats some: a duplicated case is a wrong p-value"),
        ("twice", "several processes recorded case0, case1: a duplicated case is a wrong p-value"),
    ],
)
def test_a_case_that_is_dealt_twice_is_an_error_of_every_process(
    case: str, message: str, two: tuple[Path, list[dict[str, str]]]
) -> None:
    root, said = two
    assert all(message in text[case] for text in said)
    assert not (root / case / "records.csv").exists()
    kept = sorted(p.name for p in (root / case).glob("records.rank*.csv"))
    assert kept == (["records.rank0.csv", "records.rank1.csv"] if case == "twice" else [])


def test_a_process_without_a_case_says_so_and_the_other_does_not_wait_for_it(
    two: tuple[Path, list[dict[str, str]]],
) -> None:
    root, said = two
    assert "process 1 has no case" in said[1]["empty"]
    assert said[0]["empty"]
    assert "imed out" not in said[0]["empty"]
    assert not (root / "empty" / "records.csv").exists()
