"""The normalisation experiment: norms recorded in one run are those of another that replays them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ortho_cli.errors import CheckpointError, TargetError
from ortho_cli.methods.factorized_model import factorize_
from ortho_cli.methods.method import Context
from ortho_cli.methods.normalize import NormalizeMethod
from ortho_cli.recipe.methods import Normalize

STEPS = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.Linear(6, 8), nn.Linear(8, 2))
    factorize_(model, rank=2, targets=["0", "1", "2"], square=True)
    return model


def context(steps: int = STEPS) -> Context:
    return Context(3, steps, "classify", None, lambda section: nn.Identity())


def prepared(model: nn.Module, steps: int = STEPS, **settings: Any) -> NormalizeMethod:
    method = NormalizeMethod(Normalize(name="normalize", **settings))
    method.prepare(model, context(steps))
    return method


def trained(method: NormalizeMethod, model: nn.Module, *, first: int = 0, steps: int = STEPS) -> list[list[float]]:
    """Steps of noise; the norms after each."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    norms = []
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        assert not method.after_step(model, optimizer, step, "train")
        norms.append([layer.weight.norm().item() for layer in method.layers.values()])
    return norms


def recorded(folder: Path) -> list[list[float]]:
    model = network()
    method = prepared(model, mode="record")
    norms = trained(method, model)
    method.export(model, folder / "export" / "normalize")
    return norms


def test_norms_of_one_run_are_imposed_on_another(tmp_path: Path) -> None:
    norms = recorded(tmp_path / "run-3")
    torch.manual_seed(9)
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    method = prepared(model, mode="replay", source=str(tmp_path / "run-{seed}"))
    found = trained(method, model)
    assert torch.allclose(torch.tensor(found), torch.tensor(norms), rtol=1e-5)
    by_file = prepared(network(), mode="replay", source=str(tmp_path / "run-3/export/normalize/norms.safetensors"))
    assert by_file.layers.keys() == method.layers.keys()
    assert not (tmp_path / "none").exists()
    method.export(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_both_outer_factors_are_scaled_alike_and_off_does_nothing(tmp_path: Path) -> None:
    norms = recorded(tmp_path)
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    method = prepared(model, mode="replay", source=str(tmp_path))
    layer = method.layers["0"]
    u, vt = layer.U.detach().clone(), layer.VT.detach().clone()
    scale = (norms[0][0] / layer.weight.norm().item()) ** 0.5
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method.after_step(model, optimizer, 0, "train")
    assert torch.allclose(layer.U, u * scale)
    assert torch.allclose(layer.VT, vt * scale)
    model = network()
    prepared(model, mode="off").after_step(model, optimizer, 0, "train")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_recording_goes_on_where_it_stopped(tmp_path: Path) -> None:
    norms = recorded(tmp_path)
    model = network()
    first = prepared(model, mode="record")
    trained(first, model, steps=2)
    state = first.state()
    second = prepared(model, mode="record")
    second.load_state(state)
    trained(second, model, first=2)
    second.export(model, tmp_path / "again")
    replay = prepared(network(), mode="replay", source=str(tmp_path / "again" / "norms.safetensors"))
    assert torch.allclose(replay._norms, torch.tensor(norms), rtol=1e-6)


def test_recordings_that_do_not_fit(tmp_path: Path) -> None:
    recorded(tmp_path)
    with pytest.raises(CheckpointError, match="4 steps, this run 5"):
        prepared(network(), 5, mode="replay", source=str(tmp_path))
    with pytest.raises(CheckpointError, match="no recorded norms"):
        prepared(network(), mode="replay", source=str(tmp_path / "elsewhere"))
    other = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    factorize_(other, rank=2)
    with pytest.raises(CheckpointError, match="of other layers: 2"):
        prepared(other, mode="replay", source=str(tmp_path))
    with pytest.raises(TargetError, match="no factored layers"):
        prepared(nn.Linear(2, 2), mode="record")
    with pytest.raises(ValidationError, match="replay needs source"):
        Normalize(name="normalize", mode="replay")
