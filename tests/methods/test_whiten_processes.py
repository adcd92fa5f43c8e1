"""Whitening on two processes: statistics, gradients and what is tracked are those of the whole batch on one."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ortho_cli.methods.method import Context
from ortho_cli.methods.track_conditioning import TrackConditioningMethod
from ortho_cli.methods.whiten import WhitenMethod
from ortho_cli.recipe.methods import TrackConditioning, Whiten

WORLD = 2
STEPS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    return nn.Sequential(*layers).double()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    values = torch.randn(8, 3, 7, 7, generator=generator, dtype=torch.float64)
    return values * torch.arange(1, 9, dtype=torch.float64)[:, None, None, None]  # halves differ in scale


def trained(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    model = network()
    whiten = WhitenMethod(Whiten(name="whiten", targets=("1", "4"), groups=2))
    track = TrackConditioningMethod(TrackConditioning(name="track_conditioning", targets=("1", "4"), every=1))
    for method in (whiten, track):
        method.prepare(model, Context(0, STEPS, "classify", None, nn.Identity))
    track.param_groups(model)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(batch(step)[rank::world]).pow(3).mean().backward()
        optimizer.step()
        track.after_step(model, optimizer, step, "train")
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, track.scalars()


def work(rank: int, folder: str) -> None:
    """What each process does; results are compared by the parent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.save(trained(rank, WORLD), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    weights, numbers = trained(0, 1)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    assert any(name.endswith("running_covariance") for name in weights)
    for found, tracked in results:
        assert found.keys() == weights.keys() and tracked.keys() == numbers.keys()
        for name, value in weights.items():
            assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name
        for name, number in numbers.items():
            assert abs(tracked[name] - number) <= 1e-9 * abs(number), name
    for first, second in zip(results[0][0].values(), results[1][0].values(), strict=True):
        assert torch.equal(first, second)  # ranks do not drift apart
