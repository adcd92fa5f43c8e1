"""Penalties on a generator's code on two processes: drawn by sample, and the largest is that of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ortho_cli.methods.code_penalties import HessianMethod, OroJaRMethod
from ortho_cli.methods.method import Context
from ortho_cli.recipe.data import Images
from ortho_cli.recipe.methods_gan import Hessian, OroJaR
from ortho_cli.recipe.models import EigenGAN
from ortho_cli.recipe.tasks import GAN
from ortho_cli.tasks.gan import GANTask

WORLD = 2
STEPS = 3
METHODS: dict[str, Any] = {
    "hessian": lambda: HessianMethod(Hessian(name="hessian", targets=("feature_conv*",), penalty=0.1)),
    "orojar": lambda: OroJaRMethod(OroJaR(name="orojar", targets=("feature_conv*",), penalty=0.1)),
}


def doubled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def trained(name: str, rank: int, world: int) -> tuple[dict[str, Tensor], list[float]]:
    torch.manual_seed(0)
    task = GANTask(GAN(name="gan"), Images(name="digits", size=8), seed=0)
    model = task.build_model(EigenGAN(name="eigengan", basis=2, noise=3, base_channels=4, max_channels=4)).double()
    method = METHODS[name]()
    method.prepare(model, Context(0, STEPS, "gan", None))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    optimizer = torch.optim.SGD(model.generator.parameters(), 1e-3)
    told = []
    for _, batch in zip(range(STEPS), task.batches("train", 1, batch=8, rank=rank, world=world), strict=False):
        optimizer.zero_grad()
        loss, outputs, _ = task.loss(wrapped, doubled(batch), "generator")
        penalty = method.penalty(model, batch, outputs, "generator")
        assert penalty is not None
        (loss + penalty).backward()
        optimizer.step()
        told.append(float(penalty.detach()))
    return {key: value.detach().clone() for key, value in model.generator.state_dict().items()}, told


def work(rank: int, folder: str) -> None:
    """What each process does; results are compared by the parent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.save({name: trained(name, rank, WORLD) for name in METHODS}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", list(METHODS))
def test_two_processes_train_as_one(of_two: list[dict[str, Any]], name: str) -> None:
    weights, told = trained(name, 0, 1)
    results = [each[name] for each in of_two]
    for found, _ in results:
        assert found.keys() == weights.keys()
        for key, value in weights.items():
            assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-12), key
    both = [sum(each) / WORLD for each in zip(*(penalties for _, penalties in results), strict=True)]
    assert both == pytest.approx(told, rel=1e-9)
    assert any(0.0 in penalties for _, penalties in results), "a process without the largest has none"
