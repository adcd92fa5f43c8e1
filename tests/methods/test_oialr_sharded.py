"""OIALR on two processes under `fully_shard`: the same steps, ranks and files as on one, and factors alike on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ortho_cli.methods.basis_layers import BasisLayer
from ortho_cli.methods.method import Context
from ortho_cli.methods.oialr import OIALRMethod
from ortho_cli.recipe.methods import OIALR
from ortho_cli.training.ema import Average
from ortho_cli.training.optimizers import clip_gradients
from ortho_cli.training.snapshot import capture

pytestmark = pytest.mark.slow
WORLD, STEPS = 2, 12
SETTINGS = {
    "step": {"when": "step", "delay": 3, "every": 3, "beta": 0.3},
    "stable": {"when": "stable", "every": 2, "threshold": 0.9, "patience": 1, "beta": 0.3, "lora_rank": 2},
}
LAYOUTS = ["by blocks", "to the bottom"]


class Net(nn.Module):
    """Odd sizes, so that shards are uneven; attention of query and another key asks its projection for rows."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(
            nn.Unflatten(1, (2, 3, 3)), nn.Conv2d(2, 4, 2, groups=2 if attends else 1), nn.Flatten()
        )
        self.body = nn.Sequential(nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 15, bias=False), nn.LayerNorm(15))
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True) if attends else None
        self.head = nn.Linear(15, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(self.stem(inputs))
        if self.attention is not None:
            tokens = hidden.view(-1, 3, 5)
            hidden = self.attention(tokens, tokens.flip(1), tokens, need_weights=False)[0].flatten(1) + hidden
        out: Tensor = self.head(hidden)
        return out


def made(name: str) -> tuple[Net, OIALRMethod]:
    model = Net(attends=name == "step")
    method = OIALRMethod(OIALR.model_validate({"name": "oialr", "order": "all", **SETTINGS[name]}))
    method.prepare(model, Context(0, STEPS, "classify", "base"))
    return model, method


def trained(model: nn.Module, method: OIALRMethod, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Everything that a checkpoint of the end holds: weights, their averages, moments and bases to compare with."""
    training = [each for each in model.parameters() if each.requires_grad]
    # A key's bias has no gradient but rounding, which Adam would make steps of.
    attends = isinstance(model, Net) and model.attention is not None
    optimizer = torch.optim.SGD(training, 0.1, 0.9) if attends else torch.optim.AdamW(training, 1e-2)
    average = Average(0.5)
    method.follow(average.carry)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs = torch.randn(32, 18, generator=torch.Generator().manual_seed(step))[rank::world]
        (model(inputs) - inputs[:, :3]).square().mean().backward()
        clip_gradients(optimizer, 1.0)
        optimizer.step()
        again = method.after_step(model, optimizer, step, "train")
        assert not (again and world > 1)  # all is sharded as it was: nothing to prepare
        average.update(model)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert (
        held
        == {id(each) for each in model.parameters() if each.requires_grad}
        >= {id(each) for each in optimizer.state}
    )
    for parameter, state in optimizer.state.items():
        moments = [state[key] for key in state if key != "step"]
        assert moments and all(type(moment) is type(parameter.data) for moment in moments)
    snapshot = capture(model, {"train": optimizer}, [method], {}, keep=True)
    with average.swapped(model):
        judged = capture(model, {}, [], {}, keep=True).model
        averages = {f"averaged.{name}": value.clone() for name, value in judged.items()}
    return {**snapshot.model, **snapshot.moments, **averages}


def sharded(model: Net, layout: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    if layout == "to the bottom":
        for module in list(model.modules()):
            if next(module.parameters(recurse=False), None) is not None and next(module.children(), None) is None:
                fully_shard(module, mesh=mesh)
    for module in (model.stem, model.body, *([model.attention] if model.attention is not None else [])):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def work(rank: int, folder: str) -> None:
    """What each process does, with an SVD as good as any and other signs on each; the parent compares."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    plain: Any = torch.linalg.svd

    def flipped(matrix: Tensor, **options: Any) -> Any:
        u, values, vt = plain(matrix, **options)
        return (-u, values, -vt) if rank else (u, values, vt)

    torch.linalg.svd = flipped
    found = {}
    for name in SETTINGS:
        for layout in LAYOUTS:
            model, method = made(name)
            state = trained(sharded(model, layout), method, rank, WORLD)
            layers = method.run.converted.values()
            assert all(hasattr(part, "full_tensor") for layer in layers for part in (layer.U, layer.M, layer.VT))
            method.export(model.eval(), Path(folder) / f"{name}-{layout}-{rank}")
            found[name, layout] = state, method.state()["layers"], method.scalars()
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left what they found."""
    place = tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(str(place),), nprocs=WORLD)
    return place


def products(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, those in three parts multiplied out: signs of factors are free."""
    found = {}
    for name, value in state.items():
        owner, _, part = name.rpartition(".")
        if "/" in name or part in ("U", "VT"):
            continue
        if part != "M":
            found[name] = value
            continue
        u, vt = state[f"{owner}.U"], state[f"{owner}.VT"]
        groups = len(value) // value.shape[1]
        parts = (each.reshape(groups, -1, each.shape[-1]) for each in (u, value, vt))
        first, core, last = parts
        found[owner] = first @ core @ last
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one(name: str, layout: str, folder: Path, tmp_path: Path) -> None:
    model, method = made(name)
    expected = trained(model, method)
    assert all(isinstance(layer.module, BasisLayer) for layer in method.run.layers)
    assert any(layer.ranks[-1][1] < min(layer.form.rows, layer.form.cols) for layer in method.run.layers)
    results = [torch.load(folder / f"rank{rank}.pt")[name, layout] for rank in range(WORLD)]
    for state, layers, scalars in results:
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], results[0][0][key]) for key in state)
        ours, theirs = products(state), products(expected)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4, msg=key)
        assert {key: each["ranks"] for key, each in layers.items()} == {
            layer.name: [list(each) for each in layer.ranks] for layer in method.run.layers
        }
        assert scalars == pytest.approx(method.scalars(), rel=1e-4)
    method.export(model.eval(), tmp_path / "alone")
    files = {path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.*")}
    for rank in range(WORLD):
        place = folder / f"{name}-{layout}-{rank}"
        assert {path.relative_to(place) for path in place.rglob("*.*")} == files
