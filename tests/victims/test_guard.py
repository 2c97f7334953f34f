"""guard: the network is left as it was found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_adv.errors import MonaiAdvError
from monai_adv.victims import guard


def state(network: nn.Module):
    return (
        [module.training for module in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        {name: value.clone() for name, value in network.state_dict().items()},
    )


def assert_same(network: nn.Module, before) -> None:
    modes, wanted, values = state(network)
    assert modes == before[0]
    assert wanted == before[1]
    assert all(torch.equal(values[k], v) for k, v in before[2].items())


@pytest.fixture
def network() -> nn.Module:
    """Mixed modes and flags: a fine-tuned network with a frozen first layer and its normalisation in eval mode."""
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 2, 1)).train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    return network


def test_inside_evaluation_mode_and_no_parameter_wants_a_gradient(network):
    with guard(network) as inside:
        assert inside is network
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored(network, fails):
    before = state(network)
    image = torch.randn(2, 2, 4, 4, requires_grad=True)
    try:
        with guard(network):
            network(image).sum().backward()
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert_same(network, before)
    assert image.grad is not None
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_gradient_that_was_there_stays(network):
    network[3].weight.grad = torch.ones_like(network[3].weight)
    image = torch.randn(1, 2, 4, 4, requires_grad=True)
    with guard(network):
        network(image).sum().backward()
    assert torch.equal(network[3].weight.grad, torch.ones_like(network[3].weight))


def test_usable_as_a_decorator(network):
    before = state(network)

    @guard(network)
    def modes() -> bool:
        return any(module.training for module in network.modules())

    assert modes() is False
    assert modes() is False
    assert_same(network, before)


def test_gradients_are_possible_inside_no_grad(network):
    with torch.no_grad():
        with guard(network):
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


class ForcesTraining(nn.Module):
    """Normalisation that ignores evaluation mode, as some released models do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm.training = True
        return self.norm(x)


class Replaces(nn.Module):
    """A buffer that is not changed in place but replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + 1
        return x


@pytest.mark.parametrize(("build", "name"), [(ForcesTraining, "norm.running_mean"), (Replaces, "0.seen")])
def test_a_changed_buffer_is_restored_and_reported(build, name):
    network = build() if build is ForcesTraining else nn.Sequential(build())
    buffers = dict(network.named_buffers())
    before = state(network)
    with pytest.raises(MonaiAdvError, match=name.replace(".", r"\.")), guard(network):
        network(torch.randn(2, 2, 4, 4))
    assert_same(network, before)
    assert all(buffer is buffers[key] for key, buffer in network.named_buffers())


def test_the_original_error_wins_over_the_report():
    network = ForcesTraining()
    before = state(network)

    @guard(network)
    def fails() -> None:
        network(torch.randn(2, 2, 4, 4))
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fails()
    assert_same(network, before)


def test_a_buffer_with_nan_is_compared_voxel_by_voxel():
    network = nn.BatchNorm2d(2)
    network.running_mean[0] = float("nan")
    with guard(network):
        pass  # NaN that stays NaN is no change
    with pytest.raises(MonaiAdvError, match="running_mean"), guard(network):
        network.running_mean[1] = 5
    assert network.running_mean[1] == 0
