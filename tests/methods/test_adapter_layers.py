"""Laws of every adapted layer: the identity at the start, merged equals forward, every kind of layer or a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapted import OnlyMultiplies, gap, shaken
from torch import Tensor, nn

from ortho_cli.errors import NumericsError, TargetError
from ortho_cli.linalg.householder import Householder
from ortho_cli.linalg.lowrank import LowRank
from ortho_cli.methods.adapter_layer import AdapterLayer, adapter_layers, disable_adapter, geometry
from ortho_cli.methods.add import add_adapter, insert_lora
from ortho_cli.methods.hra_layer import HRALayer
from ortho_cli.methods.inject import freeze, wrap
from ortho_cli.methods.lora_layer import LoRALayer

Conv1D: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (3, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), (3, 5, 12)),
    "tall": (lambda: nn.Linear(4, 24), (7, 4)),
    "Conv1D": (lambda: Conv1D(8, 12), (3, 5, 12)),
    "strided dilated conv": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 6, 11, 11)),
    "conv of its own padding": (lambda: nn.Conv2d(6, 8, (1, 3), padding="same", padding_mode="reflect"), (2, 6, 7, 7)),
    "one picture": (lambda: nn.Conv2d(6, 8, 3), (6, 7, 7)),
    "1 x 1": (lambda: nn.Conv2d(6, 8, 1, bias=False), (2, 6, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 11)),
    "conv3d": (lambda: nn.Conv3d(2, 8, 2), (2, 2, 5, 5, 5)),
}
GROUPED = {
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, stride=2), (2, 6, 11, 11)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 5, 5)),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4},
    "output": {"rank": 4, "side": "output"},
    "gram-schmidt": {"rank": 2, "gram_schmidt": True},
    "gram-schmidt output": {"rank": 3, "gram_schmidt": True, "side": "output"},
    "reflection": {"rank": 2, "gram_schmidt": True, "start": "reflection"},
    "soft": {"rank": 2, "eps": 0.01},
    "soft output": {"rank": 2, "eps": 0.01, "side": "output"},
}
EXACT = dict(rtol=0, atol=1e-10)


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = {**LAYERS, **GROUPED}[name]
    return nn.Sequential(build()).double(), torch.randn(*shape, dtype=torch.float64)


def with_weight(layer: AdapterLayer, weight: Tensor) -> nn.Module:
    """The frozen layer with another weight."""
    base = copy.deepcopy(layer.fixed_linear)
    with torch.no_grad():
        base.weight.copy_(weight)
    return base


CASES = [(layer, adapter) for layer in LAYERS for adapter in ADAPTERS]
CASES += [(layer, adapter) for layer in GROUPED for adapter in ADAPTERS if "output" not in adapter]


@pytest.mark.parametrize(("layer", "adapter"), CASES)
def test_every_layer_and_every_adapter(layer: str, adapter: str) -> None:
    model, x = made(layer)
    before = model(x).detach()
    add_adapter(model, targets=["0"], **ADAPTERS[adapter])
    if adapter not in ("reflection", "soft", "soft output"):
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    shaken(model)
    adapted: Any = model[0]  # type: ignore[index]
    assert float((model(x) - before).detach().abs().max()) > 1e-3

    # One function, whichever form computes it: input with and without gradient, and no gradients at all.
    needs = x.clone().requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(needs), **EXACT)
    direction = torch.randn_like(before)
    one, other = (torch.autograd.grad(model(y), adapted.vectors, direction)[0] for y in (x, needs))
    torch.testing.assert_close(one, other, **EXACT)
    assert torch.autograd.grad(model(needs).sum(), needs)[0].abs().sum() > 0

    # Merged equals forward, the weight is W D or D^T W, and products with it need no weight of that kind.
    merged = adapted.merged_weight()
    torch.testing.assert_close(with_weight(adapted, merged)(x), model(x).detach(), **EXACT)
    columns = torch.randn(adapted.geometry.width, 3, dtype=torch.float64)
    matrix = merged.T if adapted.geometry.kind == "transposed" else merged.flatten(1)
    torch.testing.assert_close(adapted.times(columns).detach(), matrix @ columns, **EXACT)

    with disable_adapter(model):
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("layer", LAYERS)
def test_lora_on_every_layer(layer: str) -> None:
    model, x = made(layer)
    before = model(x).detach()
    insert_lora(model, 2, ["0"], alpha=6.0)
    assert torch.equal(model(x), before)
    shaken(model)
    adapted: Any = model[0]  # type: ignore[index]
    assert adapted.scale == 3.0
    torch.testing.assert_close(with_weight(adapted, adapted.merged_weight())(x), model(x).detach(), **EXACT)
    with disable_adapter(model):
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("layer", GROUPED)
def test_what_grouped_convolutions_cannot_take(layer: str) -> None:
    model, _ = made(layer)
    with pytest.raises(TargetError, match="layer 0: a grouped convolution, whose outputs see different inputs"):
        add_adapter(model, 2, ["0"], side="output")
    with pytest.raises(TargetError, match="layer 0: a grouped convolution, on which a LoRA"):
        insert_lora(model, 1, ["0"])
    assert not adapter_layers(model)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 3), "transposed convolution"),
        (nn.Embedding(4, 4), "a Embedding, which multiplies its input by no weight"),
        (type("Odd", (nn.Conv2d,), {"forward": lambda self, x: x})(4, 4, 1), "forward of its own"),
    ],
)
def test_layers_that_are_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        geometry(module)


def test_a_quantised_layer_is_only_multiplied() -> None:
    torch.manual_seed(0)
    base = OnlyMultiplies(nn.Linear(12, 8))
    plain = nn.Linear(12, 8)
    with torch.no_grad():
        plain.weight.copy_(base.weight * base.scale)
        plain.bias.copy_(base.bias)
    ours, wanted = nn.Sequential(base), nn.Sequential(plain)
    for side in ("input", "output"):
        for model in (ours, wanted):
            shaken(add_adapter(model, 4, ["0"], side=side))
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), wanted(x))
    one, other = (torch.autograd.grad(m(x).square().sum(), m[0].vectors)[0] for m in (ours, wanted))
    torch.testing.assert_close(one, other)
    with pytest.raises(TargetError, match="weight of a OnlyMultiplies cannot be read"):
        ours[0].merged_weight()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for build, shape in (LAYERS["linear"], LAYERS["strided dilated conv"], GROUPED["grouped"]):
        whole = nn.Sequential(build())
        half = copy.deepcopy(whole).to(dtype)
        for model in (whole, half):
            shaken(add_adapter(model, 4, ["0"]))
        x = torch.randn(*shape)
        found = half(x.to(dtype))
        assert found.dtype == dtype and half[0].vectors.dtype == torch.float32
        assert gap(found.float(), whole(x)) < 3e-2
        assert half[0].merged_weight().dtype == dtype
        gradients = []
        for model, y in ((whole, x), (half, x.to(dtype)), (half, x.to(dtype).requires_grad_())):
            gradients.append(torch.autograd.grad(model(y).float().square().sum(), model[0].vectors)[0])
        assert gap(gradients[1], gradients[0]) < 5e-2
        assert gap(gradients[2], gradients[0]) < 5e-2


@pytest.mark.parametrize("layer", ["linear", "Conv1D", "strided dilated conv", "grouped"])
def test_several_adapters_act_in_order(layer: str) -> None:
    model, x = made(layer)
    weight = model[0].weight.detach().clone()  # type: ignore[index]
    add_adapter(model, 2, ["0"], seed=1)
    if layer != "grouped":
        add_adapter(model, 2, ["0"], side="output", seed=2)
        insert_lora(model, 2, ["0"], seed=3)
    add_adapter(model, 2, ["0"], gram_schmidt=True, seed=4)
    shaken(model)
    outer: Any = model[0]  # type: ignore[index]
    chain, layer_ = [], outer
    while isinstance(layer_, AdapterLayer):
        chain.insert(0, layer_)
        layer_ = layer_.fixed_linear
    assert {type(each) for each in chain} <= {HRALayer, LoRALayer} and len(chain) == (2 if layer == "grouped" else 4)
    matrix = weight.T if outer.geometry.kind == "transposed" else weight.flatten(1)
    for each in chain:
        operator = each.operator()
        assert isinstance(operator, (Householder, LowRank))
        matrix = operator.apply(matrix)
    found = outer.merged_weight()
    found = found.T if outer.geometry.kind == "transposed" else found.flatten(1)
    torch.testing.assert_close(found, matrix, **EXACT)
    base: Any = copy.deepcopy(layer_)
    with torch.no_grad():
        base.weight.copy_(outer.merged_weight())
    torch.testing.assert_close(model(x).detach(), base(x).detach(), **EXACT)
    columns = torch.randn(outer.geometry.width, 3, dtype=torch.float64)
    torch.testing.assert_close(outer.times(columns).detach(), matrix @ columns, **EXACT)
    chain[0].enabled = False  # one of them off: as if it were not there
    assert not torch.allclose(model(x), base(x))
    with torch.no_grad():
        base.weight.copy_(outer.merged_weight())
    torch.testing.assert_close(model(x).detach(), base(x).detach(), **EXACT)


def test_only_the_adapter_gets_gradients() -> None:
    model, x = made("linear")
    add_adapter(model, 4, ["0"])
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == ["0.hra_u"]
    model(x).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == trains


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_state_dicts_round_trip_bit_for_bit(adapter: str) -> None:
    model, x = made("linear")
    add_adapter(model, targets=["0"], **ADAPTERS[adapter])
    shaken(model)
    again, _ = made("linear")
    add_adapter(again, targets=["0"], **ADAPTERS[adapter], seed=5)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(x), model(x))


def test_vectors_say_by_their_name_what_they_are() -> None:
    names = {}
    for adapter, keys in ADAPTERS.items():
        model, _ = made("linear")
        add_adapter(model, targets=["0"], **keys)
        names[adapter] = sorted(name.removeprefix("0.") for name in model.state_dict() if "hra" in name)
    assert names == {
        "plain": ["hra_u"],
        "output": ["hra_u_output"],
        "gram-schmidt": ["hra_span", "hra_start"],
        "gram-schmidt output": ["hra_span_output", "hra_start"],
        "reflection": ["hra_span"],
        "soft": ["hra_eps", "hra_soft"],
        "soft output": ["hra_eps", "hra_soft_output"],
    }


def test_the_frozen_start_stays_where_it_was() -> None:
    model, x = made("linear")
    add_adapter(model, 3, ["0"], gram_schmidt=True)
    layer: Any = model[0]  # type: ignore[index]
    start = layer.start.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.start, start)
    chain = layer.chain()
    assert chain.shape == (12, 6)
    plain = Householder(chain).apply(layer.fixed_linear.weight.detach())
    torch.testing.assert_close(layer.merged_weight(), plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(chain[:, 3:].T @ chain[:, 3:], torch.eye(3, dtype=torch.float64), **EXACT)


def test_vectors_that_cannot_reflect_are_refused() -> None:
    base = nn.Linear(6, 4)
    with pytest.raises(TargetError, match="length 5 on a layer whose input side is 6 wide"):
        HRALayer(base, torch.randn(5, 2))
    with pytest.raises(TargetError, match="length 6 on a layer whose output side is 4 wide"):
        HRALayer(base, torch.randn(6, 2), side="output")
    with pytest.raises(NumericsError, match="vector 1 of 2 is zero"):
        HRALayer(base, torch.tensor([[1.0, 0.0]] * 6))
    with pytest.raises(NumericsError, match="span 1 directions"):
        HRALayer(base, torch.ones(6, 2), span=True)
    with pytest.raises(TargetError, match=r"layer 0: rank 3 is odd"):
        add_adapter(nn.Sequential(base), 3, ["0"])
    with pytest.raises(TargetError, match=r"layer 0: rank 8 on a layer of width 6"):
        add_adapter(nn.Sequential(base), 8, ["0"])
    with pytest.raises(ValueError, match="start 'reflection'"):
        add_adapter(nn.Sequential(base), 2, ["0"], start="reflection")


def test_what_the_layer_lacks_is_the_frozen_layers() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2))
    add_adapter(model, 2, ["0"])
    layer: Any = model[0]
    assert (layer.stride, layer.out_channels, layer.weight.shape) == ((2, 2), 6, (6, 4, 3, 3))
    with pytest.raises(AttributeError, match="nonsense"):
        layer.nonsense  # noqa: B018
    assert "HRA rank=2, side=input" in repr(layer)
    assert copy.deepcopy(model)[0].vectors is not layer.vectors


@pytest.mark.parametrize("adapter", ["plain", "output", "gram-schmidt"])
@pytest.mark.parametrize("layer", ["linear", "linear without bias", "strided dilated conv"])
@pytest.mark.parametrize("needs", [False, True])
def test_what_follows_may_work_in_place(layer: str, adapter: str, needs: bool) -> None:
    model, x = made(layer)
    shaken(add_adapter(model, targets=["0"], **ADAPTERS[adapter]))
    x.requires_grad_(needs)
    wanted = torch.autograd.grad(model(x).relu().square().sum(), model[0].vectors)  # type: ignore[index]
    found = torch.autograd.grad(model(x).relu_().square().sum(), model[0].vectors)  # type: ignore[index]
    assert torch.equal(found[0], wanted[0])


def test_training_mode_and_further_arguments_reach_the_layer() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * (scale if self.training else 1.0)

    model = nn.Sequential(Scaled(4, 4))
    model.eval()
    add_adapter(model, 2, ["0"])
    layer: Any = model[0]
    assert not layer.training
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer.train()(x, scale=2.0), 2 * layer.eval()(x))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = made("linear")
    shaken(add_adapter(model, 4, ["0"]))
    x.requires_grad_()
    wanted = torch.autograd.grad(model(x).square().sum(), (x, model[0].vectors))  # type: ignore[index]
    output = checkpoint(model, x, use_reentrant=False)
    assert isinstance(output, Tensor)
    found = torch.autograd.grad(output.square().sum(), (x, model[0].vectors))  # type: ignore[index]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")  # dynamo's
@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("adapter", ["plain", "output", "gram-schmidt"])
@pytest.mark.parametrize("layer", ["linear", "strided dilated conv"])
def test_every_form_compiles_whole(layer: str, adapter: str, needs: bool) -> None:
    torch._dynamo.reset()
    model, x = made(layer)
    shaken(add_adapter(model, targets=["0"], **ADAPTERS[adapter]))
    x.requires_grad_(needs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), model[0].vectors)  # type: ignore[index]
    wanted = torch.autograd.grad(model(x).square().sum(), model[0].vectors)  # type: ignore[index]
    torch.testing.assert_close(found, wanted, **EXACT)


def test_freezing_leaves_adapters_that_train_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    add_adapter(model, 2, ["a"])
    wrap(model, ["b"], lambda name, base: HRALayer(base, torch.randn(4, 2)))
    freeze(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["a.hra_u", "b.hra_u"]


def test_a_layer_that_stands_twice_in_one_parent_is_adapted_in_both_places() -> None:
    layer = nn.Linear(8, 8)
    model = add_adapter(nn.Sequential(layer, nn.ReLU(), layer), rank=2, targets=["0"])
    assert isinstance(model[0], HRALayer) and model[2] is model[0]
