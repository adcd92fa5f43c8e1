"""Factoring a model: which layers, which ranks (against the paper's own numbers), first values, export."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.checkpoints.store import open_checkpoint
from ortho_cli.errors import CheckpointError, TargetError, UsageError
from ortho_cli.linalg.product import non_orthogonality, nuclear_norm
from ortho_cli.methods.factorized import FactorizedMethod
from ortho_cli.methods.factorized_export import dense_state, factored_state
from ortho_cli.methods.factorized_model import factorize_
from ortho_cli.methods.factorized_select import select_candidates
from ortho_cli.methods.method import Context
from ortho_cli.models.resnet_cifar import CifarResNet
from ortho_cli.recipe.methods import Factorized
from ortho_cli.recipe.models import Model
from ortho_cli.registry import resolve

CONTEXT = Context(0, 10, "classify", None)


def build(name: str, classes: int = 10) -> nn.Module:
    section: Any = TypeAdapter(Model).validate_python({"name": name})
    model: nn.Module = resolve("models", name)(section, classes, 3, 32)
    return model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(20, 10, 1).eval()


def prepared(model: nn.Module, **settings: Any) -> FactorizedMethod:
    method = FactorizedMethod(Factorized(name="factorized", **settings))
    method.prepare(model, CONTEXT)
    return method


RESNETS = [
    ("resnet20", 10, [0.0871, 0.2367, 0.6982, 2.076, 6.211, 18.61], 3.153),
    ("resnet32", 10, [0.0840, 0.2313, 0.6856, 2.042, 6.113, 18.32], 3.085),
    ("resnet56", 10, [0.0820, 0.2279, 0.6777, 2.021, 6.051, 18.14], 3.042),
    ("resnet110", 10, [0.0808, 0.2258, 0.6729, 2.008, 6.013, 18.03], 3.016),
    ("resnet32", 100, [0.0954, 0.2409, 0.6895, 2.029, 6.049, 18.11], 3.059),
]
RANKS = {
    0.037: [2, 4, 7], 0.111: [5, 11, 21], 0.333: [16, 32, 64], 1.0: [48, 96, 192], 3.0: [144, 288, 576],
    9.0: [432, 864, 1728],
}  # fmt: skip


@pytest.mark.parametrize(("name", "classes", "ratios", "square"), RESNETS)
def test_the_papers_ratios_of_resnets(name: str, classes: int, ratios: list[float], square: float) -> None:
    with torch.device("meta"):
        dense = count(build(name, classes))
        for (scale, ranks), ratio in zip(RANKS.items(), ratios, strict=True):
            model = build(name, classes)
            layers = on_meta(model, rank_scale=scale)
            assert sorted({layer.rank for layer in layers.values()}) == ranks
            assert f"{count(model) / dense:.4g}" == f"{ratio:.4g}" or count(model) / dense == pytest.approx(
                ratio, abs=5e-5
            )
        model = build(name, classes)
        on_meta(model, rank_scale=1.0, square=True)
        assert count(model) / dense == pytest.approx(square, abs=5e-4)


REFERENCE = [
    ("vgg19", 10, 0.02, 397_642), ("vgg19", 10, 0.05, 992_650), ("vgg19", 10, 0.1, 1_996_618),
    ("vgg19", 100, 0.02, 412_900), ("vgg19", 100, 0.05, 1_008_868), ("vgg19", 100, 0.1, 2_013_220),
    ("vgg19", 200, 0.02, 410_440), ("vgg19", 200, 0.05, 1_005_448), ("vgg19", 200, 0.1, 2_011_144),
    ("resnet32x2", 10, 0.02, 150_090), ("resnet32x2", 10, 0.05, 373_194), ("resnet32x2", 10, 0.1, 743_370),
    ("resnet32x2", 100, 0.02, 154_404), ("resnet32x2", 100, 0.05, 370_020), ("resnet32x2", 100, 0.1, 751_524),
    ("resnet32x2", 200, 0.05, 380_360), ("resnet32x2", 200, 0.1, 754_760), ("resnet32x2", 200, 0.15, 1_117_448),
    ("wrn", 10, 0.01667, 610_282), ("wrn", 10, 0.06667, 2_435_034),
]  # fmt: skip


@pytest.mark.parametrize(("name", "classes", "target", "parameters"), REFERENCE)
def test_the_papers_parameters_at_a_target_ratio(name: str, classes: int, target: float, parameters: int) -> None:
    with torch.device("meta"):
        model = build(name, classes)
        dense = count(model)
        on_meta(model, target_ratio=target, compat="paper")
        assert count(model) == parameters
        own = build(name, classes)
        on_meta(own, target_ratio=target)
        assert abs(count(own) - target * dense) <= abs(parameters - target * dense)


def on_meta(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """Without values, shapes are the same."""
    return factorize_(model, spectral=False, **settings)


def test_all_but_the_stem_and_the_head_are_factored() -> None:
    names = [each.name for each in select_candidates(build("resnet20"))]
    assert names == [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]
    names = [each.name for each in select_candidates(build("resnet32x2"))]
    assert len(names) == 32
    assert {"layer2.0.downsample.0", "layer3.0.downsample.0"} < set(names)
    assert len(select_candidates(build("vgg19"))) == 15
    assert len(select_candidates(build("wrn"))) == 27
    mixed = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 9))
    assert [each.name for each in select_candidates(mixed)] == ["1", "3"]
    assert [each.name for each in select_candidates(mixed, exclude=["3"])] == ["1"]
    assert [each.name for each in select_candidates(mixed, ["0", "4"])] == ["0", "4"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_language_model_is_no_layer_of_its_body(tied: bool) -> None:
    """Tied to the embedding it cannot be factored anyway; the body's last layer is not left dense in its place."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=tied)
    chosen = [each.name for each in select_candidates(GPT2LMHeadModel(config))]
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert chosen == [f"transformer.h.{block}.{part}" for block in range(2) for part in parts]


def test_choices_that_cannot_be() -> None:
    tied = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False))
    tied[2].weight = tied[0].weight
    with pytest.raises(TargetError, match="layer '0' is tied"):
        factorize_(tied, rank=2, targets=["*"])
    assert list(factorize_(tied, rank=2, targets=["1"])) == ["1"]
    with pytest.raises(TargetError, match="nothing to factor in a Sequential"):
        factorize_(nn.Sequential(nn.Linear(4, 4)), rank=2)
    with pytest.raises(TargetError, match="conv9"):
        factorize_(small(), rank=2, targets=["conv9"])
    with pytest.raises(UsageError, match=r"exactly one of rank, rank_scale and target_ratio .* found none"):
        factorize_(small())
    with pytest.raises(UsageError, match="found rank and target_ratio"):
        factorize_(small(), rank=2, target_ratio=0.1)
    with pytest.raises(UsageError, match="cannot be reached"):
        factorize_(small(), target_ratio=1e-4)


@pytest.mark.parametrize("square", [False, True])
def test_full_rank_leaves_a_model_as_it_is(square: bool) -> None:
    inputs = torch.randn(4, 1, 8, 8)
    model = small()
    before = model(inputs)
    factorize_(model, rank_scale=1.0, square=square)
    assert torch.allclose(model(inputs), before, rtol=0, atol=1e-4)


def test_a_spectral_start_is_balanced_and_the_nearest() -> None:
    dense = small()
    weight = dense.get_submodule("layer2.0.conv1").weight.detach().clone()
    layer = factorize_(dense, rank=5)["layer2.0.conv1"]
    u, vt = layer.factors()
    matrix = layer.form.to_matrix(weight)
    values = torch.linalg.svdvals(matrix)
    assert torch.allclose(u.T @ u, torch.diag(values[:5]), atol=1e-5)
    assert torch.allclose(vt @ vt.T, torch.diag(values[:5]), atol=1e-5)
    assert (matrix - u @ vt).norm().item() == pytest.approx(float(values[5:].norm()), rel=1e-5)
    assert all(value.item() < 1e-5 for value in non_orthogonality(u, vt))
    assert nuclear_norm(u, vt).item() == pytest.approx(((u.norm() ** 2 + vt.norm() ** 2) / 2).item(), rel=1e-5)


def test_overcomplete_factors_have_no_dead_components() -> None:
    """The paper's code leaves zeros in both factors, whose gradient is zero for ever; ours keep the product too."""
    inputs = torch.randn(4, 1, 8, 8)
    for compat in (None, "paper"):
        model = small()
        weight = model.get_submodule("layer2.0.conv1").weight.detach().clone()
        before = model(inputs)
        layer = factorize_(model, rank_scale=3.0, compat=compat)["layer2.0.conv1"]
        assert layer.rank == 288  # of a 96 x 48 matrix
        after = model(inputs)
        after.square().sum().backward()
        assert layer.U.grad is not None
        assert layer.VT.grad is not None
        dead = (layer.U.grad.abs().sum(0) == 0) & (layer.VT.grad.abs().sum(1) == 0)
        if compat is None:
            assert torch.allclose(after, before, rtol=0, atol=1e-4)
            assert torch.allclose(layer.weight, weight, atol=1e-5)
            assert not dead.any()
        else:
            assert int(dead.sum()) == 288 - 48
            assert not torch.allclose(layer.weight, weight, atol=1e-2)  # the kernel's entries are shuffled


def test_plain_starts_have_the_spreads_of_the_paper() -> None:
    conv = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(64, 128, 3), nn.Linear(8, 8))
    spreads = {
        None: ((2 / 90) ** 0.5, (2 / 192) ** 0.5),
        "kaiming": ((2 / 90) ** 0.5, (2 / 192) ** 0.5),
        "fan-in": ((2 / 576) ** 0.5,) * 2,
        "fan-out": ((2 / 1152) ** 0.5,) * 2,
        "uniform": (0.1 / 3**0.5,) * 2,
    }
    for start, (first, second) in spreads.items():
        model = nn.Sequential(*(type(m)(*_arguments(m)) for m in conv))
        layer = factorize_(model, rank=90, spectral=False, plain_start=start, targets=["1"])["1"]
        assert layer.U.std().item() == pytest.approx(first, rel=0.02)
        assert layer.VT.std().item() == pytest.approx(second, rel=0.02)
    words = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 500), nn.Linear(2, 2))
    layers = factorize_(words, rank=16, spectral=False, targets=["0", "1"])
    assert layers["0"].U.std().item() == pytest.approx(0.1, rel=0.02)
    assert layers["1"].U.abs().max().item() <= 0.1
    with torch.device("meta"):
        assert (build("vgg19").plain_start, build("wrn").plain_start) == ("fan-in", "fan-out")


def _arguments(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, layer.kernel_size[0]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def test_shared_layers_stay_shared_and_seeds_decide() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleList([nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared), nn.Linear(8, 2)])
    factorize_(model, rank=3)
    assert model[0][0] is model[1][0]
    draws = [factorize_(small(), rank=3, spectral=False, seed=seed)["layer1.0.conv1"].U for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("square", [False, True])
def test_the_export_loads_in_the_plain_model(square: bool, tmp_path: Path) -> None:
    inputs = torch.randn(4, 1, 8, 8)
    model = small()
    method = prepared(model, rank_scale=3.0, square=square, spectral=False)
    expected = model(inputs)
    method.export(model, tmp_path / "factorized")
    dense = small()
    _load(dense, tmp_path / "factorized" / "dense")
    assert torch.allclose(dense(inputs), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    again = small()
    ortho.load_factorized(again, tmp_path / "factorized" / "factors")
    assert torch.allclose(again(inputs), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def _load(model: nn.Module, folder: Path) -> None:
    from ortho_cli.checkpoints.reading import TensorReader

    with TensorReader() as reader:
        found: dict[str, Tensor] = {n: reader.read_copy(i) for n, i in open_checkpoint(folder).tensors.items()}
    model.load_state_dict(found)


def test_states_name_shared_layers_twice() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "head": nn.Linear(8, 2)})
    keys = set(model.state_dict())
    factorize_(model, rank=3, square=True)
    assert set(dense_state(model)) == keys
    assert {"a.U", "b.U", "a.VT", "head.weight"} < set(factored_state(model))
    assert not any(key.endswith(".M") for key in factored_state(model))


def test_the_method_tells_and_remembers() -> None:
    method = prepared(small(), rank_scale=0.111)
    assert method.notes == ["18 layers of rank 5 to 21: 269,434 -> 63,562 parameters (0.2359)"]
    said = method.scalars()
    assert said["nuclear_norm"] == pytest.approx(said["nuclear_bound"], rel=1e-4)
    assert said["non_orthogonality"] < 1e-4
    assert "effective_lr" not in said
    model = small()
    other = prepared(model, rank_scale=0.111)
    other.after_step(model, torch.optim.SGD(model.parameters(), 0.5), 0, "train")
    assert other.scalars()["effective_lr"] > 0
    method.load_state({**other.state(), "tensors": {}})
    assert method.scalars()["effective_lr"] == other.scalars()["effective_lr"]
    with pytest.raises(CheckpointError, match=r"layer1.0.conv1 is of ranks \[5\] there, \[3\] here"):
        prepared(small(), rank=3).load_state(other.state())


DOCUMENTED = (
    "factorized_model", "tensor_layers", "factorized_export", "factorized_select", "frobenius_decay", "sharded",
)  # fmt: skip


@pytest.mark.parametrize("module", DOCUMENTED)
def test_examples_in_the_documentation_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"ortho_cli.methods.{module}"))
    assert found.failed == 0
    assert found.attempted > 0
