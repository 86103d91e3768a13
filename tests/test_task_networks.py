"""One network for each task inside real networks: outputs of earlier ones are the same bits whatever comes after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clkit.errors import ConfigurationError
from clkit.methods import Initial, PruneSchedule
from clkit.surgery.change import changes_of
from clkit.surgery.task_networks import TaskNetworks

SETTINGS: dict[str, Any] = {"density": 0.2, "schedule": PruneSchedule(update_every=1), "reuse": "prefer_free"}


def attached(network: nn.Module, **settings: Any) -> TaskNetworks:
    networks = TaskNetworks("DST", {**SETTINGS, **settings})
    networks.attach(network, None, "auto", ())
    return networks


def train(networks: TaskNetworks, network: nn.Module, batches: list[Tensor], optimizer: Any) -> None:
    """A task of one step a batch."""
    networks.begin(network, len(batches), [optimizer])
    network.train()
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch), torch.arange(len(batch)) % 3).backward()
        networks.known.after_backward()
        optimizer.step()
        networks.known.after_step(optimizer)
    networks.end(network, {})


@torch.no_grad()
def given(networks: TaskNetworks, network: nn.Module, task: int, images: Tensor) -> list[Tensor]:
    """Outputs for all images in one batch, and for the first three one by one."""
    network.eval()
    with networks.shown(task):
        return [network(images), *(network(each[None]) for each in images[:3])]


@pytest.mark.parametrize(
    ("name", "growth"),
    [
        ("test_resnet", "gradient"),
        pytest.param("mobilenetv3_small_050", "random", marks=pytest.mark.slow),
        pytest.param("test_convnext", "momentum", marks=pytest.mark.slow),
        ("test_vit", "unfired"),
    ],
)
def test_earlier_tasks_of_timm_networks_give_the_same_bits(name: str, growth: str) -> None:
    """After five later tasks whose inputs have very different statistics, with weight decay."""
    import timm

    torch.manual_seed(0)
    options = {"img_size": 32} if "vit" in name else {}
    network = timm.create_model(name, num_classes=5, **options)
    networks = attached(network, growth=growth, grow_from="any")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.5)
    images, first = torch.randn(32, 3, 32, 32), {}
    for task in range(6):
        batches = [torch.randn(8, 3, 32, 32) * 3.0**task - task for _ in range(2)]
        train(networks, network, batches, optimizer)
        first[task] = given(networks, network, task, images)
        for earlier in range(task + 1) if task in (1, 5) else ():
            now = given(networks, network, earlier, images)
            assert all(torch.equal(one, other) for one, other in zip(first[earlier], now, strict=True))
    assert not torch.equal(first[0][0], first[5][0])


def test_the_output_of_a_norm_without_running_statistics_depends_on_its_batch_alone() -> None:
    """As published code has it: a sample's output is another in another batch, and the same in the same batch."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    networks = attached(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    images = torch.randn(8, 3, 8, 8)
    train(networks, network, [torch.randn(8, 3, 8, 8)], optimizer)
    whole = given(networks, network, 0, images)[0]
    train(networks, network, [torch.randn(8, 3, 8, 8) * 9], optimizer)
    assert torch.equal(given(networks, network, 0, images)[0], whole)
    assert not torch.allclose(given(networks, network, 0, images[:4])[0], whole[:4], atol=1e-3)


def test_statistics_of_norms_that_drift_without_any_learning_are_kept_by_task() -> None:
    """With a learning rate of 0 no weight moves, and running means do all the same."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    networks = attached(network)
    images = torch.randn(8, 3, 8, 8)
    train(networks, network, [images], torch.optim.SGD(network.parameters(), lr=0.1))
    first, mean = given(networks, network, 0, images), network[1].running_mean.clone()
    train(networks, network, [images * 9 + 3] * 3, torch.optim.SGD(network.parameters(), lr=0.0))
    assert not torch.allclose(network[1].running_mean, mean, atol=1e-2)
    assert all(torch.equal(*pair) for pair in zip(given(networks, network, 0, images), first, strict=True))


def test_a_head_begins_anew_and_its_optimizer_remembers_nothing() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    before = {name: value.clone() for name, value in network[2].state_dict().items()}
    networks = attached(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    train(networks, network, [torch.randn(6, 6)] * 3, optimizer)
    assert not torch.equal(network[2].weight, before["weight"])
    networks.begin(network, 3, [optimizer])
    assert torch.equal(network[2].weight, before["weight"])
    assert torch.equal(network[2].bias, before["bias"])
    for parameter in network[2].parameters():
        assert optimizer.state[parameter]["exp_avg"].count_nonzero() == 0
        assert int(optimizer.state[parameter]["step"]) == 3
    assert [change.noun for change in changes_of(network)] == ["mask"]
    networks.detach(network)
    assert changes_of(network) == []


def test_a_block_ends_bitwise_as_it_began_also_after_an_error_and_in_any_order() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    networks = attached(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for scale in (1.0, 5.0):
        train(networks, network, [torch.randn(6, 6) * scale] * 2, optimizer)
    networks.begin(network, 4, [optimizer])
    with torch.no_grad():
        network[0].weight[networks.known.mask(2)["0.weight"] & (network[0].weight != 0)] *= -1.5
    live = {name: value.clone() for name, value in network.state_dict().items()}

    def same() -> bool:
        return all(torch.equal(value, live[name]) for name, value in network.state_dict().items())

    with pytest.raises(ZeroDivisionError), networks.shown(0), torch.inference_mode():
        1 / same()  # it is not, so this is an error
    assert same()
    one, other = networks.shown(1), networks.shown(1)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)  # evaluations of two callbacks do not end as a stack does
    assert not same()
    with pytest.raises(ConfigurationError, match="DST shows task 1 now; leave that block before task 0"):
        networks.shown(0).__enter__()
    other.__exit__(None, None, None)
    assert same()
    with networks.shown(2):  # the one that trains
        assert same()


def test_what_no_task_changes_is_kept_once_and_only_what_is_saved_is_exported() -> None:
    """A frozen part, and a buffer that is in no state dict; shared weights stand under both names."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.one, self.two = nn.Linear(6, 50), nn.Linear(50, 50), nn.Linear(50, 50)
            self.two.weight = self.one.weight
            self.frozen.requires_grad_(False)
            self.register_buffer("cache", torch.ones(3), persistent=False)
            self.fc = nn.Linear(50, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.two(self.one(self.frozen(x)).relu()).relu()) * self.cache

    torch.manual_seed(0)
    network = Net()
    networks = attached(network, initial=Initial("uniform"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        train(networks, network, [torch.randn(6, 6)] * 2, optimizer)
    tasks = networks.state()["side"]["tasks"]
    assert tasks[0]["frozen.weight"] is tasks[2]["frozen.weight"]
    assert tasks[0]["fc.weight"] is not tasks[2]["fc.weight"]
    images = torch.randn(4, 6)
    expected = given(networks, network, 0, images)[0]
    again = Net()
    again.load_state_dict(networks.export(0))
    assert torch.equal(again.eval()(images), expected)
