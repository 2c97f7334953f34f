"""Clinical edits as targets: analytic balls, distances in mm, invariants, and the same target for both heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import make_label
from scipy import ndimage

from monai_adv.errors import ConfigError
from monai_adv.losses import EDITS, edits, make_target
from monai_adv.victims import Head

SOFTMAX, SIGMOID = Head("softmax"), Head("sigmoid")
ORGANS = Head("sigmoid", ("liver", "spleen"))
NCR, ED, ET = 1, 2, 3
SPACINGS = {"2D": (1.0, 2.5), "3D": (1.0, 1.0, 1.0), "anisotropic": (0.8, 1.2, 3.0)}
GEOMETRIC = [
    {"swap": ["NCR", "ET"]},
    {"swap": ["TC", "ED"]},
    {"grow": 1.5},
    {"grow": {"mm": 1.5, "region": "ET"}},
    {"shrink": 1},
    {"shrink": {"mm": 1, "region": "TC"}},
    {"shift": [1.0, -2.0, 1.5]},
    "remove_smallest_lesion",
    {"insert": {"radius": 1.2, "class": "ET"}},
    {"insert": {"radius": 1.2, "class": "NCR", "seed": 3}},
    {"insert": {"radius": 1.2, "class": "ED", "center": [2, 3, 4]}},
]
RULE_IDS = [str(r) for r in GEOMETRIC]


def ball(shape, radius, spacing, center=None) -> torch.Tensor:
    """1 within ``radius`` mm of the centre, ``(1, 1, *shape)``."""
    center = [n // 2 for n in shape] if center is None else center
    squared = sum(((g - c) * s) ** 2 for g, c, s in zip(np.ogrid[tuple(map(slice, shape))], center, spacing))
    return torch.from_numpy(squared <= radius**2).long()[None, None]


def shape_for(spacing, extent=13.0) -> tuple[int, ...]:
    return tuple(2 * math.ceil(extent / s) + 1 for s in spacing)


def nested_lesion(batch=3, shape=(11, 12, 13)) -> torch.Tensor:
    """Oedema around an enhancing rim around necrosis, at another place in each sample, and one crumb."""
    label = torch.zeros((batch, 1, *shape), dtype=torch.long)
    for b in range(batch):
        for radius, index in ((3.2, ED), (2.2, ET), (1.2, NCR)):
            label[b][ball(shape, radius, (1, 1, 1), (4 + b, 5, 7 - b))[0] == 1] = index
        label[b, 0, 0, 0, 1] = ED
    return label


def target(rule, label, head=SOFTMAX, channels=None, **options) -> torch.Tensor:
    channels = (4 if head.exclusive else len(head.region_names)) if channels is None else channels
    logits = torch.zeros(len(label), channels, *label.shape[2:])
    return make_target(rule, label, logits, head, **options)


# ------------------------------------------------------------------------------------------------- grow, shrink
@pytest.mark.parametrize("mm", [2.0, 5.0])
@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
def test_a_grown_ball_is_the_larger_ball_within_a_voxel(spacing, mm):
    shape, voxel = shape_for(spacing), math.hypot(*spacing)
    grown = target({"grow": mm}, ball(shape, 6, spacing), spacing=spacing)
    assert (grown <= ball(shape, 6 + mm + 1e-3, spacing)).all()
    assert (grown >= ball(shape, 6 + mm - voxel, spacing)).all()
    assert grown.sum() > ball(shape, 6, spacing).sum()


@pytest.mark.parametrize("mm", [2.0, 5.0])
@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
def test_a_shrunk_ball_is_the_smaller_ball_within_a_voxel(spacing, mm):
    shape, voxel = shape_for(spacing), math.hypot(*spacing)
    shrunk = target({"shrink": mm}, ball(shape, 9, spacing), spacing=spacing)
    assert (shrunk >= ball(shape, 9 - mm - 1e-3, spacing)).all()
    assert (shrunk <= ball(shape, 9 - mm + voxel, spacing)).all()
    assert shrunk.sum() < ball(shape, 9, spacing).sum()


def test_distances_are_in_mm_along_every_axis():
    label = torch.zeros(1, 1, 11, 11, 11, dtype=torch.long)
    label[0, 0, 5, 5, 5] = ED
    spacing = (1.0, 2.0, 4.0)
    grown = target({"grow": 4}, label, spacing=spacing)
    assert torch.equal(grown, ED * ball((11, 11, 11), 4, spacing))
    reach = [int((grown[0, 0].movedim(axis, 0)[:, 5, 5] > 0).sum()) // 2 for axis in range(3)]
    assert reach == [4, 2, 1]
    assert torch.equal(target({"grow": 4}, label), ED * ball((11, 11, 11), 4, (1, 1, 1)))  # 1 mm where nobody says


def test_spacings_of_float32_affines_reach_as_far_as_they_should():
    label = torch.zeros(1, 1, 9, 1, dtype=torch.long)
    label[0, 0, 4] = 1
    size = float(np.float32(0.1)) * (1 + 1e-7)
    assert 3 * size > 0.3
    assert target({"grow": 0.3}, label, spacing=(size, 1.0)).sum() == 7
    assert target({"shrink": 0.3}, 1 - label, spacing=(size, 1.0)).sum() == 2


def test_new_voxels_take_the_label_of_the_nearest_lesion_voxel():
    label = torch.tensor([0, 0, 0, 1, 2, 3, 0, 0, 0, 0]).view(1, 1, 10, 1)
    assert target({"grow": 2}, label).flatten().tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 0, 0]
    assert target({"grow": {"mm": 1, "region": "ED"}}, label).flatten().tolist() == [0, 0, 0, 2, 2, 2, 0, 0, 0, 0]
    assert target({"grow": {"mm": 1, "region": 1}}, label).flatten().tolist() == [0, 0, 1, 1, 1, 3, 0, 0, 0, 0]
    grown = target({"grow": {"mm": 3, "region": "TC"}}, label).flatten().tolist()
    assert grown == [1, 1, 1, 1, grown[4], 3, 3, 3, 3, 0]
    assert grown[4] in (1, 3)


def test_what_a_shrinking_region_loses_takes_the_nearest_remaining_label():
    label = torch.tensor([0, 0, 2, 3, 3, 3, 3, 1, 1, 0]).view(1, 1, 10, 1)
    assert target({"shrink": {"mm": 1, "region": "ET"}}, label).flatten().tolist() == [0, 0, 2, 2, 3, 3, 1, 1, 1, 0]
    assert target({"shrink": {"mm": 9, "region": "ET"}}, label).flatten().tolist() == [0, 0, 2, 2, 2, 1, 1, 1, 1, 0]
    assert target({"shrink": {"mm": 1, "region": "TC"}}, label).flatten().tolist() == [0, 0, 2, 2, 3, 3, 3, 1, 0, 0]
    assert target({"shrink": 2}, label).flatten().tolist() == [0, 0, 0, 0, 3, 3, 3, 0, 0, 0]
    assert not target({"shrink": 4}, label).any()


@pytest.mark.parametrize("rule", [{"grow": 0}, {"grow": {"mm": 0, "region": "TC"}}, {"shrink": 0}, {"shift": [0, 0, 0]},
                                  {"shrink": {"mm": 0, "region": "ET"}}])  # fmt: skip
@pytest.mark.parametrize("head", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_nothing_by_0_mm(head, rule):
    label = head.label_from_classes(nested_lesion())
    assert torch.equal(target(rule, label, head), label)


def test_where_there_is_nothing_to_grow_or_shrink():
    empty, full = torch.zeros(1, 1, 4, 4, dtype=torch.long), torch.full((1, 1, 4, 4), ED)
    for rule in ({"grow": 3}, {"shrink": 3}, {"shift": [1, 1]}, "remove_smallest_lesion", {"swap": ["NCR", "ET"]}):
        assert torch.equal(target(rule, empty), empty)
    full[..., 0], full[..., -1] = NCR, ET
    for rule in ({"grow": 3}, {"shrink": 3}, {"shrink": {"mm": 3, "region": "WT"}}):
        assert torch.equal(target(rule, full), full)
    other = full.clamp_max(ED)
    for rule in ({"grow": {"mm": 9, "region": "ET"}}, {"shrink": {"mm": 9, "region": "ET"}}):
        assert torch.equal(target(rule, other), other)


# ----------------------------------------------------------------------------------------------- shift and swap
@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
def test_the_lesion_moves_by_mm(spacing):
    shape = shape_for(spacing)
    label = ball(shape, 4, spacing) * ED
    label[ball(shape, 2, spacing) == 1] = ET
    wanted = (2.4, -4.0, 6.5)[: len(spacing)]
    moved = target({"shift": list(wanted)}, label, spacing=spacing)
    assert torch.equal(moved.flatten().bincount(minlength=4), label.flatten().bincount(minlength=4))
    for index in (ED, ET):
        before, after = (np.array(ndimage.center_of_mass((x[0, 0] == index).numpy())) for x in (label, moved))
        assert (np.abs((after - before) * spacing - wanted) <= np.array(spacing) / 2 + 1e-9).all()
        assert np.allclose(after - before, np.round(after - before))
    back = target({"shift": [-d for d in wanted]}, moved, spacing=spacing)
    assert torch.equal(back, label)


def test_what_leaves_the_volume_is_lost():
    label = torch.tensor([[1, 2, 3], [0, 0, 1]]).view(1, 1, 2, 3)
    assert target({"shift": [0, 1]}, label).flatten().tolist() == [0, 1, 2, 0, 0, 0]
    assert not target({"shift": [5, 0]}, label).any()


def test_swapped_classes():
    label = nested_lesion()
    swapped = target({"swap": ["NCR", 3]}, label)
    assert torch.equal(swapped == ET, label == NCR)
    assert torch.equal(swapped == NCR, label == ET)
    assert torch.equal(swapped[(label == 0) | (label == ED)], label[(label == 0) | (label == ED)])
    for rule in ({"swap": ["NCR", "ET"]}, {"swap": ["ED", "ET"]}, {"swap": [0, 2]}):
        assert torch.equal(target(rule, target(rule, label)), label)


def test_swapped_parts_of_several_classes_take_the_nearest_of_them():
    label = torch.tensor([0, 2, 2, 1, 1, 3, 2, 2, 0]).view(1, 1, 9, 1)
    assert target({"swap": ["TC", "ED"]}, label).flatten().tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 0]
    assert target({"swap": ["ED", "TC"]}, label.clamp_max(2) // 2 * 2).flatten().tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0]


# ----------------------------------------------------------------------------------------- removing and inserting
@pytest.mark.parametrize("dims", [2, 3])
def test_the_smallest_lesion_goes(dims):
    shape = (9, 8, 7)[:dims]
    label = torch.zeros(1, 1, *shape, dtype=torch.long)
    large = ball(shape, 1.5, (1,) * dims, (2,) * dims)
    label[large == 1] = ED
    label[(0, 0, *[2] * dims)] = ET
    only_large = label.clone()
    label[(0, 0, *[5] * dims)] = NCR
    label[(0, 0, *[6] * dims)] = ET  # touches it by a corner: one component of two voxels
    assert torch.equal(target("remove_smallest_lesion", label), only_large)
    assert not target("remove_smallest_lesion", only_large).any()


def test_of_equal_lesions_the_first_goes():
    label = torch.tensor([0, 1, 0, 2, 0, 3, 3, 0]).view(1, 1, 8, 1)
    assert target("remove_smallest_lesion", label).flatten().tolist() == [0, 0, 0, 2, 0, 3, 3, 0]


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
def test_an_inserted_lesion_lies_inside_the_support_and_clear_of_the_other(spacing, seed):
    shape = shape_for(spacing, 16)
    middle = [n // 2 for n in shape]
    label = ball(shape, 3, spacing, [c - int(5 / s) for c, s in zip(middle, spacing)]) * ED
    support = ball(shape, 15, spacing)
    rule = {"insert": {"radius": 4, "class": "ET"} | ({} if seed is None else {"seed": seed})}
    found = target(rule, label, spacing=spacing, support=support)
    new = found == ET
    center = [round(c) for c in ndimage.center_of_mass(new[0, 0].numpy())]
    assert torch.equal(new.long(), ball(shape, 4, spacing, center))  # whole, so of the right volume
    assert (support[new] == 1).all()
    assert torch.equal(found[~new], label[~new])
    assert ndimage.label(found[0, 0].numpy(), np.ones((3,) * len(shape)))[1] == 2
    volume = float(new.sum()) * math.prod(spacing)
    full = math.pi * 16 if len(spacing) == 2 else 4 / 3 * math.pi * 64
    assert volume == pytest.approx(full, rel=0.25)
    assert torch.equal(target(rule, label, spacing=spacing, support=support), found)


def test_without_a_seed_the_place_is_the_farthest_from_the_lesion():
    shape = (21, 15)
    label, support = torch.zeros(1, 1, *shape, dtype=torch.long), torch.zeros(1, 2, *shape, dtype=torch.bool)
    label[0, 0, 3, 7] = NCR
    support[0, 0, 1:12, 1:14], support[0, 1, 12:20, 1:14] = True, True  # the union of the channels counts
    found = target({"insert": {"radius": 2, "class": "ET"}}, label, support=support)
    assert torch.equal(found == ET, ball(shape, 2, (1, 1), (17, 3)) == 1)  # 3 from the border at 20: the first corner
    deepest = target({"insert": {"radius": 2, "class": "ET"}}, torch.zeros_like(label))
    assert deepest[0, 0, 7, 7] == ET
    seeds = [target({"insert": {"radius": 2, "class": "ET", "seed": s}}, label, support=support) for s in range(4)]
    assert not all(torch.equal(seeds[0], s) for s in seeds)


@pytest.mark.parametrize("seed", [{}, {"seed": 1}])
def test_every_sample_has_its_own_support(seed):
    support = torch.zeros(3, 1, 9, 30, dtype=torch.bool)
    for b in range(3):
        support[b, ..., 10 * b : 10 * b + 9] = True
    found = target({"insert": {"radius": 2, "class": "ET"} | seed}, torch.zeros(3, 1, 9, 30).long(), support=support)
    assert found.eq(ET).flatten(1).sum(1).tolist() == [13, 13, 13]
    assert support[found == ET].all()


def test_a_center_is_taken_at_its_word():
    label = torch.full((1, 1, 6, 6), ED)
    found = target({"insert": {"radius": 3, "class": 1, "center": [0, 5]}}, label, spacing=(1.5, 3.0))
    assert torch.equal(found == NCR, ball((6, 6), 3, (1.5, 3.0), (0, 5)) == 1)
    assert torch.equal(found == ED, found != NCR)


def test_no_room():
    label = ball((15, 15), 2, (1, 1), (4, 7))
    with pytest.raises(ConfigError, match=r"no room for a lesion of radius 6 mm .* must be below 4 mm"):
        target({"insert": {"radius": 6, "class": "ET"}}, label)
    with pytest.raises(ConfigError, match="no room"):
        target({"insert": {"radius": 4, "class": "ET"}}, label)
    assert target({"insert": {"radius": 3.9, "class": "ET"}}, label).eq(ET).any()
    with pytest.raises(ConfigError, match="no room"):
        target({"insert": {"radius": 1, "class": "ET"}}, label, support=label)


# ---------------------------------------------------------------------------------------------------- invariants
@pytest.mark.parametrize("rule", GEOMETRIC, ids=RULE_IDS)
def test_both_heads_get_the_same_target(rule):
    classes = nested_lesion()
    spacing = (1.0, 0.7, 1.3)
    expected = target(rule, classes, spacing=spacing)
    assert not torch.equal(expected, classes)
    found = target(rule, SIGMOID.label_from_classes(classes), SIGMOID, spacing=spacing)
    assert found.dtype == torch.bool
    assert torch.equal(found, SIGMOID.label_from_classes(expected))
    other = Head("sigmoid", ("ET", "WT", "TC"))  # the order of the channels does not matter
    found = target(rule, other.label_from_classes(classes), other, spacing=spacing)
    assert torch.equal(found, other.label_from_classes(expected))


@pytest.mark.parametrize("rule", GEOMETRIC, ids=RULE_IDS)
@pytest.mark.parametrize("head", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_a_batch_is_its_members_and_the_label_is_left_alone(head, rule):
    label = head.label_from_classes(nested_lesion())
    support = torch.rand(3, 2, 11, 12, 13, generator=torch.Generator().manual_seed(0)) < 0.99
    before = label.clone()
    size = (1.0, 1.0, 1.2)
    together = target(rule, label, head, spacing=size, support=support)
    alone = [target(rule, label[[b]], head, spacing=size, support=support[[b]]) for b in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(label, before)
    assert together.dtype == label.dtype


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_edits_keep_the_type(dtype):
    label = nested_lesion().to(dtype)
    unit = (1.0, 1.0, 1.0)
    for found in (
        edits.grow(label, 1, unit), edits.shrink(label, 1, unit), edits.shift(label, (1, 1, 1), unit),
        edits.swap(label, [1], [3], unit), edits.remove(label, [3], unit), edits.remove_smallest_lesion(label),
        edits.insert(label, 1, 3, unit),
    ):  # fmt: skip
        assert found.dtype == dtype
        assert found.shape == label.shape


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_every_edit_in_2d_and_3d(head, dims):
    label = make_label(head, dims=dims)
    rules = [{"grow": 1}, {"shrink": 1}, {"shift": [1] * dims}, {"swap": [1, 2]}, {"hide": "ET"},
             {"insert": {"radius": 1, "class": "ET", "center": [1] * dims}}]  # fmt: skip
    assert {next(iter(r)) for r in rules} == set(EDITS)
    for rule in rules:
        found = target(rule, label, Head(head))
        logits = torch.zeros(4, 4 if head == "softmax" else 3, *label.shape[2:])
        assert torch.equal(Head(head).check_label(found, logits), found)
        assert not torch.equal(found, label)


# --------------------------------------------------------------------------------------------------- other heads
def test_hiding_fills_by_mm():
    label = torch.tensor([[0, 0, 0], [2, 3, 2], [1, 1, 1]]).view(1, 1, 3, 3)
    assert target({"hide": "ET"}, label, spacing=(1.0, 3.0))[0, 0, 1, 1] in (0, 1)
    assert target({"hide": "ET"}, label, spacing=(3.0, 1.0))[0, 0, 1, 1] == 2


def test_a_softmax_head_of_other_classes():
    head = Head("softmax", {"kidney": (1, 2), "tumour": (2,)})
    label = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0]).view(1, 1, 8, 1)
    for rule, expected in (
        ({"grow": 1}, [0, 1, 1, 1, 2, 2, 2, 0]),
        ({"grow": {"mm": 1, "region": "tumour"}}, [0, 0, 1, 2, 2, 2, 2, 0]),
        ({"swap": [1, "tumour"]}, [0, 0, 2, 2, 1, 1, 0, 0]),
        ({"shift": [2, 0]}, [0, 0, 0, 0, 1, 1, 2, 2]),
        ({"insert": {"radius": 1, "class": "tumour", "center": [0, 0]}}, [2, 2, 1, 1, 2, 2, 0, 0]),
    ):
        assert target(rule, label, head, channels=3).flatten().tolist() == expected
    binary = Head("softmax", {"WT": (1,)})
    assert target({"grow": 1}, label.clamp_max(1), binary, channels=2).flatten().tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("rule", "liver", "spleen"),
    [
        ({"grow": 1}, [0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0]),
        ({"grow": {"mm": 1, "region": "spleen"}}, [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0]),
        ({"shrink": {"mm": 1, "region": 0}}, [0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]),
        ({"swap": ["liver", 1]}, [0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]),
        ({"shift": [-2, 0]}, [1, 1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]),
        ("remove_smallest_lesion", [0] * 8, [0] * 8),
        ({"hide": "liver"}, [0] * 8, [0, 0, 0, 1, 1, 1, 0, 0]),
        ({"insert": {"radius": 0.5, "class": "liver"}}, [1, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]),
    ],
)
def test_channels_of_other_regions_are_edited_one_by_one(rule, liver, spleen):
    label = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]).bool().view(1, 2, 8, 1)
    found = target(rule, label, ORGANS)
    assert found.dtype == torch.bool
    assert found[0, :, :, 0].long().tolist() == [liver, spleen]
    pair = torch.cat([label.roll(1, 2), label])
    assert torch.equal(target(rule, pair, ORGANS)[1:], found)


@pytest.mark.parametrize("regions", [("WT",), ("TC", "ET"), ("ET", "WT")])
def test_some_of_the_brats_regions(regions):
    head, classes = Head("sigmoid", regions), nested_lesion()
    visible = classes if "WT" in regions else classes.where(classes != ED, torch.zeros_like(classes))
    for rule in ({"grow": 2}, {"shrink": 1}, {"shift": [2, 0, -2]}, "remove_smallest_lesion"):
        found = target(rule, head.label_from_classes(classes), head)
        assert torch.equal(found, head.label_from_classes(target(rule, visible)))
