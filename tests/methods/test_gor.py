"""GOR on models: which layers it takes, and that training with it is training with the penalty in the loss."""

from __future__ import annotations

import copy
import doctest
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import ortho_cli as ortho
from ortho_cli.errors import TargetError, UsageError
from ortho_cli.linalg.group import group_penalty
from ortho_cli.methods import gor as gor_module
from ortho_cli.methods import gor_layers
from ortho_cli.methods.gor import GORMethod, gor_penalty
from ortho_cli.methods.gor_layers import select_layers
from ortho_cli.methods.method import Context
from ortho_cli.models.resnet_cifar import CifarResNet
from ortho_cli.recipe.methods import GOR
from ortho_cli.registry import resolve

CONTEXT = Context(seed=0, total_steps=10, task="classify", base=None)


class Net(nn.Module):
    """One layer of each kind, sizes that divide and do not, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.down = nn.Conv2d(16, 20, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(20, 8, 2, stride=2, groups=2)
        self.to_rgb = nn.Conv2d(8, 3, 1)
        self.head = nn.Linear(3, 11)
        self.lora_up = nn.Parameter(torch.randn(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_rgb(self.up(self.down(self.norm(self.stem(x)).relu()))).mean((2, 3))
        logits: Tensor = self.head(x) + self.lora_up[:11].sum(1)
        return logits


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def names(model: nn.Module, targets: str | Sequence[str], **options: int) -> list[str]:
    return [layer.name for layer in select_layers(model, targets, **options)[0]]


def method(model: nn.Module, **options: Any) -> GORMethod:
    made: GORMethod = resolve("methods", "gor")(GOR(name="gor", **options))
    made.prepare(model, CONTEXT)
    assert made.param_groups(model) == []
    return made


def naive(rows: Tensor, groups: int, min_filters: int = 4) -> Tensor:
    """Inter, as its definition says."""
    wanted = min(groups, len(rows) // min_filters)
    count = max(number for number in range(1, wanted + 1) if len(rows) % number == 0)
    total = torch.zeros(())
    for t in rows.reshape(count, -1, rows.shape[1]):
        gram = t.T @ t if t.shape[0] >= t.shape[1] else t @ t.T
        total = total + (gram - torch.eye(len(gram))).square().sum()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_golden_numbers_of_resnet110(norm: Any) -> None:
    torch.manual_seed(0)
    model = CifarResNet(110, 1000, norm=norm, shortcut="B")
    assert sum(p.numel() for p in model.parameters()) == 1_795_064
    assert gor_penalty(model).item() == pytest.approx(4239.944336, rel=1e-6)
    assert gor_penalty(model, mode="intra").item() == pytest.approx(4520.875488, rel=1e-6)
    layers, notes, skipped = select_layers(model)
    assert len(layers) == 111 and skipped == 0
    assert notes == [f"111 layers in {sum(layer.filters for layer in layers) // 4:,} groups"]


def test_golden_numbers_of_a_diffusion_lora_at_its_start() -> None:
    up = nn.ModuleDict({f"lora_up_{i}": nn.Linear(4, (1280, 640, 320)[i % 3], bias=False) for i in range(72)})
    for layer in up.values():
        nn.init.zeros_(layer.weight)
    assert gor_penalty(up, targets="linear").item() == 9216
    assert gor_penalty(up, mode="intra", targets="linear").item() == 6720


def test_a_weight_alone() -> None:
    weight = torch.ones(8, 3, 2, requires_grad=True)
    penalty = ortho.gor_penalty(weight, groups=2)
    assert penalty.item() == pytest.approx(naive(weight.flatten(1), 2).item())
    penalty.backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape
    assert gor_penalty(torch.ones(3, 5), min_filters=3).item() == pytest.approx(naive(torch.ones(3, 5), 1, 3).item())
    with pytest.raises(TargetError, match="3 filters") as caught:
        gor_penalty(torch.ones(3, 5))
    assert caught.value.hint == "use min_filters=3"
    with pytest.raises(TargetError, match="no filters"):
        gor_penalty(torch.ones(30))


def test_the_public_name_and_the_examples() -> None:
    assert ortho.gor_penalty is gor_penalty
    for module in (gor_module, gor_layers):
        tried = doctest.testmod(module)
        assert tried.attempted and not tried.failed


def test_kinds_choose_layers_and_say_what_they_leave() -> None:
    model = network()
    layers, notes, skipped = select_layers(model, "conv", groups=3)
    assert [(x.name, x.filters, x.count, x.wanted) for x in layers] == [
        ("stem", 16, 2, 3), ("down", 20, 2, 3), ("up", 8, 2, 2),
    ]  # fmt: skip
    assert skipped == 1
    assert notes == [
        "3 layers in 6 groups",
        "1 skipped, fewer than 4 filters: to_rgb (3)",
        "fewer groups than asked, to divide the filters evenly: stem (16 filters: 2 for 3), down (20 filters: 2 for 3)",
    ]
    assert names(model, "linear") == ["head"]
    assert names(model, "all") == ["stem", "down", "up", "head"]
    assert names(model, "all", min_filters=3) == ["stem", "down", "up", "to_rgb", "head"]
    model.stem.weight.requires_grad_(False)
    weight_norm(model.down)
    layers, notes, skipped = select_layers(model, "conv")
    assert [x.name for x in layers] == ["up"] and skipped == 3
    assert notes[1:] == [
        "1 skipped, frozen: stem",
        "1 skipped, weight computed by a parametrization: down",
        "1 skipped, fewer than 4 filters: to_rgb (3)",
    ]


def test_patterns_choose_layers_and_then_parameters() -> None:
    model = nn.ModuleDict({"enc": network(), "dec": network()})
    assert names(model, "stem") == ["enc.stem", "dec.stem"]
    assert names(model, ["dec.{up,down}", "enc.head"]) == ["enc.head", "dec.down", "dec.up"]
    assert names(model, ["**"]) == [f"{part}.{x}" for part in ("enc", "dec") for x in ("stem", "down", "up", "head")]
    assert names(model, [r"re:^enc\.(stem|up)$"]) == ["enc.stem", "enc.up"]
    assert names(model, ["re:lora_(B|up)"]) == ["enc.lora_up", "dec.lora_up"]
    assert names(model, "dec.lora_*") == ["dec.lora_up"]


def test_patterns_that_choose_nothing_are_refused() -> None:
    model = network()
    with pytest.raises(TargetError, match=r"pattern 'stam' matched 0 of 5 layers") as caught:
        select_layers(model, ["stem", "stam"])
    assert "nearest names: stem" in str(caught.value.hint)
    with pytest.raises(TargetError, match="matched 0 of 5") as caught:
        select_layers(model, [r"up.*_lora\.up"])  # the paper's expression, typed as a glob
    assert "a regular expression starts with 're:'" in str(caught.value.hint)
    with pytest.raises(TargetError, match=r"matched 0 of 5") as caught:
        select_layers(model, ["re:lora_upp"])
    assert "lora_up" in str(caught.value.hint)
    with pytest.raises(TargetError, match="'to_rgb' chose 1 layers, none to regularise: fewer than 4 filters"):
        select_layers(model, ["to_rgb"])
    with pytest.raises(UsageError, match="no regular expression"):
        select_layers(model, ["re:("])
    with pytest.raises(TargetError, match="has no such layer") as caught:
        gor_penalty(nn.Linear(8, 8))
    assert caught.value.hint == "it has 0 conv, 1 linear layers"
    with pytest.raises(TargetError, match="frozen"):
        select_layers(model.requires_grad_(False), "all")


def test_every_kind_of_layer_is_read_by_its_output_channels() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 8, 3), nn.Conv2d(4, 8, (1, 3), groups=2), nn.Conv3d(2, 4, 2), nn.ConvTranspose1d(3, 8, 2),
        nn.ConvTranspose2d(4, 8, 2, groups=2), nn.ConvTranspose3d(2, 5, 1), nn.Linear(3, 9), Conv1D(8, 5),
    )  # fmt: skip
    swapped = model[4].weight.view(2, 2, 4, -1).transpose(1, 2).reshape(8, -1)  # groups, in, out -> groups, out, in
    rows = [
        *(model[i].weight.flatten(1) for i in (0, 1, 2)), model[3].weight.transpose(0, 1).flatten(1), swapped,
        model[5].weight.transpose(0, 1).flatten(1), model[6].weight, model[7].weight.T,
    ]  # fmt: skip
    penalty = gor_penalty(model, groups=2, targets="all")
    expected = torch.stack([naive(matrix, 2) for matrix in rows]).sum()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
    by_loss = torch.autograd.grad(expected, [layer.weight for layer in model])
    gor = method(model, groups=2, targets="all", penalty=0.5)
    gor.after_backward(model, torch.optim.SGD(model.parameters(), 0.1), "train")
    for layer, gradient in zip(model, by_loss, strict=True):
        assert torch.allclose(layer.weight.grad, gradient / 2, rtol=1e-4, atol=1e-5)
        assert layer.bias.grad is None


def test_a_shared_weight_counts_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(4, 8)})
    model["b"].weight = model["a"].weight
    assert names(model, "linear") == ["a"]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["inter", "intra"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_is_that_of_the_penalty_in_the_loss(mode: str, accumulate: int, normalize: bool) -> None:
    model, images = network(), torch.randn(accumulate, 2, 3, 6, 6)
    reference = copy.deepcopy(model)
    options = {"groups": 4, "mode": mode, "targets": "all", "normalize": normalize}
    for batch in images:
        ((reference(batch).square().mean() + 0.3 * gor_penalty(reference, **options)) / accumulate).backward()
    gor = method(model, penalty=0.3, **options)
    for batch in images:
        (model(batch).square().mean() / accumulate).backward()
    assert gor.penalty(model, {}, None, "train") is None
    gor.after_backward(model, torch.optim.SGD(model.parameters(), 0.1), "train")
    assert_same(gradients(model), gradients(reference))
    scalars = gor.scalars()
    assert scalars["penalty"] == pytest.approx(0.3 * gor_penalty(reference, **options).item(), rel=1e-6)
    assert (scalars["layers"], scalars["layers_skipped"], scalars["layers_with_fewer_groups"]) == (4, 1, 1)


def test_with_a_gradient_scaler_the_step_is_that_of_plain_training() -> None:
    model, images = network(), torch.randn(2, 2, 3, 6, 6)
    reference = copy.deepcopy(model)
    plain = torch.optim.SGD(reference.parameters(), 0.05)
    for batch in images:
        ((reference(batch).square().mean() + 0.1 * gor_penalty(reference)) / 2).backward()
    plain.step()
    gor, optimizer = method(model, penalty=0.1), torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in images:
        scaler.scale(model(batch).square().mean() / 2).backward()
    scaler.unscale_(optimizer)
    gor.after_backward(model, optimizer, "train")
    scaler.step(optimizer)
    assert_same(dict(model.named_parameters()), dict(reference.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_get_half_gradients(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    expected = copy.deepcopy(model).float()
    (1e-2 * gor_penalty(expected)).backward()
    gor = method(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gor.after_backward(model, optimizer, "train")
    for name, gradient in gradients(expected).items():
        own = model.get_parameter(name).grad
        assert own is not None and own.dtype == dtype and torch.equal(own, gradient.to(dtype)), name
    gor.after_backward(model, optimizer, "train")  # onto what is there
    name, gradient = "stem.weight", gradients(expected)["stem.weight"]
    own = model.get_parameter(name).grad
    assert own is not None and torch.allclose(own.float(), 2 * gradient, rtol=2e-2, atol=1e-5)


def test_each_phase_gets_the_layers_its_optimizer_steps() -> None:
    model = nn.ModuleDict({"generator": network(0), "critic": network(1)})
    optimizers = {part: torch.optim.SGD(model[part].parameters(), 0.1) for part in model}
    gor = method(model, penalty=1.0)
    gor.after_backward(model, optimizers["critic"], "critic")
    assert {name.split(".")[0] for name in gradients(model)} == {"critic"}
    gor.after_backward(model, optimizers["generator"], "generator")
    expected = gor_penalty(model).item()
    assert gor.scalars()["penalty"] == pytest.approx(expected, rel=1e-6) and gor.scalars()["layers"] == 6


def test_layers_that_stop_training_are_left_alone_and_counted() -> None:
    model = network()
    gor = method(model)
    model.stem.weight.requires_grad_(False)
    model.down = nn.Conv2d(16, 20, 3, groups=2)  # as a method would that replaces layers
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert gor.param_groups(model) == []
    gor.after_backward(model, optimizer, "train")
    assert gradients(model).keys() == {"up.weight"} and gor.scalars()["layers"] == 1
    assert gor.closing_notes() == ["2 of 3 layers, first stem, were frozen or replaced later"]
    model.requires_grad_(False)
    assert gor.param_groups(model) == []  # as oialr may do in the middle of a run


def test_layers_that_a_later_method_replaces_are_missed_before_the_first_step() -> None:
    """The old modules still ask for gradients, but the model does not have them any more."""
    model = network()
    gor = method(model)
    assert gor.closing_notes() == []
    ortho.factorize_(model, rank=2, targets=["stem", "down", "up"])
    with pytest.raises(TargetError, match="none of the 3 layers that gor chose trains any more") as caught:
        gor.param_groups(model)
    assert "put gor after" in str(caught.value.hint)


def test_weights_kept_in_another_shape_are_refused() -> None:
    model = network()
    gor = method(model)
    model.stem.weight = nn.Parameter(model.stem.weight.detach().flatten())  # as flat sharding keeps them
    with pytest.raises(TargetError, match=r"weight stem is kept as \(432,\)") as caught:
        gor.after_backward(model, torch.optim.SGD(model.parameters(), 0.1), "train")
    assert "fsdp_version 2" in str(caught.value.hint)


def test_state_round_trips_through_json() -> None:
    model = network()
    gor = method(model)
    assert gor.scalars() == {} and gor.state() == {"values": {}, "regularised": {}}
    gor.after_backward(model, torch.optim.SGD(model.parameters(), 0.1), "train")
    other = method(network())
    other.load_state({**json.loads(json.dumps(gor.state())), "tensors": {}})
    assert other.scalars() == gor.scalars() and other.state() == gor.state()


@pytest.mark.parametrize("normalize", [False, True])
def test_training_makes_groups_orthonormal(normalize: bool) -> None:
    model = network()
    gor = method(model, penalty=1.0, groups=4, targets=("down",), normalize=normalize)
    optimizer = torch.optim.SGD([model.down.weight], 0.02)
    for _ in range(400):
        optimizer.zero_grad()
        gor.after_backward(model, optimizer, "train")
        optimizer.step()
    groups = model.down.weight.detach().view(4, 5, -1)
    gram = groups @ groups.mT
    if normalize:
        gram = gram / gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert torch.allclose(gram, torch.eye(5).expand(4, 5, 5), atol=1e-3)
    assert group_penalty([model.down.weight.flatten(1)], [4], normalize=normalize).item() < 1e-4
