"""`whiten` puts whitening layers where norms were, with what these have learnt; `track_conditioning` watches layers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ortho_cli.errors import TargetError, UsageError
from ortho_cli.methods.method import Context
from ortho_cli.methods.track_conditioning import TrackConditioningMethod
from ortho_cli.methods.whiten import WhitenMethod, norm_widths, whitening_of
from ortho_cli.methods.whitening import Whitening
from ortho_cli.models.resnet_cifar import CifarResNet
from ortho_cli.recipe.methods import TrackConditioning, Whiten
from ortho_cli.training.recompute import recompute_activations


def network() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(8, 10, widths=(8, 12, 16))


def pictures(seed: int = 0, count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def context(build: Any = nn.Identity) -> Context:
    return Context(3, 4, "classify", None, build)


def tupled(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def whitened(model: nn.Module, **settings: Any) -> WhitenMethod:
    method = WhitenMethod(Whiten(name="whiten", **tupled(settings)))
    method.prepare(model, context())
    return method


def tracked(model: nn.Module, **settings: Any) -> TrackConditioningMethod:
    method = TrackConditioningMethod(TrackConditioning(name="track_conditioning", **tupled(settings)))
    method.prepare(model, context())
    assert method.param_groups(model) == []
    return method


def step(model: nn.Module, method: TrackConditioningMethod, index: int, *batches: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for batch in batches:
        model(batch).square().mean().backward()
    assert not method.after_step(model, optimizer, index, "train")


def test_the_first_norm_is_taken_unless_told() -> None:
    model = network()
    method = whitened(model)
    assert list(method.layers) == ["norm1"] and isinstance(model.norm1, Whitening)
    assert sum(isinstance(module, Whitening) for module in model.modules()) == 1
    assert method.notes == ["whitened in place of normalised: norm1"] and method.scalars() == {"layers": 1.0}
    again = whitened(model)  # the next one, which is not whitened yet
    assert list(again.layers) == ["layer1.0.norm1"]
    assert list(whitened(network(), exclude=["norm1"]).layers) == ["layer1.0.norm2"]
    named = whitened(network(), targets=["layer2.**", "layer3.0.norm2"], groups=4)
    assert len(named.layers) == 3 and named.layers["layer3.0.norm2"].groups == 4


def test_what_the_norm_learnt_stays() -> None:
    """One channel a group, with the statistics of the norm: evaluation is unchanged."""
    model = network()
    for seed in range(30):
        model(pictures(seed))
    with torch.no_grad():
        model.norm1.weight.mul_(1.5)
        model.norm1.bias.add_(0.5)
    weight = model.norm1.weight
    before = model.eval()(pictures(50))
    method = whitened(model, groups=8, ridge=model.norm1.eps)
    assert method.layers["norm1"].weight is weight and not method.layers["norm1"].training
    assert torch.allclose(model(pictures(50)), before, atol=1e-5)


def test_the_papers_form() -> None:
    model, plain = network(), network()
    layer = whitened(model, compat="paper", solver="mpa").layers["norm1"]
    assert layer.running_covariance is None and layer.running_whitening is not None
    assert layer.weight is not None and 0 < float(layer.weight.min().detach()) < float(layer.weight.max().detach()) < 1
    torch.manual_seed(7)
    assert torch.equal(whitened(plain, compat="paper").layers["norm1"].weight, layer.weight)  # type: ignore[arg-type]
    assert layer.solver == "mpa" and "running_whitening" in model.state_dict().__repr__()


def test_norms_of_other_kinds() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.BatchNorm2d(8, affine=False), nn.LayerNorm([6]))
    method = whitened(model, targets=["1", "2"])
    assert method.layers["1"].weight is not None and method.layers["2"].weight is None
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    with pytest.raises(TargetError, match=r"layer '3': a LayerNorm cannot be whitened"):
        whitened(model, targets=["3"])
    with pytest.raises(TargetError, match=r"8 channels do not divide into 3 groups") as caught:
        whitened(network(), groups=3)
    assert caught.value.hint == "groups: 2 divides them"
    with pytest.raises(TargetError, match="has no norms"):
        whitened(nn.Linear(2, 2))
    with pytest.raises(TargetError, match="matched 0 of"):
        whitened(network(), targets=["nrm1"])
    assert norm_widths(model)["3"] == (6,)


def test_a_batch_is_not_seen_twice() -> None:
    model = CifarResNet(20, 10, norm="group")
    recompute_activations(model)
    whitened(model)  # the first norm stands outside of the blocks
    with pytest.raises(UsageError, match=r"every batch to layer1\.0\.norm1 twice"):
        whitened(model, targets=["layer1.0.norm1"])


def test_a_norm_keeps_its_place_and_type() -> None:
    norm = nn.BatchNorm1d(6, dtype=torch.float64).eval()
    made = whitening_of(norm, groups=2, momentum=0.5)
    assert made.running_mean.dtype == torch.float64 and not made.training and made.momentum == 0.5
    assert made.weight is norm.weight and made.bias is norm.bias


def test_measurements_are_those_of_the_covariance() -> None:
    model = network().double()
    whitened(model, ridge=0.05)
    method = tracked(model, every=3)
    assert method.layers == ["norm1"]
    batches = [pictures(seed).double() for seed in (1, 2)]
    step(model, method, 0, *batches)  # two parts of one batch
    outputs = model.conv1(torch.cat(batches)).detach().transpose(0, 1).flatten(1)
    values = torch.linalg.eigvalsh(torch.cov(outputs, correction=0))
    found = method.scalars()
    assert found.pop("measured_at") == 1
    assert set(found) == {
        f"norm1/{key}" for key in ("lambda_max", "lambda_min", "condition", "condition_resolved", "rank",
                                   "effective_rank", "ridge")
    }  # fmt: skip
    assert found["norm1/lambda_max"] == pytest.approx(float(values[-1]))
    assert found["norm1/lambda_min"] == pytest.approx(float(values[0]))
    assert found["norm1/condition"] == pytest.approx(float((values[-1] + 0.05) / (values[0] + 0.05)))
    assert found["norm1/condition_resolved"] == pytest.approx(float(values[-1] / values[0]))
    shares = values / values.sum()
    assert found["norm1/effective_rank"] == pytest.approx(float((-shares * shares.log()).sum().exp()))
    assert (found["norm1/rank"], found["norm1/ridge"]) == (8.0, 0.05)


def test_only_due_steps_are_measured_and_never_evaluation() -> None:
    model = network()
    method = tracked(model, targets=["conv1", "fc"], every=3)
    measured = []
    for index in range(7):
        before = method.scalars()
        with torch.no_grad():
            model.eval()(pictures(100))
            model.train()
        step(model, method, index, pictures(index))
        measured.append(method.scalars() != before)
    assert measured == [True, False, True, False, False, True, False]
    assert method.scalars()["measured_at"] == 6


def test_all_phases_of_a_step_are_due_together() -> None:
    """A GAN's discriminator steps before its generator runs."""
    model = nn.ModuleDict({"d": nn.Linear(4, 3), "g": nn.Linear(4, 3)})
    method = TrackConditioningMethod(TrackConditioning(name="track_conditioning", targets=("d", "g"), every=3))
    method.prepare(model, Context(0, 9, "gan", None, nn.Identity, ("d", "g")))
    method.param_groups(model)
    measured: dict[str, list[int]] = {"d": [], "g": []}
    for index in range(7):
        for phase, layer in model.items():
            before = method.scalars()
            layer(torch.randn(8, 4))
            method.after_step(model, torch.optim.SGD(layer.parameters()), index, phase)
            if method.scalars() != before:
                measured[phase].append(int(method.scalars()["measured_at"]))
    assert measured == {"d": [1, 3, 6], "g": [1, 3, 6]}


def test_what_overflows_is_not_a_number_and_no_error() -> None:
    model = network()
    method = tracked(model, targets=["conv1"])
    step(model, method, 0, torch.full((2, 3, 8, 8), float("inf")))
    found = method.scalars()
    assert found["measured_at"] == 1 and math.isnan(found["conv1/condition"]) and math.isnan(found["conv1/rank"])
    json.dumps(method.state(), allow_nan=False)


def test_the_rank_of_a_first_convolution_is_that_of_its_patches() -> None:
    """27 numbers make 64 channels: 37 directions are empty, and only a ridge makes the condition finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64))
    method = tracked(model, targets=["0", "1"])
    step(model, method, 0, pictures(count=32))
    found = method.scalars()
    assert (
        found["0/rank"] == found["1/rank"] == 27 and found["0/lambda_min"] == 0 and found["0/condition"] == float("inf")
    )
    assert {key[1:] for key in found if key[0] == "0"} == {key[1:] for key in found if key[0] == "1"}
    assert found["0/condition"] == found["1/condition"] and found["0/effective_rank"] < 27  # out of one, into the other
    ridged = tracked(model, targets=["0"], ridge=1e-2)
    step(model, ridged, 0, pictures(count=32))
    found = ridged.scalars()
    assert found["0/condition"] == pytest.approx(found["0/lambda_max"] / 1e-2 + 1)


def test_the_side_can_be_chosen() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    batch = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    for of, rank in (("auto", 3.0), ("input", 5.0), ("output", 3.0)):
        method = tracked(model, targets=["0"], of=of)
        step(model, method, 0, batch)
        assert method.scalars()["0/rank"] == rank
    method = tracked(model, targets=["1"], of="output")  # rows of mean 0 and, but for eps, of equal length
    step(model, method, 0, batch)
    assert method.scalars()["1/rank"] == 2


def test_a_layer_that_is_replaced_later_is_followed() -> None:
    model = network()
    method = TrackConditioningMethod(TrackConditioning(name="track_conditioning"))
    method.prepare(model, context())
    whitened(model)
    method.param_groups(model)
    step(model, method, 0, pictures())
    assert method.scalars()["norm1/ridge"] == 0.01
    method.param_groups(model)  # asked again after parameters changed: nothing is counted twice
    assert len(model.norm1._forward_hooks) == 1


def test_what_is_planned_or_judged_is_not_watched() -> None:
    model = network()
    method = TrackConditioningMethod(TrackConditioning(name="track_conditioning"))
    method.prepare(model, context(None))
    method.param_groups(model)
    assert not model.norm1._forward_hooks
    with pytest.raises(TargetError, match="no norms whose input"):
        tracked(nn.Sequential(nn.Linear(2, 2)))


def test_measurements_go_round() -> None:
    model = network()
    method = tracked(model, targets=["conv1", "norm1"], every=2)
    again = tracked(network(), targets=["conv1", "norm1"], every=2)
    again.load_state(method.state())
    assert again.scalars() == {}
    step(model, method, 0, pictures())
    again.load_state(json.loads(json.dumps(method.state(), allow_nan=False)))
    assert again.scalars() == method.scalars() != {} and again._step == 1
