"""NOG, OLR and the orthogonal loss on two processes whose weights are sharded: the same steps as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ortho_cli.methods.method import Context
from ortho_cli.recipe.methods import NOG, OLR, OrthogonalLoss
from ortho_cli.registry import resolve

WORLD, STEPS, LR = 2, 3, 0.05
TARGETS = ("0", "2")
CHAINS: dict[str, list[Any]] = {
    "before": [OrthogonalLoss(name="orthogonal_loss", targets=TARGETS, penalty=0.1), NOG(name="nog", targets=TARGETS),
               OLR(name="olr", targets=TARGETS, floor=0.1)],
    "after": [NOG(name="nog", targets=TARGETS, order="after")],
}  # fmt: skip


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 15), nn.Tanh(), nn.Linear(15, 9), nn.Tanh(), nn.Linear(9, 5, bias=False))


def data() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def methods(model: nn.Module, order: str) -> list[Any]:
    made = [resolve("methods", section.name)(section) for section in CHAINS[order]]
    for method in made:
        method.prepare(model, Context(0, 1, "classify", None))
    return made


def trained(model: nn.Module, chain: list[Any], images: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    claimed = [group for method in chain for group in method.param_groups(model)]
    taken = {id(p) for group in claimed for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizer = torch.optim.SGD([{"params": rest}, *claimed], lr=LR, momentum=0.9, weight_decay=0.1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.zero_grad()
        model(images).square().mean().backward()
        for method in chain:
            method.after_backward(model, optimizer, "train")
        optimizer.step()
        for method in chain:
            method.after_step(model, optimizer, step, "train")
    found = {}
    for name, value in model.named_parameters():
        found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return found, {key: value for method in chain for key, value in method.scalars().items()}


def work(rank: int, folder: str) -> None:
    """What each process does; results are compared by the parent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for order in CHAINS:
        model = network()
        chain = methods(model, order)
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        results[order] = trained(fully_shard(model, mesh=mesh), chain, data()[rank::WORLD])
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_sharded_weights_step_as_whole_ones(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    for order in CHAINS:
        model = network()
        expected, told = trained(model, methods(model, order), data())
        for found, scalars in (result[order] for result in results):
            assert scalars == pytest.approx(told, rel=1e-4)
            assert found.keys() == expected.keys()
            for name, weight in expected.items():
                assert torch.allclose(found[name], weight, atol=1e-5), (order, name)
