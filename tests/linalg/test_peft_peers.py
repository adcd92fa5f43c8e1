"""Our operators against PEFT's own merged weights, on tiny layers: the same numbers to 1e-5 relative in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from ortho_cli.linalg import (
    BlockRotation,
    Chain,
    Dora,
    Hadamard,
    Householder,
    Kronecker,
    LowRank,
    Operator,
    Rescale,
    Transposed,
    cayley,
    cayley_neumann,
    limit_skew,
    paired_start,
    skew_from_upper,
    skew_part,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own imports warn about packages it looks for
    peft = pytest.importorskip("peft")

# PEFT says these about odd ranks and about LoKr/LoHa sizes; neither concerns what is merged.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed"),
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
]

Params = dict[str, Tensor]
Build = Callable[[Params], Operator]


def linear(inputs: int = 24, outputs: int = 16) -> nn.Module:
    return nn.Linear(inputs, outputs)


def conv(inputs: int = 6, outputs: int = 10, kernel: int = 3) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, padding=1)


def merged_by_peft(layer: nn.Module, config: object, seed: int, spread: float = 0.4) -> tuple[Tensor, Tensor, Params]:
    """The matricised weight before and after PEFT's merge, and the adapter's tensors under their saved names."""
    torch.manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_()
    model = peft.get_peft_model(nn.Sequential(layer), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # Magnitudes and row factors stay positive; everything else leaves its start.
                positive = "magnitude" in name or "boft_s" in name
                noise = torch.rand_like(parameter) if positive else spread * torch.randn_like(parameter)
                parameter.copy_(parameter + noise if positive else noise)
    prefix = "base_model.model.0."
    saved = {key.removeprefix(prefix): value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
    before = layer.weight.detach().flatten(1).clone()
    after = model.merge_and_unload()[0].weight.detach().flatten(1)
    return before, after, saved


def assert_same(operator: Operator, before: Tensor, after: Tensor) -> None:
    assert float((after - before).norm() / before.norm()) > 0.05, "the adapter does too little to tell"
    ours = operator.apply(before)
    assert float((ours - after).norm() / after.norm()) < 1e-5
    exact = operator.to(torch.float64).apply(before.double())
    assert float((exact - after).norm() / after.norm()) < 1e-5


@pytest.mark.parametrize("rank", [2, 5, 8, 32])
@pytest.mark.parametrize("layer", [lambda: linear(48), conv], ids=["linear", "conv"])
def test_hra(layer: Callable[[], nn.Module], rank: int) -> None:
    config = peft.HRAConfig(r=rank, target_modules=["0"])
    before, after, saved = merged_by_peft(layer(), config, seed=rank)
    assert_same(Householder(saved["hra_u"]), before, after)


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_hra_gram_schmidt_of_independent_vectors(rank: int) -> None:
    config = peft.HRAConfig(r=rank, apply_GS=True, target_modules=["0"])
    before, after, saved = merged_by_peft(linear(), config, seed=rank)
    assert_same(Householder(saved["hra_u"], gram_schmidt=True), before, after)


@pytest.mark.parametrize("rank", [2, 8])
def test_paired_start_draws_the_same_numbers(rank: int) -> None:
    from peft.tuners.hra.layer import HRALinear

    base = nn.Linear(24, 3)
    torch.manual_seed(rank)
    theirs = HRALinear(base, "default", peft.HRAConfig(r=rank), r=rank).hra_u["default"].detach()
    torch.manual_seed(rank)
    assert torch.equal(paired_start(24, rank), theirs)
    assert torch.equal(paired_start(24, rank, torch.Generator().manual_seed(rank)), theirs)


def lora(saved: Params, scale: float) -> LowRank:
    return LowRank(saved["lora_B.weight"], saved["lora_A.weight"], scale)


@pytest.mark.parametrize("layer", [linear, conv, lambda: conv(kernel=1)], ids=["linear", "conv", "conv1x1"])
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_lora(layer: Callable[[], nn.Module], rslora: bool, dora: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, use_dora=dora, target_modules=["0"])
    before, after, saved = merged_by_peft(layer(), config, seed=3)
    operator: Operator = lora(saved, 6 / sqrt(4) if rslora else 6 / 4)
    if dora:
        operator = Dora(operator, saved["lora_magnitude_vector"])
    assert_same(operator, before, after)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora_on_a_transposed_weight(dora: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    config = peft.LoraConfig(r=4, lora_alpha=8, fan_in_fan_out=True, use_dora=dora, target_modules=["0"])
    before, after, saved = merged_by_peft(Conv1D(16, 24), config, seed=4)
    assert before.shape == (24, 16)
    inner: Operator = lora(saved, 2.0)
    assert_same(Transposed(Dora(inner, saved["lora_magnitude_vector"]) if dora else inner), before, after)


@pytest.mark.parametrize(
    ("layer", "effective"),
    [(linear, False), (conv, False), (conv, True)],
    ids=["linear", "conv", "conv-tucker"],
)
def test_loha(layer: Callable[[], nn.Module], effective: bool) -> None:
    config = peft.LoHaConfig(r=3, alpha=2, use_effective_conv2d=effective, target_modules=["0"])
    before, after, saved = merged_by_peft(layer(), config, seed=5, spread=1.0)
    assert ("hada_t1" in saved) == effective
    operator = Hadamard(
        *(saved[f"hada_w{half}"] for half in ("1_a", "1_b", "2_a", "2_b")),
        scale=2 / 3,
        t1=saved.get("hada_t1"),
        t2=saved.get("hada_t2"),
    )
    assert_same(operator, before, after)


@pytest.mark.parametrize("layer", [lambda: linear(36, 48), lambda: conv(12, 16)], ids=["linear", "conv"])
@pytest.mark.parametrize("both", [False, True], ids=["w1-whole", "w1-pair"])
@pytest.mark.parametrize("rank", [1, 16], ids=["w2-pair", "w2-whole"])
@pytest.mark.parametrize("effective", [False, True], ids=["flat", "tucker"])
def test_lokr(layer: Callable[[], nn.Module], both: bool, rank: int, effective: bool) -> None:
    config = peft.LoKrConfig(r=rank, alpha=2, decompose_both=both, use_effective_conv2d=effective, target_modules=["0"])
    before, after, saved = merged_by_peft(layer(), config, seed=6, spread=1.0)

    def factor(name: str) -> Tensor | tuple[Tensor, Tensor]:
        return saved[name] if name in saved else (saved[name + "_a"], saved[name + "_b"])

    is_conv = before.shape[1] > 36
    assert ("lokr_t2" in saved, "lokr_w1" in saved) == (is_conv and effective and rank == 1, not (both and rank == 1))
    operator = Kronecker(factor("lokr_w1"), factor("lokr_w2"), 2 / rank, t2=saved.get("lokr_t2"))
    assert_same(operator, before, after)


@pytest.mark.parametrize("layer", [linear, lambda: conv(8)], ids=["linear", "conv"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-blocks", "shared-block"])
@pytest.mark.parametrize("terms", [None, 1, 2, 3, 4, 5, 7])
def test_oft(layer: Callable[[], nn.Module], shared: bool, terms: int | None) -> None:
    settings = {"use_cayley_neumann": False} if terms is None else {"num_cayley_neumann_terms": terms}
    config = peft.OFTConfig(oft_block_size=8, r=0, block_share=shared, target_modules=["0"], **settings)
    before, after, saved = merged_by_peft(layer(), config, seed=7, spread=0.1)
    skew = skew_from_upper(saved["oft_R.weight"], 8)
    operator = BlockRotation(cayley(skew) if terms is None else cayley_neumann(skew, terms), shared=shared)
    if terms == 1:
        assert torch.equal(before, after)
        assert torch.equal(operator.apply(before), after)
    else:
        assert_same(operator, before, after)


def test_constrained_oft() -> None:
    config = peft.OFTConfig(oft_block_size=8, r=0, coft=True, eps=0.5, use_cayley_neumann=False, target_modules=["0"])
    before, after, saved = merged_by_peft(linear(), config, seed=8, spread=0.1)
    skew = skew_from_upper(saved["oft_R.weight"], 8)
    limited = limit_skew(skew, 0.5, each=True)
    assert float((limited - skew).norm()) > 0.1
    assert_same(BlockRotation(cayley(limited)), before, after)


@pytest.mark.parametrize("layer", [linear, lambda: conv(8)], ids=["linear", "conv"])
def test_boft_of_one_factor_is_a_block_rotation_and_row_factors(
    layer: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", False)  # else PEFT tries to compile a CUDA extension
    config = peft.BOFTConfig(boft_block_size=8, target_modules=["0"])
    before, after, saved = merged_by_peft(layer(), config, seed=9)
    rotation = BlockRotation(cayley(skew_part(saved["boft_R"][0]) / 2))
    assert_same(Chain((rotation, Rescale(saved["boft_s"]))), before, after)
