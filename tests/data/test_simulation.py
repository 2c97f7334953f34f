"""A simulated subject: bits, geometry, and what each tissue must look like on each contrast."""

from __future__ import annotations

import functools
import importlib.util

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_adv.data.simulation import (
    Geometry,
    SimulatedSubject,
    simulate_subject,
    subject,
)
from monai_adv.data.simulation.anatomy import Anatomy, Axes, Tissues
from monai_adv.data.simulation.fields import Draws, blur, derive_seed
from monai_adv.data.simulation.template import load_growth_template, load_template
from monai_adv.data.simulation.tissue import RELAXIVITY, SEQUENCES, TISSUES, Relaxation, Sequence, shortened_t1
from monai_adv.data.simulation.tumour import LOW_GRADE, LOW_GRADE_NODULES, Tumour, _draw_habit
from monai_adv.errors import ConfigError, DataError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nilearn") is None, reason="needs nilearn's template files")

COARSE = Geometry.from_spacing(4.0)
SEEDS = range(1, 7)
T1, T1C, T2, FLAIR = range(4)


@pytest.fixture(scope="module")
def subjects() -> dict[int, SimulatedSubject]:
    return {seed: simulate_subject(seed, COARSE) for seed in SEEDS}


@functools.cache
def healthy_tissue(seed: int) -> Tissues:
    """The subject's tissue maps without the tumour's own parts."""
    axes = Axes(*(torch.tensor(a, dtype=torch.float32) for a in COARSE.axes))
    anatomy = Anatomy(seed)
    return anatomy(load_template(COARSE.spacing), axes, Tumour(seed, anatomy, load_growth_template()).mass)


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("spacing", [1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
def test_shape_holds_the_field_of_view(spacing: float) -> None:
    grid = Geometry.from_spacing(spacing)
    for count, extent in zip(grid.shape, (160, 192, 168)):
        assert count % 8 == 0
        assert extent <= count * spacing < extent + 8 * spacing
    centre = grid.affine @ [*((np.array(grid.shape) - 1) / 2), 1]
    np.testing.assert_allclose(centre[:3], grid.centre, atol=1e-12)


def test_known_shapes_and_storage_order() -> None:
    assert Geometry.from_spacing(2.0).shape == (80, 96, 88)
    assert Geometry.from_spacing(2.5).shape == (64, 80, 72)
    assert (Geometry.brats().shape, Geometry.brats().spacing) == ((240, 240, 155), 1.0)
    assert nib.aff2axcodes(Geometry.from_spacing(2.5).affine) == ("L", "P", "S")


@pytest.mark.parametrize("spacing", [0.9, 4.1, 0.0, -1.0, float("nan")])
def test_unusable_spacing(spacing: float) -> None:
    with pytest.raises(ConfigError, match="spacing"):
        Geometry.from_spacing(spacing)


def test_unusable_shape_and_grid_outside_the_head() -> None:
    with pytest.raises(ConfigError, match="shape"):
        Geometry(shape=(4, 40, 40), spacing=2.0)
    with pytest.raises(DataError, match="head"):
        simulate_subject(0, Geometry(shape=(16, 16, 16), spacing=2.0, centre=(500.0, 0.0, 0.0)))
    with pytest.raises(DataError, match="lies outside"):
        simulate_subject(0, Geometry(shape=(8, 8, 8), spacing=1.0, centre=(0.0, -17.0, 80.0)))


# ---------------------------------------------------------------- bits


def test_same_seed_same_bits_whatever_the_threads_and_the_global_seed(subjects: dict[int, SimulatedSubject]) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        again = simulate_subject(3, COARSE)
        assert torch.get_num_threads() == 2, "the caller's number of threads must come back"
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not be used"
    np.testing.assert_array_equal(again.image, subjects[3].image)
    np.testing.assert_array_equal(again.label, subjects[3].label)
    assert again.info == subjects[3].info


def test_one_thread_while_a_subject_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(subject, "_simulate", lambda *_: seen.append(torch.get_num_threads()))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        simulate_subject(0, COARSE)
    finally:
        torch.set_num_threads(threads)
    assert seen == [1]


def test_other_seeds_are_other_subjects(subjects: dict[int, SimulatedSubject]) -> None:
    labels = {s.label.tobytes() for s in subjects.values()}
    centres = {tuple(s.info["centre_mni_mm"]) for s in subjects.values()}  # type: ignore[call-overload]
    assert len(labels) == len(centres) == len(SEEDS)
    with pytest.raises(ConfigError, match="seed"):
        simulate_subject(-1, COARSE)


def test_a_seed_is_the_same_subject_at_every_spacing(subjects: dict[int, SimulatedSubject]) -> None:
    fine, coarse = simulate_subject(3, Geometry.from_spacing(3.0)).info, subjects[3].info
    same = ("grade", "radius_mm", "centre_mni_mm", "enhancing_share", "sequences", "gadolinium_mM")
    assert {k: fine[k] for k in same} == {k: coarse[k] for k in same}
    for name, tolerance in (("whole_tumour", 0.05), ("tumour_core", 0.05), ("enhancing", 0.15), ("brain", 0.02)):
        volumes = [info["volumes_ml"][name] for info in (fine, coarse)]  # type: ignore[index]
        assert volumes[0] == pytest.approx(volumes[1], rel=tolerance), name


def test_streams_of_different_purposes_are_independent() -> None:
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert Draws(1, "a").uniform(0, 1) != Draws(1, "b").uniform(0, 1)
    assert Draws(1, "a").uniform(0, 1) == Draws(1, "a").uniform(0, 1)


# ---------------------------------------------------------------- building blocks


def test_smooth_fields_are_smooth_and_of_the_stated_size() -> None:
    axes = [torch.arange(-60.0, 61.0, 2.0)] * 3
    values = Draws(0, "field").field(20.0, channels=4)(axes)
    assert values.shape == (4, 61, 61, 61)
    assert 0.7 < float(values.std()) < 0.95
    assert float(values.diff(dim=1).std()) < 0.2 * float(values.std())
    elsewhere = Draws(0, "field").field(20.0, channels=4)([a[10:20] for a in axes])
    torch.testing.assert_close(elsewhere, values[:, 10:20, 10:20, 10:20])  # a function of the world, not of the grid


def test_blur_keeps_the_mean_and_adds_variances() -> None:
    volume = torch.zeros(1, 41, 41, 41, dtype=torch.float64)
    volume[0, 20, 20, 20] = 1
    blurred = blur(volume, (2.0, 1.0, 0.1))[0]
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-6)
    x = torch.arange(41.0, dtype=torch.float64) - 20
    assert float((blurred.sum((1, 2)) * x**2).sum()) == pytest.approx(4, rel=0.03)
    assert float((blurred.sum((0, 2)) * x**2).sum()) == pytest.approx(1, rel=0.03)
    assert float((blurred.sum((0, 1)) * x**2).sum()) == 0  # below 0.2 voxels: untouched


def test_signal_equations() -> None:
    water = [torch.tensor(v, dtype=torch.float64) for v in (1000.0, 100.0, 0.8)]
    assert float(Sequence(tr=1e9, te=0).signal(*water)) == pytest.approx(0.8)
    assert float(Sequence(tr=1000, te=100).signal(*water)) == pytest.approx(0.8 * (1 - np.exp(-1)) * np.exp(-1))
    null = 1000 * np.log(2 / (1 + np.exp(-3000 / 1000)))  # inversion time that suppresses this tissue
    assert float(Sequence(tr=3000, te=0, ti=null).signal(*water)) == pytest.approx(0, abs=1e-12)
    assert float(1 / shortened_t1(1000.0, 0.2)) == pytest.approx(1 / 1000 + 0.2 * RELAXIVITY, rel=1e-6)


def test_mean_protocol_orders_the_tissues_as_radiology_does() -> None:
    def signal(sequence: str, tissue: str) -> float:
        return Relaxation(*TISSUES[tissue][:3]).signal(SEQUENCES[sequence])

    for sequence, order in (
        ("t1", ("csf", "necrosis", "non_enhancing", "oedema", "wm")),
        ("t1", ("csf", "gm", "deep_gm", "wm")),
        ("t2", ("wm", "gm", "oedema", "necrosis", "csf")),
        ("flair", ("csf", "wm", "gm", "wmh", "oedema")),
    ):
        values = [signal(sequence, tissue) for tissue in order]
        assert values == sorted(values), (sequence, dict(zip(order, values)))


# ---------------------------------------------------------------- anatomy and tumour


def test_labels_images_and_volumes_are_sane(subjects: dict[int, SimulatedSubject]) -> None:
    voxel = COARSE.spacing**3 / 1000
    for seed, s in subjects.items():
        assert (s.image.dtype, s.image.shape) == (np.float32, (4, *COARSE.shape))
        assert (s.label.dtype, s.label.shape) == (np.uint8, COARSE.shape)
        assert {1, 2} <= set(np.unique(s.label)) - {0} <= {1, 2, 4}, seed
        brain = (s.image > 0).all(0)
        assert brain[s.label > 0].all(), "a tumour lies inside the brain"
        assert np.array_equal(brain, (s.image > 0).any(0)), "the background is zero in every contrast"
        assert np.isfinite(s.image).all()
        assert s.image.max() < 2**15
        volumes = s.info["volumes_ml"]
        assert isinstance(volumes, dict)
        assert volumes["whole_tumour"] == pytest.approx((s.label > 0).sum() * voxel, abs=0.01)
        assert volumes["tumour_core"] == pytest.approx(np.isin(s.label, (1, 4)).sum() * voxel, abs=0.01)
        assert volumes["enhancing"] == pytest.approx((s.label == 4).sum() * voxel, abs=0.01)
        assert 5 < volumes["whole_tumour"] < 350
        assert volumes["brain"] == pytest.approx(brain.sum() * voxel, abs=0.01)
        assert 1100 < volumes["brain"] < 2300
        assert (volumes["enhancing"] > 0.5) == (s.info["enhancing_share"] > 0)  # type: ignore[operator]
        assert s.info["grade"] == "LGG" or volumes["enhancing"] > 0


def test_brain_lies_inside_the_grid() -> None:
    """Checked on a grid that is 16 mm larger on every side: what sticks out of the usual one is the edge of a brain."""
    usual = COARSE.axes
    wide = Geometry(shape=tuple(n + 8 for n in COARSE.shape), spacing=4.0)  # type: ignore[arg-type]
    for seed in (1, 2):
        image = simulate_subject(seed, wide).image[0]
        for axis in range(3):
            low, high = usual[axis].min() - 2, usual[axis].max() + 2
            out = (wide.axes[axis] < low) | (wide.axes[axis] > high)
            assert (image > 0).compress(out, axis=axis).sum() < 0.001 * (image > 0).sum()


def test_a_quarter_has_no_enhancing_part() -> None:
    without = LOW_GRADE * (1 - LOW_GRADE_NODULES)
    assert 0.2 <= without <= 0.3
    shares = [_draw_habit(Draws(seed, "tumour")).enhancing for seed in range(400)]
    count = sum(share == 0 for share in shares)
    assert abs(count - 400 * without) < 3 * np.sqrt(400 * without * (1 - without))
    assert 10 < sum(0 < share < 0.2 for share in shares) < 40  # low grade with nodules


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_the_drawn_share_of_the_viable_core_enhances(seed: int) -> None:
    anatomy, growth = Anatomy(seed), load_growth_template()
    tumour = Tumour(seed, anatomy, growth)
    axes = Axes(*(c + torch.arange(-50.0, 51.0, 2.0) for c in tumour.centre))
    parts = tumour(axes, anatomy(growth, axes, tumour.mass).brain, spacing=2.0)
    share = float(parts.enhancing.sum() / (parts.enhancing + parts.non_enhancing).sum())
    assert share == pytest.approx(tumour.info["enhancing_share"], abs=0.12)
    torch.testing.assert_close(parts.enhancing + parts.non_enhancing + parts.necrosis, parts.core)


def test_oedema_prefers_white_matter(subjects: dict[int, SimulatedSubject]) -> None:
    ratios = []
    for seed in SEEDS:
        fractions = healthy_tissue(seed).fractions.numpy()
        brain, oedema = subjects[seed].image[0] > 0, subjects[seed].label == 2
        ratios.append(fractions[2][oedema].mean() / fractions[2][brain].mean())
        assert fractions[0][oedema].mean() < 0.5 * fractions[0][brain].mean()
    assert np.median(ratios) > 1.15


def test_mass_effect_pushes_outward() -> None:
    anatomy, growth = Anatomy(1), load_growth_template()
    tumour = Tumour(1, anatomy, growth)
    axes = Axes(*(c + torch.arange(-30.0, 31.0, 3.0) for c in tumour.centre))
    before, after = (anatomy(growth, axes, mass).midline for mass in (None, tumour.mass))
    middle = 10
    assert torch.equal(before[middle, middle, middle], after[middle, middle, middle])
    offset = (before - before[middle, middle, middle])[[2, -3], middle, middle].abs()
    pushed = (after - after[middle, middle, middle])[[2, -3], middle, middle].abs()
    assert (pushed < offset).all(), "what is seen beside the tumour comes from nearer to its centre"


# ---------------------------------------------------------------- what the contrasts show


def test_csf_is_dark_on_t1_and_flair_and_bright_on_t2(subjects: dict[int, SimulatedSubject]) -> None:
    for seed in SEEDS:
        tissues, s = healthy_tissue(seed), subjects[seed]
        pure = tissues.fractions.numpy() > 0.9
        healthy = (s.label == 0) & (tissues.depth.numpy() > 6) & (s.image[0] > 0)
        fluid, white = pure[0] & healthy & (tissues.ventricles.numpy() > 0.5), pure[2] & healthy
        if fluid.sum() < 5:
            continue
        csf, wm = np.median(s.image[:, fluid], axis=1), np.median(s.image[:, white], axis=1)
        assert csf[T1] < 0.6 * wm[T1], seed
        assert csf[T2] > 1.5 * wm[T2], seed
        assert csf[FLAIR] < 0.75 * wm[FLAIR], seed


def test_grey_and_white_matter_swap_between_t1_and_t2(subjects: dict[int, SimulatedSubject]) -> None:
    for seed in SEEDS:
        tissues, s = healthy_tissue(seed), subjects[seed]
        healthy = (s.label == 0) & (tissues.depth.numpy() > 6) & (s.image[0] > 0)
        grey, white = (np.median(s.image[:, (tissues.fractions[i].numpy() > 0.85) & healthy], axis=1) for i in (1, 2))
        assert grey[T1] < white[T1], seed
        assert grey[T2] > white[T2], seed
        assert grey[FLAIR] > white[FLAIR], seed


def test_enhancing_rim_shines_after_contrast_only_and_oedema_on_flair(subjects: dict[int, SimulatedSubject]) -> None:
    seen = 0
    for seed in SEEDS:
        tissues, s = healthy_tissue(seed), subjects[seed]
        white = (tissues.fractions[2].numpy() > 0.9) & (s.label == 0) & (tissues.depth.numpy() > 6)
        wm = np.median(s.image[:, white], axis=1)
        swollen = (s.label == 2) & (tissues.fractions[2].numpy() > 0.8)
        oedema = np.median(s.image[:, swollen], axis=1)
        assert oedema[FLAIR] > 1.2 * wm[FLAIR], seed
        assert oedema[T2] > 1.2 * wm[T2], seed
        assert oedema[T1] < wm[T1], seed
        if (s.label == 4).sum() < 30:
            continue
        seen += 1
        enhancing = np.median(s.image[:, s.label == 4], axis=1) / wm
        assert enhancing[T1] < 1, seed
        assert enhancing[T1C] > enhancing[T1] + 0.1, seed
    assert seen >= 3
    strong = max(SEEDS, key=lambda seed: subjects[seed].info["gadolinium_mM"])  # type: ignore[arg-type,return-value]
    s = subjects[strong]
    white = (healthy_tissue(strong).fractions[2].numpy() > 0.9) & (s.label == 0)
    assert np.percentile(s.image[T1C][s.label == 4], 75) > np.median(s.image[T1C][white])
