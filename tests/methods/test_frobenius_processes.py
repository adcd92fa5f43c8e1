"""Frobenius decay on two processes, replicated (DDP) and sharded (fully_shard): the same step as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ortho_cli as ortho
from ortho_cli.methods.frobenius_decay import FrobeniusDecayMethod
from ortho_cli.methods.method import Context
from ortho_cli.methods.tensor_layers import TensorLayer
from ortho_cli.recipe.methods import FrobeniusDecay

WORLD = 2
COEF = 0.2
OPTIMIZERS = {"coupled": torch.optim.SGD, "decoupled": torch.optim.AdamW}


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 15), nn.Tanh(), nn.Linear(15, 9), nn.Tanh(), nn.Linear(9, 8), nn.Linear(8, 5))
    ortho.factorize_(model, rank=3, square=True, targets=["0", "2"])
    ortho.factorize_(model, rank_scale=0.5, form="tensor-train", targets=["4"])
    assert isinstance(model[4], TensorLayer)
    return model


def data() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def made(model: nn.Module) -> FrobeniusDecayMethod:
    method = FrobeniusDecayMethod(FrobeniusDecay(name="frobenius_decay", penalty=COEF))
    method.prepare(model, Context(0, 1, "classify", None))
    return method


def step(wrapped: nn.Module, model: nn.Module, method: FrobeniusDecayMethod, rank: int, kind: str) -> Any:
    optimizer = OPTIMIZERS[kind](model.parameters(), 0.01, weight_decay=0.0)
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
    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for kind in OPTIMIZERS:
        model = network()
        method = made(model)
        results[kind, "replicated"] = step(DistributedDataParallel(model), model, method, rank, kind)
        model = network()
        method = made(model)
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh)
        results[kind, "sharded"] = step(fully_shard(model, mesh=mesh), model, method, rank, kind)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def on_one_process(kind: str) -> tuple[dict[str, Tensor], float]:
    """The whole batch; where decay is coupled, as a term of the loss."""
    model = network()
    layers = list(made(model).layers.values())
    penalty = COEF / 2 * sum(layer.squared_norm(*layer.factor_parameters()) for layer in layers)
    optimizer = OPTIMIZERS[kind](model.parameters(), 0.01, weight_decay=0.0)
    task = model(data()).square().mean()
    assert isinstance(penalty, Tensor)
    if kind == "coupled":
        (task + penalty).backward()
    else:
        parts = [part for layer in layers for part in layer.factor_parameters()]
        decays = torch.autograd.grad(penalty, parts)
        task.backward()
        with torch.no_grad():
            for part, decay in zip(parts, decays, strict=True):
                part.sub_(0.01 * decay)
    optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}, made(model).scalars()["penalty"]


def test_two_processes_step_as_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    for kind in OPTIMIZERS:
        expected, penalty = on_one_process(kind)
        for result in results:
            for layout in ("replicated", "sharded"):
                found, value = result[kind, layout]
                assert value == pytest.approx(penalty, rel=1e-5)
                assert found.keys() == expected.keys()
                for name, weight in expected.items():
                    assert torch.allclose(found[name], weight, atol=2e-6), (kind, layout, name)
        first, second = (result[kind, "replicated"][0] for result in results)
        assert all(torch.equal(first[name], second[name]) for name in first)  # ranks do not drift apart
