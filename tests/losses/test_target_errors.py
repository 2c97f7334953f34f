"""Target rules that cannot be followed: refused when they are read, or as soon as head and volume are known."""

from __future__ import annotations

import pytest
import torch

from monai_adv import attacks
from monai_adv.errors import ConfigError
from monai_adv.losses import RULES, check_target_rule, make_target
from monai_adv.victims import Head

SOFTMAX, SIGMOID = Head("softmax"), Head("sigmoid")
ORGANS = Head("sigmoid", ("liver", "spleen"))
SOUND = [
    {"hide": 0},
    {"swap": ["NCR", 3]},
    {"grow": 1.5},
    {"grow": {"mm": 4}},
    {"shrink": {"mm": 1, "region": "TC"}},
    {"shift": [1.0, -2]},
    {"insert": {"radius": 1.2, "class": "NCR", "seed": 3}},
    {"insert": {"radius": 6, "class": 2, "center": [2, 3, 4]}},
]


def target(rule, label, head=SOFTMAX, channels=4, **options) -> torch.Tensor:
    return make_target(rule, label, torch.zeros(len(label), channels, *label.shape[2:]), head, **options)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("vanish", r"target 'vanish' is unknown: use one of background, .*\{hide: ET\}; \{swap"),
        ("grow", r"target 'grow' needs its arguments: \{grow: 4\}"),
        ({"gorw": 3}, "is unknown: use one of"),
        ({"grow": 3, "shift": [1, 1, 1]}, "is unknown: use one of"),
        ({}, "is unknown: use one of"),
        (["grow", 3], "neither a rule nor a mask"),
        ({"hide": True}, r"malformed: hide is written \{hide: ET\}"),
        ({"hide": ["ET"]}, "malformed"),
        ({"grow": -1}, "malformed"),
        ({"grow": "4 mm"}, "malformed"),
        ({"grow": True}, "malformed"),
        ({"grow": float("inf")}, "malformed"),
        ({"grow": float("nan")}, "malformed"),
        ({"grow": {"region": "ET"}}, "malformed"),
        ({"shrink": {"mm": 3, "class": "ET"}}, "malformed"),
        ({"shrink": {"mm": 3, "region": None}}, "malformed"),
        ({"swap": ["ET"]}, "malformed"),
        ({"swap": "ET"}, "malformed"),
        ({"shift": 3}, "malformed: shift is written"),
        ({"shift": [1, "2", 3]}, "malformed"),
        ({"shift": [1, float("inf"), 3]}, "malformed"),
        ({"insert": {"radius": 3}}, "malformed: insert is written"),
        ({"insert": {"radius": 0, "class": "ET"}}, "malformed"),
        ({"insert": {"radius": 3, "class": "ET", "centre": [1, 1, 1]}}, "malformed"),
        ({"insert": {"radius": 3, "class": "ET", "center": [1.5, 1, 1]}}, "malformed"),
        ({"insert": {"radius": 3, "class": "ET", "center": [-1, 1, 1]}}, "malformed"),
        ({"insert": {"radius": 3, "class": "ET", "seed": -1}}, "malformed"),
        ({"insert": {"radius": 3, "class": "ET", "seed": 1, "center": [1, 1, 1]}}, "malformed"),
        ({"subject": "BraTS2021_00000"}, "studies resolve"),
        ({"file": "mask.nii.gz", "scheme": "brats2021"}, "studies resolve"),
    ],
)
def test_malformed_rules_are_refused_when_they_are_read(rule, message):
    with pytest.raises(ConfigError, match=message):
        check_target_rule(rule)
    with pytest.raises(ConfigError, match=message):
        attacks.create("targeted_ifgsm", target=rule)


@pytest.mark.parametrize("rule", [*RULES, *SOUND], ids=str)
def test_sound_rules_are_read(rule):
    check_target_rule(rule)
    assert attacks.create("targeted_ifgsm", target=rule).target == rule


@pytest.mark.parametrize(
    ("head", "channels", "rule", "message"),
    [
        (SOFTMAX, 4, {"swap": ["WT", "TC"]}, "both hold NCR, ET"),
        (SIGMOID, 3, {"swap": ["TC", "ET"]}, "both hold ET"),
        (SOFTMAX, 4, {"swap": [2, "ED"]}, "both hold ED"),
        (SOFTMAX, 4, {"swap": ["liver", "ED"]}, r"cannot swap 'liver': use a class index 0\.\.3, or one of NCR"),
        (Head("sigmoid", ("WT",)), 1, {"swap": ["NCR", "ED"]}, "do not tell them apart"),
        (ORGANS, 2, {"swap": ["liver", 0]}, "the same region"),
        (ORGANS, 2, {"grow": {"mm": 2, "region": "ET"}}, "the head's regions are liver, spleen"),
        (ORGANS, 2, {"grow": {"mm": 2, "region": 2}}, "the head's regions are liver, spleen"),
        (SOFTMAX, 4, {"grow": {"mm": 2, "region": 4}}, r"cannot grow class 4: the network has the classes 0\.\.3"),
        (SIGMOID, 3, {"shrink": {"mm": 2, "region": 4}}, r"cannot shrink class 4: the network has the classes 0\.\.3"),
        (SOFTMAX, 2, {"grow": {"mm": 2, "region": "ET"}}, r"cannot grow 'ET': use a class index 0\.\.1"),
        (
            Head("softmax", {"a": (1,)}),
            3,
            {"hide": "NCR"},
            r"cannot hide 'NCR': use a class index 0\.\.2, or one of a$",
        ),
        (SOFTMAX, 2, {"hide": "ET"}, r"cannot hide 'ET': use a class index 0\.\.1"),
        (SOFTMAX, 4, {"insert": {"radius": 2, "class": "TC"}}, r"one class .* not classes \[1, 3\]"),
        (SIGMOID, 3, {"insert": {"radius": 2, "class": "background"}}, r"not classes \[0\]"),
        (Head("sigmoid", ("TC", "ET")), 2, {"insert": {"radius": 2, "class": "ED"}}, "the head knows"),
        (SOFTMAX, 4, {"insert": {"radius": 2, "class": "ET", "center": [1, 1]}}, r"\[1, 1\] needs 3 voxel indices"),
        (SOFTMAX, 4, {"insert": {"radius": 2, "class": "ET", "center": [1, 1, 5]}}, "outside the volume"),
        (SOFTMAX, 4, {"shift": [1, 1]}, "needs 3 distances"),
    ],
)
def test_rules_that_do_not_fit_the_head_or_the_volume(head, channels, rule, message):
    label = torch.zeros(1, 1 if head.exclusive else channels, 5, 5, 5, dtype=torch.long)
    with pytest.raises(ConfigError, match=message):
        target(rule, label, head, channels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": (1.0, 1.0)}, "must be 3 sizes in mm"),
        ({"spacing": (1.0, 0.0, 1.0)}, "must be 3 sizes in mm"),
        ({"support": torch.ones(2, 1, 5, 5, 5)}, "does not fit the label"),
        ({"support": torch.ones(1, 1, 5, 5, 4)}, "does not fit the label"),
    ],
)
def test_spacing_and_support_have_to_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        target({"grow": 1}, torch.zeros(1, 1, 5, 5, 5, dtype=torch.long), **options)
