"""OIALR in anyone's loop: exact where it must be, and without the traps of the authors' trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapted import gap
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.errors import CheckpointError, NumericsError, TargetError, UsageError
from ortho_cli.methods.oialr_model import OIALR
from ortho_cli.methods.oialr_select import basis_candidates

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
}
NOW = {"when": "step", "delay": 3, "every": 2, "order": "all"}
WHOLE = {**NOW, "beta": 1e-6}  # converts and cuts nothing


def network(width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


def batch(step: int, width: int = 12) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(32, width, generator=torch.Generator().manual_seed(step))
    return inputs, torch.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2]], 1)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, run: Any = None, first: int = 0, steps: int = 12
) -> list[float]:
    losses = []
    for step in range(first, steps):
        inputs, targets = batch(step)
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run is not None:
            run.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_square_layers_go_on_exactly_as_dense_ones(name: str) -> None:
    """Gradient descent does not care how a space is turned, so conversion is invisible: momentum, decay and biases."""
    dense, ours = network(), network()
    expected = train(dense, OPTIMIZERS[name](dense.parameters()))
    optimizer = OPTIMIZERS[name](ours.parameters())
    run = ortho.oialr(ours, optimizer, **WHOLE)
    assert train(ours, optimizer, run) == pytest.approx(expected, rel=1e-4)
    assert sorted(run.converted) == ["0", "2"]
    for index in (0, 2, 4):
        assert gap(ours[index].weight, dense[index].weight) < 1e-4
        assert gap(ours[index].bias, dense[index].bias) < 1e-4


@pytest.mark.parametrize("moments", ["rotate", "zero"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_with_cores_and_biases(name: str, moments: str) -> None:
    model = network()
    biases = [model[index].bias for index in (0, 2)]
    optimizer = OPTIMIZERS[name](model.parameters())
    run = ortho.oialr(model, optimizer, **NOW, beta=0.4, moments=moments)
    train(model, optimizer, run, steps=3)
    before = [bias.detach().clone() for bias in biases]
    train(model, optimizer, run, first=3, steps=12)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(each) for each in held} == {id(each) for each in wanted} and len(held) == len(wanted)
    assert set(map(id, optimizer.state)) <= set(map(id, held))
    for index, bias, old in zip((0, 2), biases, before, strict=True):
        assert model[index].bias is bias and (bias - old).abs().max() > 1e-5
        assert model[index].rank < 12 and model[index].M.grad is not None
    for parameter, state in optimizer.state.items():
        for value in state.values():
            assert not isinstance(value, Tensor) or not value.dim() or value.shape == parameter.shape


def test_adams_averages_follow_the_basis() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    run = ortho.oialr(model, optimizer, **{**WHOLE, "delay": 4})
    train(model, optimizer, run, steps=3)
    state = copy.deepcopy(dict(optimizer.state[model[0].weight]))
    reference, updated = copy.deepcopy(model), None
    inputs, targets = batch(3)
    (reference(inputs) - targets).square().mean().backward()
    updated = state["exp_avg"].lerp(reference[0].weight.grad, 0.1)
    squares = 0.999 * state["exp_avg_sq"] + 0.001 * reference[0].weight.grad.square()
    train(model, optimizer, run, first=3, steps=4)
    layer, carried = model[0], optimizer.state[model[0].M]
    assert gap(carried["exp_avg"], layer.U.mT @ updated @ layer.VT.mT) < 1e-4
    assert gap(carried["exp_avg_sq"], layer.U.mT.square() @ squares @ layer.VT.mT.square()) < 1e-4
    assert carried["exp_avg_sq"].sum().item() == pytest.approx(squares.sum().item(), rel=1e-4)
    assert carried["step"].item() == 4


def test_a_cut_keeps_the_best_of_that_rank() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    run = ortho.oialr(model, optimizer, **NOW, cut="energy", beta=0.3)
    train(model, optimizer, run, steps=4)
    inputs, targets = batch(4)
    (model(inputs) - targets).square().mean().backward()
    optimizer.step()
    whole = model[0].weight.detach()
    run.step()
    rank = model[0].rank
    values = torch.linalg.svdvals(whole)
    lost = (model[0].weight - whole).norm()
    assert rank < 12 and lost.item() == pytest.approx(values[rank:].norm().item(), rel=1e-3, abs=1e-6)
    eye = torch.eye(rank)
    assert gap(model[0].U.mT @ model[0].U, eye) < 1e-5 and gap(model[0].VT @ model[0].VT.mT, eye) < 1e-5


def test_many_cuts_keep_the_basis_orthonormal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    run = ortho.oialr(model, optimizer, when="step", delay=1, every=1, order="all", cut="energy", beta=0.01)
    ranks = []
    for step in range(40):
        run.beta = 0.02 * (step + 1)
        optimizer.zero_grad()
        model(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        run.step()
        ranks.append(model[0].rank)
    assert len(set(ranks)) > 20 and ranks == sorted(ranks, reverse=True)
    assert gap(model[0].U.mT @ model[0].U, torch.eye(ranks[-1])) < 1e-5


def test_layers_convert_when_their_basis_has_settled() -> None:
    """One layer is held still; only that converts, after `patience` checks, and from `start_after` on."""
    model = network()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": 1.0}], 0.0)
    run = ortho.oialr(model, optimizer, every=2, threshold=0.999, patience=2, start_after=4, order="all", beta=1e-6)
    converted = []
    for step in range(12):
        train(model, optimizer, run, first=step, steps=step + 1)
        converted.append(sorted(run.converted))
    # The first check, after 4 steps, has nothing to compare with; those after 6 and 8 are stable.
    assert converted == [[]] * 7 + [["0"]] * 5
    assert run.layers[0].highest == pytest.approx(1.0) and run.layers[1].highest < 0.999
    assert run.highest == (run.layers[0].highest, "0")


def test_evaluation_counts_no_steps() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    run = ortho.oialr(model, optimizer, **NOW, beta=0.5)
    train(model, optimizer, run, steps=2)
    for mode in (False, True):
        model.train(mode)
        for step in range(10):
            model(batch(step)[0])
    assert run.steps == 2 and not run.converted


def test_delay_zero_converts_at_once_and_still_cuts() -> None:
    model = network()
    inputs = batch(0)[0]
    before = model(inputs)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    run = ortho.oialr(model, optimizer, when="step", delay=0, every=2, order="all", beta=0.4)
    assert sorted(run.converted) == ["0", "2"] and model[0].rank == 12
    assert gap(model(inputs), before) < 1e-5
    train(model, optimizer, run, steps=2)
    assert model[0].rank < 12


def test_ends_of_the_network() -> None:
    """A thin head stays dense by itself, and no other layer in its place."""
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(3)), nn.Linear(40, 3))
    for keep_first, keep_last, wanted in (
        (False, True, "012"), (False, False, "012"), (True, True, "12"),
    ):  # fmt: skip
        found = basis_candidates(model, keep_first=keep_first, keep_last=keep_last)
        assert "".join(each.name for each in found) == wanted
    model[3] = nn.Linear(40, 30)
    assert "".join(each.name for each in basis_candidates(model)) == "012"
    assert "".join(each.name for each in basis_candidates(model, keep_last=False)) == "0123"


def test_what_is_eligible() -> None:
    model = nn.ModuleDict({
        "embedding": nn.Embedding(20, 20), "thin": nn.Linear(30, 3), "conv": nn.Conv2d(3, 40, 1),
        "wide": nn.Conv2d(8, 4, 3), "depthwise": nn.Conv2d(8, 8, 3, groups=8), "up": nn.ConvTranspose2d(4, 4, 2),
        "still": nn.Linear(9, 9).requires_grad_(False), "plain": nn.Linear(9, 9), "last": nn.Linear(9, 9),
    })  # fmt: skip
    assert [each.name for each in basis_candidates(model)] == ["wide", "plain"]
    assert [each.name for each in basis_candidates(model, ["thin", "conv"])] == ["thin", "conv"]
    for name, reason in (("embedding", "an Embedding|a Embedding"), ("up", "no form"), ("still", "does not train")):
        with pytest.raises(TargetError, match=reason):
            basis_candidates(model, [name])
    with pytest.raises(TargetError, match="no layer"):
        basis_candidates(nn.Sequential(nn.Linear(9, 9)))


def test_the_order_from_the_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(21)), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    run = ortho.oialr(model, optimizer, every=1, threshold=0.5, patience=1, start_after=1, beta=1e-6, share=0.1)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        run.step()
        seen.append([int(name) for name in run.converted])
    # Two more layers each check; the first check has nothing to compare with, so the second converts four.
    assert seen[0] == [] and [sorted(each) for each in seen[1:]] == [
        [17, 18, 19, 20],
        [*range(15, 21)],
        [*range(13, 21)],
    ]


def test_convolutions_and_bfloat16() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    run = ortho.oialr(model, optimizer, **NOW, beta=0.3)
    pictures = torch.randn(8, 3, 8, 8).bfloat16()
    losses = []
    for _ in range(20):
        loss = (model(pictures) - pictures.mean((1, 2, 3))[:, None]).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step()
        losses.append(loss.item())
    assert sorted(run.converted) == ["0", "2"] and model[0].M.dtype == torch.bfloat16
    assert losses[-1] < losses[0] / 4


def test_state_restores_shapes_and_goes_on_alike() -> None:
    settings = {"every": 2, "threshold": 0.5, "patience": 1, "order": "all", "beta": 0.4}
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    run = ortho.oialr(model, optimizer, **settings)
    train(model, optimizer, run, steps=5)
    assert run.converted
    state = run.state()
    again = network()
    other = OIALR(again, **settings)
    other.load_state(copy.deepcopy(state))
    again.load_state_dict(model.state_dict())
    renewed = OPTIMIZERS["adamw"](each for each in again.parameters() if each.requires_grad)
    names = {name: parameter for name, parameter in again.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            renewed.state[names[name]] = copy.deepcopy(optimizer.state[parameter])
    other.optimizer = renewed
    assert train(again, renewed, other, first=5) == train(model, optimizer, run, first=5)
    assert str(other.state()) == str(run.state())
    with pytest.raises(CheckpointError, match="other layers under oialr: 2"):
        OIALR(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), keep_last=True).load_state(state)


def test_what_cannot_be_asked() -> None:
    model = network()
    with pytest.raises(UsageError, match="when"):
        OIALR(model, when="never")
    with pytest.raises(UsageError, match="holds none"):
        ortho.oialr(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
    with pytest.raises(UsageError, match="needs the optimizer"):
        OIALR(network()).step()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    run = ortho.oialr(model, optimizer, **NOW)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="layer 0 has values that are not finite"):
        run.check(optimizer, 3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_layers_of_transformers(name: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    if name == "bert":
        model = transformers.BertModel(
            transformers.BertConfig(vocab_size=30, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **small)
        )
        given: dict[str, Tensor] = {"input_ids": torch.arange(12).view(2, 6)}
    elif name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=30, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        model, given = transformers.GPT2Model(config), {"input_ids": torch.arange(12).view(2, 6)}
    else:
        model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=2, **small))
        given = {"pixel_values": torch.randn(2, 3, 8, 8)}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    run = ortho.oialr(model, optimizer, **WHOLE)
    for step in range(5):
        optimizer.zero_grad()
        model(**given).last_hidden_state.square().mean().backward()
        optimizer.step()
        before = model(**given).last_hidden_state.detach()
        run.step()
        if step == 2:
            assert gap(model(**given).last_hidden_state, before) < 1e-4
    kinds = {layer.form.kind for layer in run.layers}
    assert kinds == {"gpt2": {"conv1d"}, "bert": {"linear"}, "vit": {"linear", "conv"}}[name]
    assert len(run.converted) == {"gpt2": 7, "bert": 12, "vit": 13}[name]
