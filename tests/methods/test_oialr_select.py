"""Which layers OIALR leaves alone: what a layer does beside its product would be lost with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import ortho_cli as ortho
from ortho_cli.errors import TargetError
from ortho_cli.linalg.subspace import stability
from ortho_cli.methods.method import Context
from ortho_cli.methods.oialr import OIALRMethod
from ortho_cli.methods.oialr_layer import SettlingLayer
from ortho_cli.methods.oialr_model import OIALR
from ortho_cli.methods.oialr_select import basis_candidates
from ortho_cli.recipe.methods import OIALR as Section


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))


def doubled(*given: Any) -> Any:
    return 2 * given[-1] if isinstance(given[-1], Tensor) else tuple(2 * each for each in given[-1])


def with_own_forward(layer: nn.Linear) -> None:
    plain = layer.forward
    layer.forward = lambda inputs: 2 * plain(inputs)  # type: ignore[method-assign]


CHANGES: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "forward hook": (lambda layer: layer.register_forward_hook(doubled), r"a hook \(doubled\)"),
    "hook before": (lambda layer: layer.register_forward_pre_hook(doubled), r"a hook \(doubled\)"),
    "backward hook": (lambda layer: layer.register_full_backward_hook(lambda *given: None), "a hook"),
    "own forward": (with_own_forward, "a forward of its own"),
    "pruned bias": (lambda layer: prune.l1_unstructured(layer, "bias", 4), "a bias that is computed"),
    "normed weight": (weight_norm, "no plain weight"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_does_more_is_refused_by_name(name: str) -> None:
    change, reason = CHANGES[name]
    model = network()
    change(model[0])
    with pytest.raises(TargetError, match=f"layer '0' is a .*{reason}"):
        basis_candidates(model, ["0", "2"])
    before = model(torch.ones(3, 12))
    run = OIALR(model, when="step", delay=0)
    assert sorted(run.converted) == ["2"] and list(run.refused) == ["0"]
    assert torch.allclose(model(torch.ones(3, 12)), before, atol=1e-5)


def test_a_hook_that_comes_later_is_refused_too() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = ortho.oialr(model, optimizer, when="step", delay=1, every=1, order="all")
    model[2].register_forward_hook(doubled)
    with pytest.raises(TargetError, match=r"layer '2' is a Linear with a hook \(doubled\)"):
        run.step()


def test_auto_says_what_it_refuses() -> None:
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(5)), nn.Linear(12, 2))
    weight_norm(model[1])
    model[3].weight = model[2].weight
    method = OIALRMethod(Section(name="oialr"))
    method.prepare(model, Context(0, 10**6, "classify", None))
    assert [each.name for each in method.run.layers] == ["0", "4"]
    (note,) = (note for note in method.notes if "stay dense" in note)
    assert note.startswith("3 layers stay dense, first 1: a ParametrizedLinear")
    named = OIALRMethod(Section(name="oialr", targets=("0",)))
    named.prepare(model, Context(0, 10**6, "classify", None))
    assert not any("stay dense" in note for note in named.notes)


@pytest.mark.parametrize("model", [nn.MultiheadAttention(8, 2), nn.Linear(8, 8)], ids=["attention", "linear"])
@pytest.mark.parametrize("keep_last", [False, True])
def test_a_layer_as_the_whole_model(model: nn.Module, keep_last: bool) -> None:
    with pytest.raises(TargetError, match="as the whole model") as caught:
        OIALR(copy.deepcopy(model), keep_last=keep_last)
    assert caught.value.hint == "wrap it in an nn.Sequential"
    assert OIALR(nn.Sequential(model), keep_last=False).layers


def test_delay_zero_converts_what_the_optimizer_holds() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model[2:].parameters(), 1e-3)
    run = ortho.oialr(model, optimizer, when="step", delay=0)
    assert sorted(run.converted) == ["2"] and isinstance(model[0], nn.Linear)
    assert sorted(OIALR(network(), when="step", delay=0).converted) == ["0", "2"]


def test_each_group_of_a_convolution_has_a_basis_of_its_own() -> None:
    """What is frozen is one basis a group: one group's strength against the other's does not move it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 12, 2, groups=2), nn.Flatten(), nn.Linear(12, 2))
    layer = SettlingLayer(basis_candidates(model)[0])
    weight = model[0].weight
    assert layer.measure().isnan()
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:6] *= 5
    assert stability(before, weight.detach()) < 0.99  # of the groups stacked
    assert layer.measure().item() == pytest.approx(1.0, abs=1e-6)
    before = weight.detach().clone()
    with torch.no_grad():
        weight[6:] = torch.randn(6, 2, 2, 2)
    parts = zip(before.chunk(2), weight.detach().chunk(2), strict=True)
    assert layer.measure().item() == pytest.approx(sum(stability(*each) for each in parts) / 2, abs=1e-6)
