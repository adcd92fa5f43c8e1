"""Laws of the methods that condition chosen layers: which layers, what moves, what is left alone, state, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ortho_cli.errors import CheckpointError, TargetError, UsageError
from ortho_cli.linalg.nog import as_matrix, nearest_orthogonal
from ortho_cli.methods.matrix_parameters import matrix_parameters
from ortho_cli.methods.method import Context, Method
from ortho_cli.methods.skew_conv_layer import SkewConv2d
from ortho_cli.models.resnet_cifar import CifarResNet
from ortho_cli.recipe.methods import NOG, OLR, SOC, OrthogonalLoss, SpectralNorm
from ortho_cli.registry import resolve
from ortho_cli.training.recompute import recompute_activations

CONTEXT = Context(seed=0, total_steps=10, task="classify", base=None)
SECTIONS: dict[str, Any] = {
    "nog": NOG, "olr": OLR, "soc": SOC, "spectral_norm": SpectralNorm, "orthogonal_loss": OrthogonalLoss,
}  # fmt: skip
ON_GRADIENTS, ON_MODELS = ("nog", "olr", "orthogonal_loss"), ("soc", "spectral_norm")
VARIANTS: dict[str, dict[str, Any]] = {
    "nog": {}, "nog after": {"order": "after"}, "olr": {"floor": 0.1}, "soc": {}, "spectral_norm": {},
    "orthogonal_loss": {"penalty": 0.1}, "orthogonal_loss mean": {"penalty": 10.0, "penalty_form": "mean"},
}  # fmt: skip


class Net(nn.Module):
    """Layers of several kinds; `subspace` is a matrix that is called neither weight nor in a known layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.norm(self.stem(x)).relu()).tanh()
        return self.head(self.up(x).mean((2, 3)))


def network(channels_last: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def method(model: nn.Module, kind: str, targets: tuple[str, ...] = ("stem",), **keys: Any) -> Any:
    name = kind.split()[0]
    made: Method = resolve("methods", name)(
        SECTIONS[name](name=name, targets=targets, **{**VARIANTS.get(kind, {}), **keys})
    )
    made.prepare(model, CONTEXT)
    return made


def pictures(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(kind: str, steps: int = 4, **keys: Any) -> tuple[Net, Any]:
    model = network()
    own = method(model, kind, **keys)
    run(model, own, steps)
    return model, own


def run(model: nn.Module, own: Any, steps: int) -> None:
    claimed = own.param_groups(model)
    taken = {id(p) for group in claimed for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizer = torch.optim.SGD([{"params": rest}, *claimed], lr=0.05, momentum=0.9, weight_decay=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        optimizer.zero_grad()
        outputs = model(pictures())
        outputs.square().mean().backward()
        assert own.penalty(model, {}, outputs, "train") is None
        own.after_backward(model, optimizer, "train")
        optimizer.step()
        assert own.after_step(model, optimizer, step, "train") is False


def test_parameters_answer_to_their_layers() -> None:
    model = network()
    assert list(matrix_parameters(model)) == ["stem", "down", "up", "head"]
    weight_norm(model.down)
    torch.nn.utils.parametrizations.spectral_norm(model.head)
    model.up = nn.ParameterDict({"U": torch.ones(2, 3), "mu": torch.ones(3)})
    found = matrix_parameters(model)
    parts = [f"down.parametrizations.weight.original{index}" for index in (0, 1)]
    assert list(found) == ["stem", *parts, "up", "head"]
    assert found["head"].parameter is model.head.parametrizations.weight.original
    assert found["up"].parameter is model.up["U"]
    model.up = model.stem
    assert "up" not in matrix_parameters(model)  # a shared one counts once


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_start(kind: str) -> None:
    model, plain = network(), network()
    method(model, kind)
    same = torch.equal(model(pictures()), plain(pictures()))
    assert same == (kind.split()[0] in ON_GRADIENTS)


@pytest.mark.parametrize("kind", [kind for kind in VARIANTS if kind.split()[0] in ON_GRADIENTS])
def test_only_chosen_layers_move_otherwise(kind: str) -> None:
    model, _ = trained(kind, steps=1)
    plain = network()
    run(plain, Method(None), 1)
    differ = {key for key, value in model.state_dict().items() if not torch.allclose(value, plain.state_dict()[key])}
    assert differ == {"stem.weight"}


@pytest.mark.parametrize("kind", VARIANTS)
def test_state_goes_round_and_training_goes_on_bit_for_bit(kind: str) -> None:
    model, own = trained(kind, steps=2)
    again = network()
    restored = method(again, kind)
    restored.load_state(copy.deepcopy(own.state()))
    again.load_state_dict(model.state_dict(), strict=True)
    assert restored.state() == own.state() and restored.scalars() == own.scalars()
    run(model, own, 2)
    run(again, restored, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", ON_MODELS)
def test_a_seed_decides_the_start_and_nothing_else_does(kind: str) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        model = network()
        torch.manual_seed(seed + 17)
        resolve("methods", kind)(SECTIONS[kind](name=kind, targets=("stem",))).prepare(
            model, Context(seed=seed % 2, total_steps=1, task="classify", base=None)
        )
        return model.state_dict()

    first, second, third = state(0), state(2), state(1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts_and_types_train_alike(kind: str, dtype: torch.dtype, channels_last: bool) -> None:
    model = network(channels_last, dtype)
    own = method(model, kind, targets=("stem", "down"))
    run_in = pictures().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reference = copy.deepcopy(model).double().to(memory_format=torch.contiguous_format)
    other = copy.deepcopy(own) if kind.split()[0] in ON_MODELS else method(reference, kind, targets=("stem", "down"))
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for step in range(2):
        for net, how, stepper, images in (
            (model, own, optimizer, run_in), (reference, other, theirs, run_in.double()),
        ):  # fmt: skip
            stepper.zero_grad()
            net(images).square().mean().backward()
            if kind.split()[0] != "olr":  # whose groups are made before the optimizer
                how.after_backward(net, stepper, "train")
            stepper.step()
            how.after_step(net, stepper, step, "train")
    for mine, theirs_ in zip(model.parameters(), reference.parameters(), strict=True):
        assert mine.dtype == dtype
        assert torch.allclose(mine.double(), theirs_, atol=2e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("kind", SECTIONS)
def test_targets_that_choose_nothing_are_refused(kind: str) -> None:
    with pytest.raises(TargetError, match="'stam' matched 0 of 4 layers") as caught:
        method(network(), kind, targets=("stam",))
    assert "nearest names: stem" in str(caught.value.hint)
    with pytest.raises(TargetError, match="all of them excluded"):
        method(network(), kind, targets=("stem",), exclude=("stem",))
    assert resolve("methods", kind)(SECTIONS[kind](name=kind, targets=("s*", "down"))).chosen(network()) == {
        "s*": ["stem"], "down": ["down"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ON_GRADIENTS)
def test_frozen_and_replaced_layers(kind: str) -> None:
    model = network()
    model.stem.weight.requires_grad_(False)
    with pytest.raises(TargetError, match=f"{kind} chose 1 layers, none of which trains: stem"):
        method(model, kind)
    own = method(model, kind, targets=("stem", "down", "head"))
    assert own.notes == ["acts on 2 layers: down, head; 1 left out, frozen"]
    model.down.weight.requires_grad_(False)
    own.param_groups(model)
    assert own.closing_notes() == ["1 of 2 layers, first down, were frozen or replaced later"]
    own = method(network(), kind)
    with pytest.raises(TargetError, match=f"none of the 1 layers that {kind} chose trains any more") as caught:
        own.param_groups(network())
    assert caught.value.hint == f"put {kind} after the method that freezes or replaces them"


@pytest.mark.parametrize("first", ON_MODELS)
def test_gradients_of_what_another_method_put_there(first: str) -> None:
    """NOG and OLR act on the raw filter and on the original behind the norm, as in the paper's combinations."""
    model = network()
    method(model, first)
    nog, olr = method(model, "nog"), method(model, "olr", floor=0.0)
    raw = nog.matrices[0].parameter
    assert raw is olr.matrices[0].parameter and any(raw is p for p in model.stem.parameters())
    model(pictures()).square().mean().backward()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=1e6)
    nog.after_backward(model, optimizer, "train")
    assert torch.allclose(torch.linalg.svdvals(as_matrix(raw.grad)).max(), torch.ones(()), atol=1e-5)
    olr.after_backward(model, optimizer, "train")
    rates = {id(group["params"][0]): group["lr"] for group in optimizer.param_groups}
    assert sum(rate != 1e6 for rate in rates.values()) == olr.scalars()["accepted"]


def test_other_orthogonal_convolutions_are_refused() -> None:
    own = method(network(), "soc")
    with pytest.raises(CheckpointError, match="other orthogonal convolutions: down"):
        own.load_state({"passes": {"stem": 3, "down": 3}})


@pytest.mark.parametrize("kind", ON_MODELS)
def test_what_changes_as_it_runs_is_not_computed_twice(kind: str) -> None:
    """The norms would be followed between forward and its repetition, whose activations would be another layer's."""
    model = CifarResNet(20, 10, norm="group")
    recompute_activations(model)
    method(model, kind, targets=("conv1",), exclude=("layer**",))  # outside of the blocks
    with pytest.raises(UsageError, match=r"every batch to layer1\.0\.conv1 twice"):
        method(model, kind, targets=("layer1.0.conv1",))


def test_what_has_no_orthogonal_form_is_refused_with_the_reason() -> None:
    for target, reason in (("up", "a ConvTranspose2d, not a plain Conv2d"), ("head", "a Linear, not a plain Conv2d")):
        with pytest.raises(TargetError, match=f"layer '{target}': {reason}") as caught:
            method(network(), "soc", targets=(target,))
        assert caught.value.hint == f"leave it out: exclude {target}"
    model = nn.Sequential(SkewConv2d(3, 8, 3))
    with pytest.raises(TargetError, match="matched 0 of 0 layers"):
        method(model, "soc", targets=("0",))


def test_a_spectral_norm_is_one_and_torchs_own() -> None:
    model = network()
    before = model.down.weight.detach().clone()
    own = method(model, "spectral_norm", targets=("stem", "down", "up", "head"), iterations=3)
    for _ in range(60):
        model(pictures())
    for name in ("stem", "down", "head"):
        largest = torch.linalg.matrix_norm(as_matrix(model.get_submodule(name).weight.detach()), ord=2)
        assert largest.item() == pytest.approx(1, abs=1e-4)
    ratio = before / model.down.weight.detach()
    assert ratio.std() < 1e-3 * ratio.mean()
    assert own.scalars() == {"layers": 4.0}
    with pytest.raises(TargetError, match="computes its weight from others"):
        method(model, "spectral_norm")


@pytest.mark.parametrize("form", ["norm", "squared", "mean"])
def test_the_orthogonal_loss_is_a_term_of_the_loss(form: str) -> None:
    model, reference = network(), network()
    own = method(model, "orthogonal_loss", targets=("stem", "up"), penalty=0.3, penalty_form=form)
    model(pictures()).square().mean().backward()
    own.after_backward(model, torch.optim.SGD(model.parameters(), 0.1), "train")
    values = []
    for weight in (reference.stem.weight, reference.up.weight):
        matrix = as_matrix(weight)
        assert matrix.shape[0] <= matrix.shape[1]
        gap = matrix @ matrix.T - torch.eye(len(matrix))
        values.append({"norm": gap.norm(), "squared": gap.square().sum(), "mean": gap.square().mean() / 2}[form])
    penalty = 0.3 * torch.stack(values).sum()
    (reference(pictures()).square().mean() + penalty).backward()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)
    assert own.scalars() == {"penalty": pytest.approx(penalty.item(), rel=1e-5), "layers": 2.0}


def test_nearest_is_what_the_loss_is_zero_at() -> None:
    model = network()
    with torch.no_grad():
        model.stem.weight.copy_(nearest_orthogonal(model.stem.weight))
    own = method(model, "orthogonal_loss", penalty=1.0)
    model(pictures()).square().mean().backward()
    own.after_backward(model, torch.optim.SGD(model.parameters(), 0.1), "train")
    assert own.scalars()["penalty"] < 1e-5
