"""Motion, ghosting, truncation and Rician noise against closed forms, NumPy's Fourier transform and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_contract import make_attack
from oracles import SHAPES, make_image, make_label, make_victim
from scipy import stats

from monai_adv.errors import ConfigError
from monai_adv.transforms import physics
from monai_adv.transforms.physics import Affine, Ghosting, Gibbs, Motion, Rician
from monai_adv.transforms.physics.geometry import resample
from monai_adv.transforms.physics.kspace import segment_motion, segments_of_lines

OPTIONS: dict[type[physics.Effect], dict] = {
    Motion: {"segments": 3, "axis": -1},
    Ghosting: {"period": 3, "axis": -1},
    Gibbs: {"taper": 0.7},
    Rician: {},
}
effective = pytest.mark.parametrize("kind", list(OPTIONS), ids=lambda kind: kind.name)


def random_image(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def everywhere(effect: physics.Effect, image: torch.Tensor, spacing=None, **parameters) -> torch.Tensor:
    spacing = (1.0,) * (image.dim() - 2) if spacing is None else spacing
    return effect.apply(image, parameters, spacing, torch.ones_like(image, dtype=torch.bool))


def head(*shape: int) -> torch.Tensor:
    """A random object well inside its field of view, not in its middle."""
    image = torch.zeros(1, 2, *shape, dtype=torch.float64)
    inner = tuple(slice(n // 4 + 1, n - n // 3) for n in shape)
    image[(..., *inner)] = random_image(1, 2, *(s.stop - s.start for s in inner))
    return image


# ------------------------------------------------------------------------------------------------- motion
def test_segments_are_consecutive_from_the_lowest_frequency_up():
    order = torch.fft.fftshift(segments_of_lines(12, 3))
    assert order.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for lines in (7, 12, 13, 64):
        for segments in (2, 3, 6, 7, 99):
            order = torch.fft.fftshift(segments_of_lines(lines, segments))
            assert torch.unique(order).tolist() == list(range(min(segments, lines)))
            assert (order.diff() >= 0).all()
    reference = np.flatnonzero(torch.fft.fftshift(segments_of_lines(63, 7)) == segments_of_lines(63, 7)[0])
    assert reference.tolist() == list(range(31 - 4, 31 + 5))  # an odd number: around the centre


@pytest.mark.parametrize(("shape", "spacing"), [((8, 5), (2.0, 0.5)), ((4, 6, 5), (1.5, 1.0, 3.0)), ((9,), (2.0,))])
def test_all_segments_moved_by_whole_voxels_are_a_circular_shift(shape, spacing):
    image, dims = random_image(2, 3, *shape), len(shape)
    voxels = torch.randint(-3, 4, (2, 3, dims), generator=torch.Generator().manual_seed(1))
    for axis in range(dims):
        segment = segments_of_lines(shape[axis], 3)
        shift = (voxels * torch.tensor(spacing))[:, :, None].expand(-1, -1, 3, -1).double()
        moved = image + segment_motion(image, shift, None, segment, spacing, axis)
        for b in range(2):
            for c in range(3):
                expected = image[b, c].roll(voxels[b, c].tolist(), tuple(range(dims)))
                torch.testing.assert_close(moved[b, c], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_motion_is_the_reconstruction_of_moved_heads(axis):
    """Every segment of k-space from NumPy's transform of a shifted head, put together by hand."""
    image, spacing, shape = random_image(1, 2, 6, 7, 8), (2.0, 1.0, 0.5), (6, 7, 8)
    voxels = np.random.default_rng(0).integers(-2, 3, (2, 4, 3))
    effect = Motion(segments=4, axis=axis, rotate=False)
    found = everywhere(effect, image, spacing, translation=torch.tensor(voxels * np.array(spacing))[None])
    lines = shape[axis]
    for c in range(2):
        clean = np.fft.fftshift(np.fft.fftn(image[0, c].numpy()))
        seen = clean.copy()
        for s in range(4):
            here = [slice(None)] * 3
            here[axis] = np.flatnonzero(np.arange(lines) * 4 // lines == s)
            if lines // 2 in here[axis]:
                continue  # the segment of the centre
            moved = np.roll(image[0, c].numpy(), voxels[c, s], (0, 1, 2))
            seen[tuple(here)] = np.fft.fftshift(np.fft.fftn(moved))[tuple(here)]
        expected = np.fft.ifftn(np.fft.ifftshift(seen)).real
        np.testing.assert_allclose(found[0, c].numpy(), expected, rtol=0, atol=1e-13)
    assert (found - image).abs().max() > 0.1


@pytest.mark.parametrize(("shape", "spacing"), [((20, 24), (1.0, 0.75)), ((16, 20, 24), (2.0, 1.5, 1.0))])
def test_all_segments_in_one_pose_are_a_rigid_motion(shape, spacing):
    """Rotation first, then translation, as the affine effect has it."""
    image, dims = head(*shape), len(shape)
    angles = 30 * random_image(1, 2, 1 if dims == 2 else 3, seed=3) - 10
    voxels = torch.tensor([1.0, -2, 1])[:dims].double()
    shift = (voxels * torch.tensor(spacing)).expand(1, 2, dims)
    expected = torch.empty_like(image)
    for c in range(2):
        zeros = torch.zeros(1, dims, dtype=torch.float64)
        turn = {"rotation": angles[:, c], "translation": zeros, "log_scale": zeros}
        turned = resample(image[:, c : c + 1], Affine().displacement(turn, shape, spacing), spacing)
        expected[:, c] = turned[:, 0].roll(voxels.long().tolist(), tuple(range(1, dims + 1)))
    for axis in range(dims):
        poses = [p[:, :, None].expand(-1, -1, 4, -1) for p in (shift, angles)]
        segment = segments_of_lines(shape[axis], 4)
        found = image + segment_motion(image, poses[0], poses[1], segment, spacing, axis)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_quarter_turn_is_exact():
    image = random_image(1, 1, 6, 6, 6)
    for axis, plane in ((0, (1, 2)), (1, (2, 0)), (2, (0, 1))):
        angles = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
        angles[..., axis] = 90
        change = segment_motion(image, torch.zeros_like(angles), angles, segments_of_lines(6, 2), (1.0,) * 3, 0)
        expected = image.rot90(1, [2 + p for p in plane])
        torch.testing.assert_close(image + change, expected, rtol=0, atol=1e-12)


def test_the_segment_at_the_centre_does_not_move():
    image, effect = random_image(2, 2, 9, 10), Motion(segments=3)
    generator = torch.Generator().manual_seed(0)
    parameters = effect.random(image, (1.0, 1.0), 3.0, generator)
    control = effect.control(image, (1.0, 1.0), 3.0, generator)
    for drawn in (*parameters.values(), *control.values()):
        assert (drawn[:, :, [0, 2]] != 0).all()
        assert not drawn[:, :, 1].any()
    found = everywhere(effect, image, **parameters)
    assert not torch.equal(found, image)
    torch.testing.assert_close(found.sum((2, 3)), image.sum((2, 3)))  # the very centre is the sum
    low = torch.fft.fft2(found - image)[..., [-1, 0, 1]]
    assert low.abs().max() < 1e-12
    for pose in parameters.values():
        pose[:, :, 1] = 7.0
    assert torch.equal(everywhere(effect, image, **parameters), found)
    only = {k: torch.zeros_like(v) for k, v in parameters.items()}
    only["rotation"][:, :, 1] = only["translation"][:, :, 1] = 7.0
    assert torch.equal(everywhere(effect, image, **only), image)


def test_what_needs_no_interpolation_is_left_out_without_a_difference(monkeypatch):
    """A rotation of 0 changes nothing, whether it is computed (for its gradient) or not."""
    image, effect = head(16, 18, 14), Motion(segments=5)
    parameters = effect.random(image, (1.0,) * 3, 3.0, torch.Generator().manual_seed(0))
    parameters["rotation"][:, :, [0, 1]] = 0
    parameters["rotation"][:, 0, 3] = 0
    wanted = {k: v.clone().requires_grad_(True) for k, v in parameters.items()}
    found = everywhere(effect, image, **wanted)
    calls = []
    kernel = physics.kspace.grid_sample
    monkeypatch.setattr(physics.kspace, "grid_sample", lambda *a, **k: calls.append(a) or kernel(*a, **k))
    torch.testing.assert_close(found.detach(), everywhere(effect, image, **parameters), rtol=0, atol=1e-14)
    assert len(calls) == 2
    assert calls[0][0][0].numel() < 0.6 * image[0, 0].numel()  # and the background is not interpolated
    parameters["rotation"].zero_()
    without = everywhere(Motion(segments=5, rotate=False), image, translation=parameters["translation"])
    assert torch.equal(everywhere(effect, image, **parameters), without)
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------ ghosting
def chosen_lines(size: int, period: int) -> np.ndarray:
    return np.fft.fftfreq(size, 1 / size).round().astype(int) % period == 1


@pytest.mark.parametrize(("shape", "axis"), [((6, 8), 1), ((4, 6, 8), 1), ((4, 6, 8), -3)])
def test_a_ghost_of_period_two_lies_half_a_field_of_view_away(shape, axis):
    image = random_image(2, 3, *shape)
    ghost = torch.linspace(-0.3, 0.3, 6, dtype=torch.float64).view(2, 3, 1)
    found = everywhere(Ghosting(period=2, axis=axis), image, ghost=ghost)
    half = image.roll(shape[axis] // 2, axis % len(shape) + 2)
    expected = image + ghost.view(2, 3, *[1] * len(shape)) / 2 * (image - half)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("period", [3, 4, 6])
def test_ghosts_of_other_periods_lie_at_its_multiples_with_their_phase(period):
    image, a = random_image(1, 1, 5, 12), 0.2 - 0.1j
    found = everywhere(Ghosting(period), image, ghost=torch.tensor([[[a.real, a.imag]]], dtype=torch.float64))
    expected = image.clone()
    for m in range(period):
        weight = (a * np.exp(-2j * np.pi * m / period)).real / period
        expected += weight * image.roll(-m * 12 // period, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("size", "period"), [(9, 2), (8, 2), (7, 3), (10, 4)])
def test_ghosting_weights_lines_of_numpys_transform_but_not_the_centre(size, period):
    image = random_image(1, 1, 4, size)
    a = [0.25] if period == 2 else [0.1, 0.2]
    effect = Ghosting(period)
    assert effect.shapes(image, (1.0, 1.0)) == {"ghost": (1, len(a))}
    found = everywhere(effect, image, ghost=torch.tensor([[a]], dtype=torch.float64))[0, 0].numpy()
    chosen = chosen_lines(size, period)
    assert not chosen[0]
    lines = np.fft.fft(image[0, 0].numpy(), axis=1)
    expected = np.fft.ifft(lines * (1 + chosen * (a[0] + 1j * (a[1] if len(a) == 2 else 0))), axis=1).real
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    if period == 2:  # Parseval
        change = ((found - image[0, 0].numpy()) ** 2).sum()
        np.testing.assert_allclose(change, a[0] ** 2 * (np.abs(lines[:, chosen]) ** 2).sum() / size)


def test_ghosts_are_drawn_and_kept_in_a_disc():
    image, effect = torch.zeros(4000, 1, 4, 6, dtype=torch.float64), Ghosting(period=4)
    ghost = effect.random(image, (1.0, 1.0), 0.3, torch.Generator().manual_seed(0))["ghost"][:, 0]
    radius = ghost.norm(dim=1) / 0.3
    assert stats.kstest((radius**2).numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(torch.atan2(*ghost.T).numpy(), "uniform", (-np.pi, 2 * np.pi)).pvalue > 1e-3
    control = effect.control(image, (1.0, 1.0), 0.3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(effect.size(control), torch.full((4000,), 0.3, dtype=torch.float64))
    far = effect.project({"ghost": torch.tensor([[[3.0, 4.0], [0.1, 0.2]]], dtype=torch.float64)}, 0.3)["ghost"]
    torch.testing.assert_close(far, torch.tensor([[[0.18, 0.24], [0.1, 0.2]]], dtype=torch.float64))
    step = effect.step({"ghost": torch.zeros(1, 1, 2)}, {"ghost": torch.tensor([[[3e-30, 4e-30]]])}, 0.5, 0.3)
    torch.testing.assert_close(step["ghost"], torch.tensor([[[0.09, 0.12]]]))


# --------------------------------------------------------------------------------------------------- Gibbs
@pytest.mark.parametrize("shape", [(16, 9), (8, 7, 10)])
def test_gibbs_with_a_sharp_taper_is_numpys_truncation(shape):
    image = random_image(1, 2, *shape)
    cut = torch.tensor([[[0.3, 0.55, 0.2], [0.0, 0.7, 0.45]]], dtype=torch.float64)[..., : len(shape)]
    found = everywhere(Gibbs(taper=1e-9), image, cut=cut)
    for c in range(2):
        spectrum = np.fft.fftn(image[0, c].numpy())
        for axis, size in enumerate(shape):
            kept = np.abs(np.fft.fftfreq(size)) / 0.5 <= 1 - float(cut[0, c, axis])
            spectrum = np.moveaxis(np.moveaxis(spectrum, axis, -1) * kept, -1, axis)
        np.testing.assert_allclose(found[0, c].numpy(), np.fft.ifftn(spectrum).real, rtol=0, atol=1e-13)
        assert (found[0, c] - image[0, c]).abs().max() > 0.1


def test_gibbs_rings_at_an_edge_and_its_taper_is_linear():
    """The overshoot of a truncated step is 9 % of its height; over the taper a frequency fades linearly."""
    step = torch.zeros(1, 1, 1, 512, dtype=torch.float64)
    step[..., 128:384] = 1
    found = everywhere(Gibbs(taper=1e-9), step, cut=torch.tensor([[[0.9]]], dtype=torch.float64))
    assert 0.085 < float(found.max()) - 1 < 0.1
    place = torch.arange(100, dtype=torch.float64)
    for cycles, left in ((30, 1.0), (32, 0.8), (35, 0.5), (38, 0.2), (42, 0.0)):
        wave = torch.cos(2 * np.pi * cycles / 100 * place).view(1, 1, 100)
        found = everywhere(Gibbs(taper=0.2), wave, cut=torch.tensor([[[0.4]]], dtype=torch.float64))
        torch.testing.assert_close(found, left * wave, rtol=0, atol=1e-12)


def test_cutting_more_leaves_less():
    image = random_image(1, 1, 8, 8, 8)
    energy = [
        float(everywhere(Gibbs(), image, cut=torch.full((1, 1, 3), cut, dtype=torch.float64)).norm())
        for cut in (0.0, 0.2, 0.5, 0.8, 1.0)
    ]
    assert energy == sorted(energy, reverse=True)
    assert energy[0] == float(image.norm())
    drawn = Gibbs().random(image, (1.0,) * 3, 0.5, torch.Generator().manual_seed(0))["cut"]
    assert ((drawn > 0) & (drawn < 0.5)).all()
    control = Gibbs().control(image, (1.0,) * 3, 0.5, torch.Generator().manual_seed(0))
    assert Gibbs().size(control).item() == pytest.approx(0.5)
    assert ((control["cut"] > 0) & (control["cut"] < 0.5)).sum() == 2  # the largest share is the magnitude
    assert Gibbs().project({"cut": torch.tensor([-0.1, 0.2, 0.9])}, 0.5)["cut"].tolist() == pytest.approx([0, 0.2, 0.5])


# -------------------------------------------------------------------------------------------------- Rician
@pytest.mark.parametrize("snr", [1.0, 3.0, 20.0])
def test_random_noise_has_the_rician_distribution(snr):
    image = torch.full((1, 1, 60, 60, 60), 250.0, dtype=torch.float64)
    noise = Rician().random(image, (1.0,) * 3, 1 / snr, torch.Generator().manual_seed(0))
    found = everywhere(Rician(), image, **noise).flatten().numpy()
    law = stats.rice(snr, scale=250 / snr)
    n = len(found)
    assert abs(found.mean() - law.mean()) < 4 * law.std() / n**0.5
    spread = (law.stats(moments="k") + 2) ** 0.5 * law.var() / n**0.5
    assert abs(found.var() - law.var()) < 4 * spread
    assert stats.kstest(found, law.cdf).pvalue > 1e-3


def test_the_signal_is_the_mean_of_the_support_and_air_becomes_rayleigh():
    image = torch.zeros(1, 2, 40, 50, dtype=torch.float64)
    image[:, 0, :20], image[:, 1, :20] = 90, 900
    noise = Rician().random(image, (1.0, 1.0), 0.1, torch.Generator().manual_seed(0))
    found = Rician().apply(image, noise, (1.0, 1.0), torch.ones_like(image, dtype=torch.bool))
    for c, signal in enumerate((45.0, 450.0)):  # half of the support is air
        air = found[0, c, 20:].flatten().numpy()
        assert stats.kstest(air, stats.rayleigh(scale=0.1 * signal).cdf).pvalue > 1e-3
    only = Rician().apply(image, noise, (1.0, 1.0), image != 0)
    torch.testing.assert_close(only[0, 0, 0, 0], torch.hypot(90 + 90 * noise["noise"][0, 0, 0, 0, 0],
                               90 * noise["noise"][0, 0, 1, 0, 0]))  # fmt: skip
    assert not only[:, :, 20:].any()


def test_rician_noise_has_a_root_mean_square_of_what_is_not_zero():
    noise = torch.zeros(1, 1, 2, 10, dtype=torch.float64)
    noise[..., :4] = torch.tensor([[3.0, -3, 3, -3], [1, 1, -1, -1]])
    assert Rician().size({"noise": noise}).tolist() == [3.0]
    shorter = Rician().project({"noise": noise}, 1.5)["noise"]
    torch.testing.assert_close(shorter[:, :, 0], noise[:, :, 0] / 2)
    assert torch.equal(shorter[:, :, 1], noise[:, :, 1])  # allowed already, bit for bit
    slope = torch.zeros_like(noise)
    slope[0, 0, 0, :2] = torch.tensor([1e-200, 0.5e-200], dtype=torch.float64)
    stepped = Rician().step({"noise": torch.zeros_like(noise)}, {"noise": slope}, 0.5, 2.0)["noise"]
    torch.testing.assert_close(stepped[0, 0, 0, :3].tolist(), [(8 / 5) ** 0.5, (2 / 5) ** 0.5, 0.0])


def test_no_value_leaves_what_noise_of_its_size_reaches():
    """A search must not spend the energy of a million voxels on a few."""
    noise = torch.zeros(1, 1, 2, 1000, dtype=torch.float64)
    noise[..., 0] = 5.0
    noise[..., 1:] = 0.01
    for peak in (2.0, 6.0):
        kept = Rician(peak).project({"noise": noise}, 0.3)["noise"]
        assert kept.abs().max() <= peak * 0.3
        assert torch.equal(Rician(peak).project({"noise": kept}, 0.3)["noise"], kept)
        assert Rician(peak).size({"noise": kept}).item() <= 0.3 + 1e-12
    assert Rician(2.0).size({"noise": noise}).item() == 2.5
    with pytest.raises(ConfigError, match="peak must be at least 1"):
        Rician(0.5)


def test_negative_images_have_no_rician_noise():
    image = make_image(1, 2)[0]
    noise = torch.zeros(4, 2, *SHAPES[2])
    with pytest.raises(ConfigError, match="without negative values"):
        physics.PhysicalRician(noise=noise)(image)
    assert torch.equal(physics.PhysicalRician(noise=noise)(image.abs()), image.abs())
    with pytest.raises(ConfigError, match="without negative values"):
        make_attack("rician")(make_victim("smooth"), make_image(1), make_label("softmax", 1))


# --------------------------------------------------------------------------------------------- all of them
def drawn_for(kind, dims: int, batch: int = 2, dtype=torch.float64):
    effect = kind(**OPTIONS[kind])
    image = make_image(batch, dims, channels=2, dtype=dtype).abs()
    spacing = (2.0, 1.0, 0.5)[:dims]
    generator = torch.Generator().manual_seed(5)
    return effect, image, spacing, effect.random(image, spacing, 0.6 * kind.default_magnitude, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [2, 3])
@effective
def test_parameters_of_zero_are_the_image_bit_for_bit(kind, dims, dtype):
    """Also where a gradient is wanted, and for voxels of 0 inside the support."""
    effect, image, spacing, _ = drawn_for(kind, dims, dtype=dtype)
    image = image * 10 ** torch.linspace(-3, 4, image.shape[-1], dtype=dtype)
    for wanted in (False, True):
        zeros = {k: v.requires_grad_(wanted) for k, v in effect.zeros(image, spacing).items()}
        found = everywhere(effect, image, spacing, **zeros)
        assert torch.equal(found, image)
        assert found.requires_grad == wanted
        if wanted:
            assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), list(zeros.values())))


@pytest.mark.parametrize("dims", [2, 3])
@effective
def test_gradient_against_finite_differences_inside_the_support_only(kind, dims):
    effect, image, spacing, parameters = drawn_for(kind, dims, batch=1)
    support = image > 0.5
    names = list(parameters)

    def apply(*values):
        return effect.apply(image, dict(zip(names, values)), spacing, support)

    leaves = [v.requires_grad_(True) for v in parameters.values()]
    assert torch.autograd.gradcheck(apply, leaves, fast_mode=True)
    found = apply(*leaves)
    assert torch.equal(found[~support], image[~support])
    # a search needs the image's gradient on the support only
    upstream = random_image(*image.shape, seed=9) - 0.5
    whole = torch.autograd.grad(found, leaves, upstream, retain_graph=True)
    inside = torch.autograd.grad(found, leaves, upstream * support)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(whole, inside))


@pytest.mark.parametrize("thin", [0, 1, 2])
@effective
def test_an_axis_of_one_voxel_is_left_alone(kind, thin):
    effect, image, _, parameters = drawn_for(kind, 2)
    expected = everywhere(effect, image, (2.0, 0.5), **parameters)
    spacing = [2.0, 0.5]
    spacing.insert(thin, 9.0)
    effect = kind(**{**OPTIONS[kind], **({"axis": 1 if thin == 2 else 2} if hasattr(effect, "axis") else {})})
    shapes = effect.shapes(image.unsqueeze(2 + thin), spacing)
    if kind is Rician:
        parameters = {"noise": parameters["noise"].unsqueeze(3 + thin)}
    assert shapes == {k: tuple(v.shape[1:]) for k, v in parameters.items()}
    found = everywhere(effect, image.unsqueeze(2 + thin), spacing, **parameters)
    torch.testing.assert_close(found.squeeze(2 + thin), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Motion, {"segments": 1}, "segments must be an integer >= 2"),
        (Motion, {"axis": 3}, "axis must be an integer between -3 and 2"),
        (Ghosting, {"period": 1}, "period must be an integer >= 2"),
        (Ghosting, {"axis": 0.5}, "axis must be an integer"),
        (Gibbs, {"taper": 0}, "taper must be a number > 0"),
    ],
)
def test_impossible_options(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)


@pytest.mark.parametrize("kind", [Motion, Ghosting])
def test_phase_encoding_needs_lines(kind):
    with pytest.raises(ConfigError, match=r"axis 2 does not exist in an image \(6, 5\)"):
        kind(axis=2).zeros(make_image(1, 2), (1.0, 1.0))
    with pytest.raises(ConfigError, match="axis -1 has one voxel"):
        kind(axis=-1).zeros(make_image(1, 2)[..., :1], (1.0, 1.0))


# ------------------------------------------------------------------------------------------- the attacks
@pytest.mark.parametrize("control", [False, True])
@effective
def test_what_an_attack_found_is_replayed_by_the_transform(kind, control):
    victim, image, label = make_victim("smooth"), make_image(2).abs(), make_label("softmax", 2)
    support = image > 0.7
    attack = make_attack(kind.name, channels=(0, 2), control=control, **OPTIONS[kind])
    result = attack(victim, image, label, support=support, spacing=(2.0, 1.0, 0.5))
    eps = attack.threat.eps
    assert max(result.details["magnitude"]) <= eps
    assert all(not v[:, [1, 3]].any() for v in result.parameters.values())
    assert all(v[:, [0, 2]].any() for v in result.parameters.values())
    found = kind(**OPTIONS[kind]).apply(image, result.parameters, (2.0, 1.0, 0.5), support)
    assert torch.equal(found, result.image)
    if kind is Rician:
        noise = result.parameters["noise"]
        assert not noise[:, :, 0][~support].any()
        for b in range(2):
            for c in (0, 2):
                size = noise[b, c][:, support[b, c]].square().mean(1).sqrt()
                assert (size <= eps).all()
                assert (size > 0.8 * eps).all()
