"""What is said where there are too few subjects for a p-value: not that nothing was found."""

from __future__ import annotations

import pandas as pd
import pytest

from monai_adv.stats import compare
from monai_adv.studies.analysis import ordering, shown_ordering
from monai_adv.visualize import study_words


def records(subjects: int, settings: int = 3) -> pd.DataFrame:
    rows = []
    for n in range(subjects):
        for rank, method in enumerate(["clean", *["noise", "fgsm", "ifgsm"][:settings]]):
            known = {"subject": f"S{n}", "victim": "net", "method": method, "attack": method, "region": "WT"}
            rows.append({**known, "eps": 0.1 * (rank > 0), "dice": 0.9 - 0.2 * rank - 0.01 * n})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("subjects", "said"), [(5, "n < 6: not tested"), (8, "yes")])
def test_the_order_is_not_denied_where_it_was_not_tested(subjects: int, said: str) -> None:
    table = ordering(records(subjects))
    assert set(shown_ordering(table)["holds"]) == {said}
    assert table["holds"].dtype == bool  # as the schema of summary.json has it


@pytest.mark.parametrize(
    ("subjects", "said"),
    [
        (5, "Too few subjects for any claim"),
        (6, "6 subjects cannot reach it over 3 tests, whatever they show; 7 could."),
        (7, "3 of 3 comparisons"),
    ],
)
def test_the_box_says_how_many_subjects_it_takes(subjects: int, said: str) -> None:
    assert said in study_words._tests(compare(records(subjects), baseline="clean"))
