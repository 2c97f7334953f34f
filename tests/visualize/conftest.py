"""Records of a made-up study for the pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_run import make_run

SLOPES = {"noise": 0.1, "fgsm": 2.0, "ifgsm": 4.0}


def make_records(
    subjects: int = 8,
    budgets: tuple[float, ...] = (0.05, 0.1),
    attacks: tuple[str, ...] = ("ifgsm", "noise", "fgsm"),
    victims: tuple[str, ...] = ("unet",),
) -> pd.DataFrame:
    """Dice falls in proportion to the budget, each attack with its slope, each subject from its own level."""
    rng = np.random.default_rng(0)
    rows = []
    for victim in victims:
        for subject in range(subjects):
            for region, level in (("WT", 0.9), ("ET", 0.7)):
                start = level - 0.1 * rng.random()
                common = {"subject": f"s{subject}", "victim": victim, "region": region, "units": "std", "norm": "linf"}
                rows.append({**common, "attack": "clean", "eps": 0.0, "dice": start, "status": "ok"})
                for attack in attacks:
                    for eps in budgets:
                        fall = SLOPES.get(attack, 1.0) * eps * (1 + 0.2 * rng.random())
                        rows.append(
                            {**common, "attack": attack, "eps": eps, "dice": max(0.0, start - fall), "status": "ok"}
                        )
    return pd.DataFrame(rows)


@pytest.fixture
def records() -> Callable[..., pd.DataFrame]:
    """The maker of records."""
    return make_records


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small real run with its report."""
    return make_run(tmp_path_factory.mktemp("small"))
