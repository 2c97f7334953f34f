"""The generator of fields, its critic, and the file they are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from synthesis_toy import generator as small

from monai_adv.errors import CheckpointError, ConfigError
from monai_adv.networks import SynthesisCritic, SynthesisGenerator, load_generator, save_generator
from monai_adv.networks.synthesis import FIELDS, HEAD_GAIN
from monai_adv.transforms import Synthesis


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = 100 + 50 * torch.rand(shape, generator=generator)
    values[..., :2] = 0
    return values


def excited(network: SynthesisGenerator) -> SynthesisGenerator:
    """Heads as large as after some training."""
    generator = torch.Generator().manual_seed(5)
    for head in network.heads.values():
        torch.nn.init.normal_(head.conv.weight, std=1.0, generator=generator)
    return network


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((16, 16), (3, 3)), ((17, 9), (3, 2)), ((5, 33), (2, 5)), ((16, 8, 23), (3, 2, 4)), ((12, 25, 1), (3, 4, 2))],
)
def test_fields_of_any_size_within_their_limits(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    dims = len(shape)
    network = excited(small(dims, in_channels=3))
    found = network(image(2, 3, *shape), torch.tensor([0.1, 0.5]), generator=torch.Generator().manual_seed(0))
    assert {k: tuple(found[k].shape) for k in FIELDS} == {
        "velocity": (2, dims, *grid), "log_bias": (2, 3, *grid), "residual": (2, 3, *grid),
    }  # fmt: skip
    assert found["mu"].shape == found["log_var"].shape == (2, 2, *grid)
    assert all(0 < float(found[k].detach().abs().max()) <= 1 for k in FIELDS)
    Synthesis(**network.effect).from_unit({k: found[k] for k in FIELDS}, image(2, 3, *shape), [2.0] * dims)


def test_padding_neither_shifts_nor_stretches_the_fields() -> None:
    """A feature of the encoder at voxel 8 i has its value at that place of the output, wherever the image ends."""
    network = small(2, effect={"max_mm": 0, "max_residual": 0})
    for n in (17, 20, 25, 31, 32):
        grid = -(-(n - 1) // 8) + 1
        ramp = torch.linspace(0, 8 * (grid - 1), grid) / 1000  # of the fields, small for the tanh

        def features(padded: torch.Tensor, ramp: torch.Tensor = ramp) -> torch.Tensor:
            assert padded.shape[2:] == (8 * (len(ramp) - 1) + 1, 17)
            return ramp.view(1, 1, -1, 1).expand(1, 8, -1, 3)

        network.encoder.forward = features  # type: ignore[method-assign]
        network.code = torch.nn.Conv2d(8, 4, 1)
        for layer in network.decoder:
            layer.forward = lambda hidden: hidden[:, :8]  # type: ignore[method-assign]
        head = network.heads["log_bias"].conv
        torch.nn.init.zeros_(head.weight)
        head.weight.data[0, 0, 1, 1] = 1 / HEAD_GAIN
        found = network(image(1, 1, n, 17), torch.tensor([0.3]))["log_bias"][0, 0, :, 0]
        torch.testing.assert_close(found, torch.linspace(0, n - 1, grid) / 1000, atol=2e-5, rtol=0)


def test_an_untrained_generator_changes_next_to_nothing() -> None:
    network, x = SynthesisGenerator(2, 1), image(1, 1, 40, 40)
    effect = Synthesis(**network.effect)
    fields = network(x, torch.tensor([0.5]), generator=torch.Generator().manual_seed(1))
    parameters = effect.from_unit({k: fields[k] for k in FIELDS}, x, (2.0, 2.0))
    assert 0 < float(effect.size(parameters).detach()) < 0.03
    changed = effect.apply(x, parameters, (2.0, 2.0), x != 0).detach()
    assert 0 < float((changed - x).abs().max()) < 0.02 * float(x.max())


def test_code_and_drop_change_the_fields_and_its_mean_is_deterministic() -> None:
    network, x = excited(small(2)), image(1, 1, 16, 16)
    drop = torch.tensor([0.3])
    mean = network(x, drop)["velocity"]
    assert torch.equal(mean, network(x, drop)["velocity"])
    assert torch.equal(mean, network(x, drop, noise=torch.zeros(1, 2, 3, 3))["velocity"])
    drawn = [network(x, drop, generator=torch.Generator().manual_seed(s))["velocity"] for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    given = network(x, drop, noise=torch.randn((1, 2, 3, 3), generator=torch.Generator().manual_seed(0)))["velocity"]
    assert torch.equal(given, drawn[0])
    more = network(x, torch.tensor([0.6]))["velocity"]
    assert float((more - mean).detach().abs().max()) > 1e-3
    # an instance normalisation would take a constant channel away, except at the borders
    assert not any("Norm" in type(m).__name__ for m in network.decoder.modules())


def test_scale_of_the_scanner_and_batch_mates_do_not_matter() -> None:
    network = excited(small(2)).double()
    x, drop = image(2, 1, 16, 16).double(), torch.tensor([0.1, 0.4]).double()
    together = network(x, drop)
    assert together["residual"].dtype == torch.float64
    torch.testing.assert_close(network(1000 * x, drop)["residual"], together["residual"])
    torch.testing.assert_close(network(x[1:], drop[1:])["residual"], together["residual"][1:])


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_an_image_without_contrast_gives_finite_fields_and_gradients(value: float) -> None:
    network = excited(small(2))
    found = network(torch.full((1, 1, 16, 16), value), torch.tensor([0.3]), generator=torch.Generator().manual_seed(0))
    torch.stack([v.sum() for v in found.values()]).sum().backward()
    assert all(bool(torch.isfinite(v).all()) for v in found.values())
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_a_limit_of_zero_leaves_its_field_out() -> None:
    network = small(2, effect={"max_mm": 0.0, "max_bias": 0.2})
    assert set(network(image(1, 1, 16, 16), torch.tensor([0.3]))) == {"log_bias", "residual", "mu", "log_var"}
    assert network.effect["knot_mm"] == Synthesis().knot_mm  # defaults are filled in


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_dims": 4}, "2 or 3"),
        ({"in_channels": 0}, "in_channels"),
        ({"channels": (8, 16)}, "three numbers"),
        ({"latent": 1.5}, "latent"),
        ({"effect": {"max_cm": 1.0}}, "max_cm"),
        ({"effect": {"max_mm": 0, "max_bias": 0, "max_residual": 0}}, "nothing can change"),
    ],
)
def test_impossible_generators_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SynthesisGenerator(**options)


def test_wrong_inputs_are_refused() -> None:
    network = small(2)
    with pytest.raises(ConfigError, match="images"):
        network(image(1, 2, 16, 16), torch.tensor([0.3]))
    with pytest.raises(ConfigError, match="a drop each"):
        network(image(2, 1, 16, 16), torch.tensor([0.3]))
    with pytest.raises(ConfigError, match="noise"):
        network(image(1, 1, 16, 16), torch.tensor([0.3]), noise=torch.zeros(1, 2, 1, 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_critic_judges_patches_whatever_the_scale(dims: int) -> None:
    critic = SynthesisCritic(dims, 2, channels=4).eval()
    x = image(2, 2, *[16] * dims)
    judged = critic(x)
    assert judged.shape == (2, 1, *[4] * dims)
    torch.testing.assert_close(critic(500 * x), judged, atol=1e-5, rtol=1e-4)
    assert not any("BatchNorm" in type(m).__name__ for m in critic.modules())
    # spectral normalisation: no layer's matrix stretches
    critic.train()
    for _ in range(30):
        critic(x)
    weight = critic.network.initial_conv.conv.weight.detach()
    assert float(torch.linalg.matrix_norm(weight.flatten(1), 2)) == pytest.approx(1, abs=1e-2)


def test_a_file_gives_the_generator_back(tmp_path: Path) -> None:
    network = excited(small(3))
    path = save_generator(tmp_path / "g.pt", network, {"victim": {"sha256": "abc"}, "subjects": ["a"]})
    loaded = load_generator(path)
    x, drop = image(1, 1, 16, 16, 16), torch.tensor([0.3])
    first, second = network(x, drop), loaded(x, drop)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert loaded.effect == network.effect
    assert loaded.training_info == {"victim": {"sha256": "abc"}, "subjects": ["a"]}
    assert not loaded.training


def test_bad_files_are_named(tmp_path: Path) -> None:
    network, path = small(2), tmp_path / "g.pt"
    with pytest.raises(CheckpointError, match=r"g\.pt does not exist.*train-synthesis"):
        load_generator(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"g\.pt cannot be read"):
        load_generator(path)
    torch.save({"state_dict": network.state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"g\.pt is not a generator"):
        load_generator(path)
    content = torch.load(save_generator(path, network), weights_only=True)
    torch.save({**content, "config": {**content["config"], "wings": 2}}, path)
    with pytest.raises(CheckpointError, match=r"g\.pt: its configuration"):
        load_generator(path)
    torch.save({**content, "config": {**content["config"], "latent": 3}}, path)
    with pytest.raises(CheckpointError, match=r"g\.pt: its weights do not fit"):
        load_generator(path)
    with pytest.raises(CheckpointError, match="plain data"):
        save_generator(path, network, {"model": network})
    before = path.read_bytes()
    next(network.parameters()).data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        save_generator(path, network)
    assert path.read_bytes() == before
