"""HRA and LoRA on two processes, replicated (DDP) and sharded (fully_shard): the same steps and files as on one."""

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
from ortho_cli import registry
from ortho_cli.methods.adapter_layer import AdapterLayer, adapter_layers
from ortho_cli.methods.method import Context, Method
from ortho_cli.recipe.methods import HRA, LoRA

WORLD, STEPS = 2, 3
TARGETS = ("0", "2", "5", "8")
METHODS: dict[str, Any] = {
    "hra": HRA(name="hra", rank=4, targets=TARGETS, penalty=0.1, bias="hra_only"),
    "output": HRA(name="hra", rank=4, targets=TARGETS, side="output"),
    "gram-schmidt": HRA(name="hra", rank=2, targets=TARGETS, gram_schmidt=True),
    "lora": LoRA(name="lora", rank=2, targets=TARGETS),
}
LAYOUTS = ["replicated", "sharded by layers", "sharded to the bottom"]


def network() -> nn.Sequential:
    """The first layer's input needs no gradient; odd sizes, so that shards are uneven."""
    torch.manual_seed(0)
    first, second = nn.Linear(7, 5), nn.Linear(5, 9)
    convolution = nn.Sequential(nn.Tanh(), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(first, nn.Tanh(), second, *convolution, nn.Linear(16, 5))


def data(step: int) -> Tensor:
    return torch.randn(32, 7, generator=torch.Generator().manual_seed(step))


def made(name: str, model: nn.Module) -> Method:
    config = METHODS[name]
    method: Method = registry.resolve("methods", config.name)(config)
    method.prepare(model, Context(0, STEPS, "classify", None))
    return method


def steps(wrapped: nn.Module, model: nn.Module, method: Method, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """A few steps; everything that trains, whole."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), 0.05, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs = data(step)[rank::world]
        loss = (wrapped(inputs) - inputs[:, :5]).square().mean()
        penalty = method.penalty(model, {}, None, "train")
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
    return {name: whole(value).detach().clone() for name, value in trained.items()}


def whole(value: Tensor) -> Tensor:
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found


def sharded(model: nn.Module, to_the_bottom: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in adapter_layers(model).values():
        if to_the_bottom:  # by type, as one shards a model without knowing of adapters
            fully_shard(layer.fixed_linear, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def work(rank: int, folder: str) -> None:
    """What each process does; results are compared by the parent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {}
    for name in METHODS:
        for layout in LAYOUTS:
            model: nn.Module = network()
            method = made(name, model)
            if layout == "replicated":
                wrapped: nn.Module = DistributedDataParallel(model)
            else:
                wrapped = model = sharded(model, to_the_bottom=layout.endswith("bottom"))
            values = steps(wrapped, model, method, rank, WORLD)
            merged = {key: layer.merged_weight().detach() for key, layer in adapter_layers(model).items()}
            method.export(model, Path(folder) / f"{name}-{layout}-{rank}")
            found[name, layout] = values, merged, method.scalars()
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left what they found."""
    place = tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(str(place),), nprocs=WORLD)
    return place


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one(name: str, layout: str, folder: Path) -> None:
    model = network()
    method = made(name, model)
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    expected = steps(model, model, method)
    assert all(not torch.equal(expected[key], before[key]) for key in expected)
    layers = adapter_layers(model)
    for rank in range(WORLD):
        values, merged, scalars = torch.load(folder / f"rank{rank}.pt")[name, layout]
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(values[key], value, rtol=1e-4, atol=1e-5, msg=f"{key} on rank {rank}")
        for key, weight in merged.items():
            torch.testing.assert_close(weight, layers[key].merged_weight(), rtol=1e-4, atol=1e-5)
        assert scalars == pytest.approx(method.scalars(), rel=1e-4, abs=1e-5)
        fresh = ortho.load_adapter(network(), folder / f"{name}-{layout}-{rank}")
        assert isinstance(fresh[0], AdapterLayer)
        torch.testing.assert_close(fresh(data(9)), model(data(9)), rtol=1e-4, atol=1e-5)
