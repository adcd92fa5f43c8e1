"""The strength of adapters at run time: what the model computes is what a merge at that strength gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import shaken
from safetensors.torch import load_file, save_file
from test_adapter_layers import ADAPTERS, EXACT, LAYERS, made, with_weight
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.errors import TargetError, UsageError
from ortho_cli.methods.add import add_adapter, insert_lora
from ortho_cli.methods.strength import set_strength

ROTATIONS = {name: options for name, options in ADAPTERS.items() if "soft" not in name}
STRENGTHS = [0.3, 1.6, -1.0]


def adapted(layer: str, adapter: str) -> tuple[Any, Tensor]:
    model, x = made(layer)
    if adapter == "lora":
        insert_lora(model, 2, ["0"], alpha=6.0)
    else:
        add_adapter(model, targets=["0"], **ADAPTERS[adapter])
    return shaken(model).eval(), x


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("adapter", [*ROTATIONS, "lora"])
def test_forward_is_the_merge_at_that_strength(layer: str, adapter: str) -> None:
    model, x = adapted(layer, adapter)
    trained, kept = model(x).detach(), copy.deepcopy(model.state_dict())
    for strength in STRENGTHS:
        assert set_strength(model, strength) is model
        merged = model[0].merged_weight()
        found = model(x)
        torch.testing.assert_close(with_weight(model[0], merged)(x), found.detach(), **EXACT)
        mirror = adapter == "reflection" and strength == -1  # its own inverse
        assert mirror or float((found - trained).detach().abs().max()) > 1e-3
        columns = torch.randn(model[0].geometry.width, 3, dtype=torch.float64)
        matrix = merged.T if model[0].geometry.kind == "transposed" else merged.flatten(1)
        torch.testing.assert_close(model[0].times(columns).detach(), matrix @ columns, **EXACT)
        needs = x.clone().requires_grad_()
        torch.testing.assert_close(model(needs), found, **EXACT)
        assert torch.autograd.grad(model(needs).sum(), needs)[0].abs().sum() > 0
    assert torch.equal(set_strength(model, 0)(x), model[0].fixed_linear(x))
    assert torch.equal(set_strength(model, 1)(x), trained)
    found_state = model.state_dict()
    assert found_state.keys() == kept.keys() and all(torch.equal(found_state[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", ["hra", "lora"])
def test_the_same_numbers_as_ortho_merge(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
    save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    add_adapter(model, 4, ["0", "2"]) if kind == "hra" else insert_lora(model, 4, ["0", "2"])
    ortho.save_adapter(shaken(model), tmp_path / "adapter")
    strength = [0.7, "2=0.2"]
    ortho.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "m.safetensors", strength=strength)
    fresh = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
    x = torch.randn(9, 12)
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors"))
    wanted = fresh(x)
    fresh.load_state_dict(load_file(tmp_path / "base.safetensors"))
    found = ortho.set_strength(ortho.load_adapter(fresh, tmp_path / "adapter"), strength).eval()
    torch.testing.assert_close(found(x), wanted, rtol=0, atol=1e-5)


def test_layers_nothing_speaks_for_keep_theirs() -> None:
    model = shaken(add_adapter(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), 2, ["*"]))
    set_strength(model, 0.5)
    set_strength(model, "1=0.2")
    assert [layer.strength for layer in model] == [0.5, 0.2]
    set_strength(model, [1, "0=0.4"])
    assert [layer.strength for layer in model] == [0.4, 1.0]


def test_adapters_on_adapters_all_slide() -> None:
    model, x = adapted("linear", "plain")
    add_adapter(model, 2, ["0"], side="output")
    shaken(model, seed=3)
    insert_lora(model, 2, ["0"])
    set_strength(shaken(model, seed=4).eval(), 0.6)
    base = copy.deepcopy(model[0].fixed_linear.fixed_linear.fixed_linear)
    with torch.no_grad():
        base.weight.copy_(model[0].merged_weight())
    torch.testing.assert_close(base(x), model(x).detach(), **EXACT)
    assert torch.equal(set_strength(model, 0)(x), model[0].fixed_linear.fixed_linear.fixed_linear(x))


def test_new_vectors_and_types_are_followed() -> None:
    model, x = adapted("linear", "plain")
    before = set_strength(model, 0.5)(x).detach()
    shaken(model, seed=9)
    after = model(x).detach()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(with_weight(model[0], model[0].merged_weight())(x), after, **EXACT)
    other = copy.deepcopy(model)
    other.load_state_dict({name: t.flip(0) if "hra" in name else t for name, t in model.state_dict().items()})
    torch.testing.assert_close(with_weight(other[0], other[0].merged_weight())(x), other(x).detach(), **EXACT)
    torch.testing.assert_close(model.float()(x.float()), after.float(), rtol=0, atol=1e-5)


def test_half_precision_stays_close() -> None:
    model, x = adapted("linear", "plain")
    wanted = set_strength(model, 0.5)(x)
    model[0].fixed_linear.to(torch.bfloat16)
    found = model(x.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize("adapter", ["plain", "gram-schmidt", "lora"])
def test_values_written_through_data_are_followed(adapter: str) -> None:
    """As averages of weights write them: neither the version nor the place of a parameter changes."""
    model, x = adapted("linear", adapter)
    before = set_strength(model, 0.5)(x).detach()
    for parameter in model[0].adapter_parameters():
        parameter.data.copy_(parameter.data + torch.randn_like(parameter))
    after = model(x).detach()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(with_weight(model[0], model[0].merged_weight())(x), after, **EXACT)


@pytest.mark.parametrize("layer", ["linear", "strided dilated conv"])
@pytest.mark.parametrize("adapter", ["plain", "output", "lora"])
def test_in_evaluation_the_inputs_alone_get_gradients(layer: str, adapter: str) -> None:
    model, x = adapted(layer, adapter)
    model[0].fixed_linear.requires_grad_(False)
    set_strength(model, 0.5)
    assert not model(x).requires_grad
    columns = torch.randn(model[0].geometry.width, 2, dtype=torch.float64)
    assert not model[0].times(columns).requires_grad
    needs = x.clone().requires_grad_()
    model(needs).sum().backward()
    assert needs.grad is not None and all(p.grad is None for p in model[0].adapter_parameters())
    assert set_strength(model, 1)(x).requires_grad


@pytest.mark.parametrize("adapter", ["plain", "lora"])
@pytest.mark.parametrize("strength", [0, 0.5])
def test_training_wants_strength_one(adapter: str, strength: float) -> None:
    model, x = adapted("linear", adapter)
    set_strength(model.train(), strength)
    with pytest.raises(TargetError, match="cannot be trained"):
        model(x)
    with torch.no_grad():
        wanted = model(x)
    assert torch.equal(model.eval()(x), wanted)
    set_strength(model.train(), 1)(x).sum().backward()
    assert all(p.grad is not None for p in model[0].adapter_parameters())


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    with pytest.raises(TargetError, match="no adapter"):
        set_strength(nn.Linear(2, 2), 0.5)
    model = shaken(add_adapter(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), 2, ["0"]))
    add_adapter(model, 2, ["1"], eps=0.1)
    set_strength(model, 0)
    for strength, error, reason in (
        (0.5, TargetError, "soft"), ("nan", UsageError, "not finite"), ("7=0.5", TargetError, "matched 0 of 2"),
        ("0=x", UsageError, "not a number"),
    ):  # fmt: skip
        with pytest.raises(error, match=reason):
            set_strength(model, strength)
        assert [layer.strength for layer in model] == [0, 0]
    odd = shaken(add_adapter(nn.Sequential(nn.Linear(6, 6)), 3, ["0"], gram_schmidt=True, start="reflection"))
    with pytest.raises(TargetError, match="odd number"):
        set_strength(odd, 0.5)
    assert odd[0].strength == 1


def test_no_weight_is_copied() -> None:
    model = set_strength(shaken(add_adapter(nn.Sequential(nn.Linear(512, 512)), 4, ["0"])).eval(), 0.5)
    model(torch.randn(2, 512))
    turn = model[0]._part.of(model[0])
    assert sum(part.numel() for part in turn) < 512 * 512 / 50
    assert len(list(model.buffers())) == 0


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).tanh())
        return out


@pytest.fixture
def headed(tmp_path: Path) -> Path:
    """A folder with a base, and an adapter that brings a head of its own."""
    torch.manual_seed(0)
    model = Headed()
    save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    add_adapter(model, 2, ["body"])
    model.head.requires_grad_(True)
    torch.nn.init.normal_(shaken(model).head.weight)
    ortho.save_adapter(model, tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize("frozen", [False, True])
def test_whole_tensors_have_nothing_in_between(headed: Path, frozen: bool) -> None:
    model = Headed()
    model.load_state_dict(load_file(headed / "base.safetensors"))
    ortho.load_adapter(model, headed / "adapter").eval()
    if frozen:  # as for use: what was trained shows no longer
        model = copy.deepcopy(model.requires_grad_(False))
    x = torch.randn(5, 6)
    trained = model(x)
    for strength in (0, 0.5, [1, "head=0"]):
        with pytest.raises(TargetError, match="whole tensors of 'head'") as caught:
            set_strength(model, strength)
        assert "'head=1'" in (caught.value.hint or "")
        assert torch.equal(model(x), trained)
    for strength in ([0.5, "head=1"], "body=0.5", [0, "head=1"]):
        out = headed / "merged.safetensors"
        ortho.merge(headed / "base.safetensors", headed / "adapter", out, strength=strength, force=True)
        wanted = Headed()
        wanted.load_state_dict(load_file(out))
        torch.testing.assert_close(set_strength(model, strength)(x), wanted(x), rtol=0, atol=1e-6)
    assert torch.equal(set_strength(model, 1)(x), trained)


def test_biases_that_train_have_nothing_in_between() -> None:
    model = shaken(add_adapter(nn.Sequential(nn.Linear(6, 6)), 2, ["0"]))
    model[0].fixed_linear.bias.requires_grad_(True)
    with pytest.raises(TargetError, match="whole tensors of '0'"):
        set_strength(model, 0.5)
    assert set_strength(model, 1) is model
