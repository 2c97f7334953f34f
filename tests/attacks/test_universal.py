"""Universal perturbations: the step in closed form, targets, the way to other grids and back, files, other subjects."""

from __future__ import annotations

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from oracles import SHAPES, linear_network, make_image, make_label, make_victim, out_channels

from monai_adv import attacks
from monai_adv.attacks import FGSM, Universal, UniversalPerturbation, fit_universal
from monai_adv.attacks.universal_training import confident
from monai_adv.errors import ConfigError, DataError, NonFiniteError
from monai_adv.losses import target_agreement
from monai_adv.threats import L2, LInf, Parametric
from monai_adv.victims import Head, Victim, mean_dice

FREE = LInf(0.3, bounds=None)
AFFINE = torch.tensor([[-2.0, 0, 0, 1 / 3], [0, -2, 0, 20], [0, 0, 3, -5.1], [0, 0, 0, 1]], dtype=torch.float64)


def make_cases(count=4, dims=3, head="softmax", seed=0, affine=None):
    images, labels = make_image(count, dims, seed=seed), make_label(head, count, dims, seed=seed + 1)
    if affine is not None:
        images = [MetaTensor(x, affine=affine) for x in images]
    return [{"image": x, "label": y, "subject": f"s{i}"} for i, (x, y) in enumerate(zip(images, labels))]


def random_perturbation(shape=(4, 4, 5, 6), affine=None, seed=3, **fields):
    data = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).sign()
    return UniversalPerturbation(data, fields.pop("threat", FREE), affine, **fields)


def readable_cohort(count, head="softmax", seed=0):
    """One anatomy, subjects that differ by noise, and a voxelwise linear victim that reads most of it."""
    network = linear_network(classes=out_channels(head))
    rows = torch.linalg.svd(network.weight.data.flatten(1), full_matrices=False)
    network.weight.data = (rows.U @ rows.Vh).view_as(network.weight)  # no logit is nearly a mixture of the others
    classes = make_label("softmax", 1, seed=11)
    label = Head(head).label_from_classes(classes)[0]
    wanted = torch.nn.functional.one_hot(label[0], 4).movedim(-1, 0) if head == "softmax" else label * 2 - 1
    weight, bias = network.weight.detach().flatten(1), network.bias.detach().view(-1, 1, 1, 1)
    clean = torch.einsum("kc,k...->c...", weight, 2.0 * wanted - bias)
    generator = torch.Generator().manual_seed(seed)
    noise = [0.3 * torch.randn(clean.shape, generator=generator, dtype=clean.dtype) for _ in range(count)]
    cases = [{"image": clean + n, "label": label, "subject": f"s{i}"} for i, n in enumerate(noise)]
    return Victim(network, head=head), cases


# ------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("threat", [FREE, L2(3.0, bounds=None), LInf(0.3, units="range", channels=(1,))])
def test_one_step_on_one_subject_is_the_one_step_attack(threat, dims, head):
    victim, case = make_victim("linear", head, dims), make_cases(1, dims, head)
    found = fit_universal(victim, case, threat, steps=1, step_size=threat.eps)
    image, label = case[0]["image"][None], case[0]["label"][None]
    expected = FGSM(threat)(victim, image, label).image
    torch.testing.assert_close(Universal(threat, found)(victim, image, label).image, expected, rtol=1e-9, atol=1e-9)
    mask = threat.bind(image).mask[0]
    assert not found.data[~mask].any()
    if threat.norm == "linf":
        assert torch.equal(found.data[mask].abs(), torch.full_like(found.data[mask], threat.eps))
    assert found.subjects == ("s0",)


def test_the_step_follows_the_mean_gradient_in_units():
    """Two subjects whose scanners differ: d moves by the sign of the mean of gradient times each one's own std."""
    network, cases = linear_network(), make_cases(2)
    cases[1]["image"] = 7 * cases[1]["image"]
    cases[1]["label"] = make_label("softmax", 1, seed=9)[0]
    total = torch.zeros_like(cases[0]["image"])
    for case in cases:
        leaf = case["image"][None].clone().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(network(leaf), case["label"], reduction="sum")
        gradient = torch.autograd.grad(loss, leaf)[0][0]
        for c, channel in enumerate(case["image"]):
            inside = channel != 0
            total[c] += torch.where(inside, gradient[c] * channel[inside].std(correction=0), 0.0)
    found = fit_universal(Victim(network), cases, FREE, steps=1, batch=2, loss="ce", step_size=0.3)
    assert torch.equal(found.data, 0.3 * total.sign())
    long = fit_universal(Victim(network), cases, L2(5.0, bounds=None), steps=1, batch=2, loss="ce", step_size=2.0)
    torch.testing.assert_close(long.data, 2 * total / total.norm(), rtol=1e-9, atol=1e-9)


def test_the_budget_is_kept_over_many_steps_and_the_default_step_reaches_it():
    victim, cases = make_victim("smooth"), make_cases(3)
    for threat in (FREE, L2(2.0, bounds=None)):
        data = fit_universal(victim, cases, threat, steps=6).data
        size = data.abs().max() if threat.norm == "linf" else data.norm()
        assert 0.99 * threat.eps <= size <= threat.eps * (1 + 1e-12)
    trained = fit_universal(victim, cases, FREE, steps=5)
    assert trained.details["step_size"] == pytest.approx(2.5 * 0.3 / 5)
    assert fit_universal(victim, cases, FREE, steps=1, step_size=0.1).data.abs().max() == 0.1


def test_batches_go_through_the_cohort_and_a_seed_repeats_them():
    victim, cases = make_victim("smooth"), make_cases(5)
    found = fit_universal(victim, cases, FREE, steps=6, batch=2, seed=1)
    visited = [entry["subjects"] for entry in found.details["trace"]]
    assert [len(v) for v in visited] == [2, 2, 1, 2, 2, 1]
    for half in (visited[:3], visited[3:]):
        assert sorted(name for batch in half for name in batch) == [f"s{i}" for i in range(5)]
    again = fit_universal(victim, iter(cases), FREE, steps=6, batch=2, seed=1)
    assert torch.equal(again.data, found.data)
    assert again.details == found.details
    assert not torch.equal(fit_universal(victim, cases, FREE, steps=6, batch=2, seed=2).data, found.data)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_trace_has_the_loss_and_the_dice_of_the_images_before_the_update(head):
    victim, cases = make_victim("windows", head), make_cases(2, head=head)
    found = fit_universal(victim, cases, FREE, steps=2, batch=2)
    image, label = torch.stack([c["image"] for c in cases]), torch.stack([c["label"] for c in cases])
    first = found.details["trace"][0]
    assert first["dice"] == pytest.approx(float(mean_dice(victim.predict(image), label, victim.head).mean()))
    loss = attacks.create("fgsm").loss(victim(image), label, victim.head)
    assert first["loss"] == pytest.approx(float(loss.mean()))
    hide = fit_universal(victim, cases, FREE, mode="dynamic", target={"hide": "ET"}, steps=1, batch=2)
    assert hide.details["trace"][0]["dice"] == pytest.approx(first["dice"])


def test_a_class_label_is_translated_for_a_sigmoid_head():
    victim = make_victim("linear", "sigmoid")
    classes = make_label("softmax", 1)[0]
    bits = victim.head.label_from_classes(classes[None])[0]
    image = make_image(1)[0]
    found = [fit_universal(victim, [{"image": image, "label": y}], FREE, steps=2).data for y in (classes, bits)]
    assert torch.equal(*found)


def test_visits_cost_no_clean_pass_unless_the_target_is_made_of_it():
    network, cases = linear_network(), make_cases(2)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    for options, expected in (
        ({}, 1 + 4),
        ({"mode": "dynamic", "target": {"hide": "ET"}}, 1 + 4),
        ({"mode": "dynamic", "target": "least_likely"}, 4 + 4),
        ({"label_source": "prediction"}, 4 + 4),
    ):
        calls.clear()
        fit_universal(Victim(network), cases, FREE, steps=2, batch=2, **options)
        assert len(calls) == expected, options


def test_the_clean_prediction_as_label():
    victim, cases = make_victim("smooth"), make_cases(2)
    expected = [{**c, "label": victim.predict(c["image"][None])[0]} for c in cases]
    found = fit_universal(victim, [{"image": c["image"]} for c in cases], FREE, steps=3, label_source="prediction")
    assert torch.equal(found.data, fit_universal(victim, expected, FREE, steps=3).data)


def test_a_support_is_kept():
    victim, cases = make_victim("smooth"), make_cases(2)
    support = torch.zeros(1, *SHAPES[3], dtype=torch.bool)
    support[..., :2] = True
    found = fit_universal(victim, [{**c, "support": support} for c in cases], FREE, steps=2)
    assert found.data[..., :2].any()
    assert not found.data[..., 2:].any()


# ------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_targets_are_approached_by_every_subject(mode, head):
    victim, cases = readable_cohort(3, head)
    target = make_label(head, 1, seed=40)[0] if mode == "static" else {"hide": "ET"}
    threat = LInf(0.8, bounds=None)
    found = fit_universal(victim, cases, threat, mode=mode, target=target, loss="ce", steps=20, batch=3)
    assert found.mode == mode
    for case in cases:
        image, label = case["image"][None], case["label"][None]
        goal = target[None] if mode == "static" else target
        attack = Universal(threat, found, target=goal)
        result = attack(victim, image, label)
        assert result.score > result.clean_score + 0.1
        if mode == "static":
            assert torch.equal(result.score, target_agreement(result.prediction, target[None], label))
    trace = found.details["trace"]
    assert trace[-1]["loss"] > trace[0]["loss"]
    json.dumps(found.target)


def test_a_static_mask_of_another_grid_lies_where_it_is_in_the_world():
    """The same mask on the reference grid, on a flipped grid of its own, and less than half a voxel off."""
    victim, cases = make_victim("linear"), make_cases(2, affine=AFFINE)
    mask = make_label("softmax", 1, seed=40)[0]
    flip = torch.eye(4, dtype=torch.float64)
    flip[0, 0], flip[0, 3] = -1, SHAPES[3][0] - 1
    other = MetaTensor(mask.flip(1), affine=AFFINE @ flip)
    near = AFFINE.clone()
    near[:, 3] = AFFINE @ torch.tensor([0.0, 0, 0.4, 1], dtype=torch.float64)
    found = [
        fit_universal(victim, cases, FREE, mode="static", target=m, steps=3).data
        for m in (mask, other, MetaTensor(mask, affine=near))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])  # no class between two others
    wrong = fit_universal(victim, cases, FREE, mode="static", target=mask.flip(1), steps=3).data
    assert not torch.equal(found[0], wrong)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("loss", ["ce", "dice"])
def test_voxels_at_the_target_with_confidence_contribute_nothing(head, loss):
    victim, case = make_victim("linear", head), make_cases(1, head=head)[0]
    image = case["image"][None]
    victim.network.weight.data *= 3
    target = victim.predict(image)
    target[..., :2] = make_label(head, 1, seed=12)[..., :2]
    sure = confident(victim(image).detach(), target, victim.head, 0.75).all(1)[0]
    inside = (image[0] != 0).all(0)
    assert (sure & inside).sum() > 5
    assert (~sure & inside).sum() > 5
    options = {"mode": "static", "target": target[0], "loss": loss, "steps": 1}
    found = fit_universal(victim, [case], FREE, **options).data
    assert not found[:, sure].any()
    assert found[:, ~sure & inside].all()
    assert fit_universal(victim, [case], FREE, confidence=1.0, **options).data[:, inside].all()


def test_confidence_of_both_heads():
    probability = torch.tensor([0.7, 0.1, 0.1, 0.1])
    logits = torch.stack([probability, torch.tensor([0.8, 0.1, 0.05, 0.05])], dim=1).log()[None]
    target = torch.tensor([[[0, 0]]])
    assert confident(logits, target, Head("softmax"), 0.75).tolist() == [[[False, True]]]
    assert not confident(logits, target + 1, Head("softmax"), 0.75).any()
    bits = torch.logit(torch.tensor([[[0.8, 0.2], [0.7, 0.3], [0.2, 0.8]]]))
    goal = torch.tensor([[[True, False], [True, False], [True, True]]])
    assert confident(bits, goal, Head("sigmoid"), 0.75).tolist() == [[[True, True], [False, False], [False, True]]]


# ------------------------------------------------------------------------------------------- other grids
def test_grids_that_differ_by_whole_voxels_are_copied():
    one = random_perturbation(affine=AFFINE)
    moved = AFFINE.clone()
    moved[:, 3] = AFFINE @ torch.tensor([1.0, -2, 0, 1], dtype=torch.float64)
    found = one.on(MetaTensor(torch.zeros(4, 4, 5, 8), affine=moved))
    assert torch.equal(found[:, :3, 2:, :6], one.data[:, 1:, :3])
    outside = found.clone()
    outside[:, :3, 2:, :6] = 0
    assert not outside.any()
    assert torch.equal(one.on(torch.zeros(4, 4, 5, 8), moved), found)
    assert torch.equal(one.on(torch.zeros(4, 4, 5, 6), AFFINE), one.data)
    far = AFFINE.clone()
    far[0, 3] += 1000
    assert not one.on(torch.zeros(4, 4, 5, 6), far).any()


def test_a_flipped_and_permuted_grid_finds_the_same_places():
    one = random_perturbation(affine=AFFINE)
    turn = torch.tensor([[0.0, -1, 0, 3], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    found = one.on(torch.zeros(4, 5, 4, 6), AFFINE @ turn)  # voxel (i, j, k) lies at (3 - j, i, k) of the reference
    torch.testing.assert_close(found, one.data.flip(1).transpose(1, 2), rtol=0, atol=1e-6)


def test_between_voxels_it_is_linear():
    one = random_perturbation(affine=AFFINE)
    half = torch.eye(4, dtype=torch.float64)
    half[2, 3] = 0.5
    found = one.on(torch.zeros(4, 4, 5, 5), AFFINE @ half)
    torch.testing.assert_close(found, (one.data[..., 1:] + one.data[..., :-1]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_without_a_common_space_it_is_tiled(dims):
    small = random_perturbation((4, 2, 3, 4)[: dims + 1], affine=AFFINE if dims == 3 else None)
    image = torch.zeros(4, *(5, 3, 3)[:dims])
    found = small.on(image)
    for place in np.ndindex(*image.shape[1:]):
        have = tuple(p % n for p, n in zip(place, small.data.shape[1:]))
        assert torch.equal(found[(slice(None), *place)], small.data[(slice(None), *have)])
    assert torch.equal(small.on(image, AFFINE, placement="tile"), found)
    assert torch.equal(small.on(torch.zeros_like(small.data)), small.data)


def test_an_image_of_two_dimensions_has_a_place_too():
    affine = torch.tensor([[2.0, 0, 6], [0, 2, 0], [0, 0, 1]], dtype=torch.float64)
    one = random_perturbation((4, 6, 5), affine=affine)
    moved = affine.clone()
    moved[0, 2] += 4
    found = one.on(torch.zeros(4, 6, 5), moved)
    assert torch.equal(found[:, :4], one.data[:, 2:])
    assert not found[:, 4:].any()


def test_training_goes_the_way_back_to_the_reference_grid():
    """A subject on a cropped and flipped grid of its own trains the same perturbation."""
    victim, case = make_victim("linear"), make_cases(1, affine=AFFINE)[0]
    turn = torch.eye(4, dtype=torch.float64)
    turn[2, 2], turn[2, 3], turn[1, 3] = -1, SHAPES[3][2] - 1, 1
    other = {
        "image": MetaTensor(case["image"].as_tensor()[:, :, 1:].flip(3), affine=AFFINE @ turn),
        "label": case["label"][:, :, 1:].flip(3),
    }
    whole = MetaTensor(torch.zeros(4, *SHAPES[3], dtype=torch.float64), affine=AFFINE)
    threat = L2(2.0, units="absolute", bounds=None)
    found = fit_universal(victim, [other], threat, reference=whole, loss="ce", steps=3)
    cropped = {k: v[:, :, 1:] for k, v in case.items() if k != "subject"}
    affine = AFFINE.clone()
    affine[:, 3] = AFFINE @ torch.tensor([0.0, 1, 0, 1], dtype=torch.float64)
    cropped["image"] = MetaTensor(cropped["image"].as_tensor(), affine=affine)
    same = fit_universal(victim, [cropped], threat, reference=whole, loss="ce", steps=3)
    torch.testing.assert_close(found.data, same.data, rtol=1e-5, atol=1e-6)
    assert found.data[:, :, 1:].any()
    assert not found.data[:, :, 0].any()
    assert torch.equal(found.affine, AFFINE)


def test_the_attack_puts_it_where_the_image_is():
    one, victim = random_perturbation(affine=AFFINE, threat=replace(FREE, support="all")), make_victim("smooth")
    moved = AFFINE.clone()
    moved[:, 3] = AFFINE @ torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    image, label = make_image(2), make_label("softmax", 2)
    attack = Universal(one.threat, one)
    scale = one.threat.bind(image).scale
    by_argument = attack(victim, image, label, affine=moved)
    for b in range(2):
        expected = one.on(image[b], moved).double() * scale[b]
        torch.testing.assert_close(by_argument.perturbation[b], expected, rtol=1e-6, atol=1e-7)
    by_meta = attack(victim, MetaTensor(image, affine=moved), label)
    assert torch.equal(by_meta.image.as_tensor(), by_argument.image)
    each = attack(victim, image, label, affine=torch.stack([moved, AFFINE]))
    assert torch.equal(each.image[0], by_argument.image[0])
    assert not torch.equal(each.image[1], by_argument.image[1])
    assert not torch.equal(attack(victim, image, label).image, by_argument.image)
    assert torch.equal(
        Universal(one.threat, one, placement="tile")(victim, image, label, affine=moved).image,
        attack(victim, image, label).image,
    )
    with pytest.raises(ConfigError, match=r"affine .* one for each of 2"):
        attack(victim, image, label, affine=torch.eye(4).expand(3, -1, -1))


# ------------------------------------------------------------------------------------------- the attack
def test_another_budget_scales_it():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    one = random_perturbation()
    whole = Universal(FREE, one)(victim, image, label)
    for share in (0.5, 2.0):
        found = Universal(FREE.with_eps(0.3 * share), one)(victim, image, label)
        torch.testing.assert_close(found.perturbation, whole.perturbation * share, rtol=1e-6, atol=1e-9)
    assert whole.cost.forwards == 2
    assert whole.cost.backwards == 0
    clipped = Universal(LInf(0.3), one)(victim, image, label).image
    assert (clipped <= image.amax((2, 3, 4), keepdim=True)).all()


def test_it_is_refused_where_it_means_nothing():
    victim, image, label = make_victim("smooth"), make_image(1), make_label("softmax", 1)
    with pytest.raises(ConfigError, match="monai-adv universal ROOT"):
        attacks.create("universal")
    with pytest.raises(ConfigError, match="norm='linf' and units='std'"):
        attacks.create("universal", eps=1, norm="l2", perturbation=random_perturbation())
    with pytest.raises(ConfigError, match="norm='linf' and units='std'"):
        attacks.create("universal", units="range", perturbation=random_perturbation())
    with pytest.raises(ConfigError, match="placement 'middle'"):
        attacks.create("universal", placement="middle", perturbation=random_perturbation())
    with pytest.raises(ConfigError, match="channels and dimensions"):
        Universal(FREE, random_perturbation((3, 4, 5, 6)))(victim, image, label)
    with pytest.raises(ConfigError, match="finite budget"):
        Universal(LInf(float("inf")), random_perturbation())(victim, image, label)
    far = AFFINE.clone()
    far[2, 3] += 1000
    with pytest.raises(ConfigError, match=r"sample \[0\].*do not overlap.*placement='tile'"):
        Universal(FREE, random_perturbation(affine=AFFINE))(victim, image, label, affine=far)
    one_channel = fit_universal(victim, make_cases(1), LInf(0.3, channels=(0,)), steps=1)
    with pytest.raises(ConfigError, match="trained on other modalities"):
        Universal(LInf(0.3, channels=(1,)), one_channel)(victim, image, label)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": torch.zeros(4)}, r"\(C, \*spatial\)"),
        ({"data": torch.zeros(4, 2, 2, dtype=torch.long)}, "floating point"),
        ({"data": torch.full((4, 2, 2), float("nan"))}, "NaN"),
        ({"threat": Parametric(1.0)}, "linf or l2"),
        ({"threat": LInf(float("inf"))}, "finite"),
        ({"threat": LInf(0.0)}, "> 0"),
        ({"mode": "some"}, "mode 'some'"),
    ],
)
def test_a_perturbation_is_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        UniversalPerturbation(**{"data": torch.zeros(4, 2, 2), "threat": FREE, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "universal"}, "mode 'universal'"),
        ({"target": "background"}, "takes no target"),
        ({"mode": "static", "target": "background"}, "mode='dynamic'"),
        ({"mode": "dynamic"}, "needs a rule"),
        ({"mode": "dynamic", "target": torch.zeros(1, 4, 5, 6)}, "mode='static'"),
        ({"confidence": 0.3}, "confidence"),
        ({"steps": 0}, "steps"),
        ({"batch": 1.5}, "batch"),
        ({"step_size": -1}, "step_size"),
        ({"placement": "here"}, "placement"),
    ],
)
def test_options_of_the_training_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        fit_universal(make_victim("linear"), make_cases(1), FREE, **options)


# ------------------------------------------------------------------------------------------- on disk
@pytest.mark.parametrize("shape", [(4, 4, 5, 6), (1, 4, 5, 6), (4, 6, 5), (4, 6, 5, 1)])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_file_holds_all_of_it(tmp_path, shape, ending):
    one = random_perturbation(
        shape, AFFINE, threat=L2(0.3, "range", (0,), None, "all"), mode="dynamic", target={"hide": "ET"},
        subjects=("a", "b"), victim="net", seed=5, details={"steps": 3, "trace": [{"step": 0, "loss": 1.5}]},
    )  # fmt: skip
    path = one.save(tmp_path / "deep" / f"all{ending}")
    back = UniversalPerturbation.load(path)
    assert torch.equal(back.data, one.data)
    assert back.data.dtype == torch.float32
    assert torch.equal(back.affine, AFFINE)
    for name in ("threat", "mode", "target", "subjects", "victim", "seed", "details"):
        assert getattr(back, name) == getattr(one, name), name
    assert back.digest() == one.digest()
    assert random_perturbation(shape, AFFINE, seed=4).digest() != one.digest()
    image = nib.load(path)
    spatial = shape[1:] if len(shape) == 4 else (*shape[1:], 1)
    assert image.shape == (*spatial, shape[0])
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, AFFINE.numpy(), rtol=1e-6)
    assert sorted(p.name for p in path.parent.iterdir()) == ["all.json", f"all{ending}"]
    first = path.read_bytes()
    assert one.save(path).read_bytes() == first
    assert ending == ".nii" or first[4:8] == bytes(4)  # no time in the stream


def test_without_a_place_it_comes_back_without(tmp_path):
    path = random_perturbation(threat=LInf(0.3, bounds=(-1.0, 2.0))).save(tmp_path / "a.nii.gz")
    back = UniversalPerturbation.load(path)
    assert back.affine is None
    assert back.threat == LInf(0.3, bounds=(-1.0, 2.0))


def test_the_attack_reads_a_file_when_it_is_needed(tmp_path):
    one, victim, image, label = random_perturbation(), make_victim("smooth"), make_image(1), make_label("softmax", 1)
    path = one.save(tmp_path / "a.nii.gz")
    attack = attacks.create("universal", eps=0.3, bounds=None, perturbation=str(path))
    assert attack.parameters()["perturbation"] == str(path)
    assert torch.equal(attack(victim, image, label).image, Universal(FREE, one)(victim, image, label).image)
    missing = attacks.create("universal", perturbation=str(tmp_path / "b.nii.gz"))
    with pytest.raises(DataError, match=r"b\.nii\.gz: no such file"):
        missing(victim, image, label)
    assert one.digest() in Universal(FREE, one).parameters()["perturbation"]


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    path = random_perturbation(affine=AFFINE).save(tmp_path / "a.nii.gz")
    beside = tmp_path / "a.json"
    text = beside.read_text()
    beside.write_text(text.replace("20.0", "21.0"))
    with pytest.raises(DataError, match=r"affine is not that of a\.json"):
        UniversalPerturbation.load(path)
    beside.write_text("{}")
    with pytest.raises(DataError, match=r"a\.json: is not the description"):
        UniversalPerturbation.load(path)
    beside.unlink()
    with pytest.raises(DataError, match=r"a\.json: cannot be read"):
        UniversalPerturbation.load(path)
    with pytest.raises(DataError, match=r"end in \.nii"):
        random_perturbation().save(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:-20])
    beside.write_text(text)
    with pytest.raises(DataError, match="truncated"):
        UniversalPerturbation.load(path)


# ------------------------------------------------------------------------------------------- a cohort
@pytest.mark.parametrize("threat", [LInf(1.0), L2(16.0)])
def test_trained_on_some_it_harms_others_more_than_noise(threat):
    victim, cases = readable_cohort(9)
    found = fit_universal(victim, cases[:5], threat, steps=15, batch=2)
    image = torch.stack([c["image"] for c in cases[5:]])
    label = torch.stack([c["label"] for c in cases[5:]])
    attacked = Universal(threat, found)(victim, image, label)
    noise = attacks.Noise(threat)(victim, image, label)
    assert attacked.clean_score.min() > 0.7
    assert (attacked.score < noise.score - 0.15).all()
    assert (threat.bind(image).size(attacked.image) <= threat.eps * (1 + 1e-9)).all()


class Folder:
    """Cases that are read whenever they are asked for; some are broken."""

    def __init__(self, cases, broken=()):
        self.cases, self.broken, self.asked = cases, broken, []

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, index):
        self.asked.append(index)
        if index in self.broken:
            raise DataError(f"file {index} is empty")
        return self.cases[index]


def test_a_bad_subject_costs_only_itself():
    victim, cases = make_victim("smooth"), make_cases(4)
    cases[2]["image"] = cases[2]["image"].clone()
    cases[2]["image"][0, 1, 1, 1] = float("nan")
    problems = []
    folder = Folder(cases, broken=(0,))
    found = fit_universal(
        victim, folder, FREE, steps=4, batch=2, on_problem=lambda index, error: problems.append((index, type(error)))
    )
    assert problems == [(0, DataError), (2, NonFiniteError)]
    assert found.subjects == ("s1", "s3")
    assert {name for entry in found.details["trace"] for name in entry["subjects"]} == {"s1", "s3"}
    assert folder.asked.count(2) <= 1
    with pytest.raises(DataError, match="file 0 is empty"):
        fit_universal(victim, Folder(cases, broken=(0,)), FREE, steps=1)
    with pytest.raises(DataError, match="no subject is left"):
        fit_universal(victim, Folder(cases[:2], (0, 1)), FREE, on_problem=lambda *_: None)


def test_progress_is_told_and_the_network_is_left_as_it_was():
    victim, cases = make_victim("windows"), make_cases(2)
    before = {k: v.clone() for k, v in victim.network.state_dict().items()}
    seen = []
    found = fit_universal(
        victim, cases, FREE, steps=3, on_step=lambda step, so_far: seen.append((step, so_far.data, so_far.subjects))
    )
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], found.data)
    assert not torch.equal(seen[0][1], found.data)
    assert not found.data.requires_grad
    assert victim.network.training
    assert all(p.grad is None and p.requires_grad for p in victim.network.parameters())
    assert all(torch.equal(before[k], v) for k, v in victim.network.state_dict().items())
