"""GOR on two processes, replicated (DDP) and sharded (fully_shard): the same step as on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ortho_cli.methods.gor import GORMethod, gor_penalty
from ortho_cli.methods.method import Context
from ortho_cli.recipe.methods import GOR

WORLD = 2
PENALTY = 0.2
GROUPS = 3  # odd: shards do not fall on group borders


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 15), nn.Tanh(), nn.Linear(15, 9), nn.Tanh(), nn.Linear(9, 5, bias=False))


def data() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def made(model: nn.Module) -> GORMethod:
    method = GORMethod(GOR(name="gor", penalty=PENALTY, groups=GROUPS, min_filters=3, targets="linear"))
    method.prepare(model, Context(0, 1, "classify", None))
    return method


def one_step_on_one_process() -> tuple[dict[str, Tensor], float]:
    """The reference: the penalty in the loss, the whole batch."""
    model = network()
    penalty = gor_penalty(model, GROUPS, min_filters=3, targets="linear")
    (model(data()).square().mean() + PENALTY * penalty).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return {name: value.detach() for name, value in model.named_parameters()}, PENALTY * float(penalty.detach())


def step(wrapped: nn.Module, model: nn.Module, method: GORMethod, rank: int) -> tuple[dict[str, Tensor], float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped(data()[rank::WORLD]).square().mean().backward()
    method.after_backward(model, optimizer, "train")
    optimizer.step()
    found = {}
    for name, value in model.named_parameters():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = whole.detach().clone()
    return found, method.scalars()["penalty"]


def work(rank: int, folder: str) -> None:
    """What each process does; results are compared by the parent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    model = network()
    method = made(model)
    replicated = step(DistributedDataParallel(model), model, method, rank)
    model = network()
    method = made(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    sharded_model = fully_shard(model, mesh=mesh)
    by_loss = gor_penalty(sharded_model, GROUPS, min_filters=3, targets="linear")
    (PENALTY * by_loss).backward()
    loss_gradient = model[0].weight.grad.full_tensor().clone()
    sharded_model.zero_grad()
    sharded = step(sharded_model, model, method, rank)
    torch.save((replicated, sharded, by_loss.detach(), loss_gradient), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_step_as_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    expected, penalty = one_step_on_one_process()
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    for replicated, sharded, by_loss, _ in results:
        for found, value in (replicated, sharded):
            assert value == pytest.approx(penalty, rel=1e-6)
            assert found.keys() == expected.keys()
            for name, weight in expected.items():
                assert torch.allclose(found[name], weight, atol=1e-6), name
        assert PENALTY * float(by_loss) == pytest.approx(penalty, rel=1e-6)
    for first, second in zip(results[0][0][0].values(), results[1][0][0].values(), strict=True):
        assert torch.equal(first, second)  # ranks do not drift apart
    model = network()
    (PENALTY * gor_penalty(model, GROUPS, min_filters=3, targets="linear")).backward()
    assert torch.allclose(results[0][3], model[0].weight.grad, atol=1e-6)
