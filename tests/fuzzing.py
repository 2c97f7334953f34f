"""How hard the fuzz tests try: a fixed few examples, or with HYPOTHESIS_PROFILE=thorough many, other ones each time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


def fuzz(examples: int) -> settings:
    """Settings of a test that tries so many examples (15 times as many when thorough); no profile of others changes."""
    return settings(
        derandomize=not THOROUGH,
        max_examples=examples * (15 if THOROUGH else 1),
        deadline=None,
        database=None,
        print_blob=THOROUGH,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
