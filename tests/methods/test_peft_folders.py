"""PEFT beside us: the same numbers from the same folder, in both directions, and the same gradients."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import gap, shaken
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.methods.add import insert_lora
from ortho_cli.methods.inject import set_biases

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own imports warn about packages it looks for
    peft = pytest.importorskip("peft")
Conv1D: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed"),
]


class Net(nn.Module):
    """A convolution, a block of Linear layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.block = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("q", "k", "v")})
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).flatten(2).flatten(1)[:, :24])
        return self.head(torch.tanh(self.block["q"](h)) * self.block["k"](h) + self.block["v"](h))


class Transposed(nn.Module):
    """GPT-2's kind of layer, square and not."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(36, 12), Conv1D(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_attn(x)[..., :12])


def pictures() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def shake_peft(model: nn.Module, spread: float = 0.3) -> nn.Module:
    """PEFT's adapter away from its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


HRA_TARGETS = [["q", "v"], ["q", "k", "v", "conv"]]


@pytest.mark.parametrize("targets", HRA_TARGETS, ids=str)
@pytest.mark.parametrize("gs", [False, True])
def test_peft_hra_folder_here(tmp_path: Path, targets: list[str], gs: bool) -> None:
    model = net()
    config = peft.HRAConfig(r=4, target_modules=targets, apply_GS=gs, init_weights=not gs)
    theirs = shake_peft(peft.get_peft_model(copy.deepcopy(model), config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ortho.load_adapter(copy.deepcopy(model), tmp_path / "theirs")
    x = pictures()
    assert gap(ours(x), theirs(x)) < 1e-5
    trained = {name.removesuffix(".hra_u").removesuffix(".hra_span"): p for name, p in ours.named_parameters()}
    (ours(x).square().sum()).backward()
    (theirs(x).square().sum()).backward()
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            layer = name.removeprefix("base_model.model.").removesuffix(".hra_u.default")
            assert gap(trained[layer].grad, parameter.grad) < (1e-4 if not gs else 1e-3)
            compared += 1
    assert compared == len(targets) == sum(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_lora_folder_here(tmp_path: Path, rslora: bool) -> None:
    model = net()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q", "v", "conv"], use_rslora=rslora, bias="lora_only",
        rank_pattern={"block.v": 2}, modules_to_save=["head"],
    )  # fmt: skip
    theirs = shake_peft(peft.get_peft_model(copy.deepcopy(model), config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ortho.load_adapter(copy.deepcopy(model), tmp_path / "theirs")
    x = pictures()
    assert gap(ours(x), theirs(x)) < 1e-5
    assert {n for n, p in ours.named_parameters() if p.requires_grad and "lora" not in n} == {
        "head.weight", "head.bias", "block.q.fixed_linear.bias", "block.v.fixed_linear.bias", "conv.fixed_linear.bias",
    }  # fmt: skip


FORMS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4},
    "gram-schmidt": {"rank": 3, "gram_schmidt": True},
    "reflection": {"rank": 3, "gram_schmidt": True, "start": "reflection"},
    "output": {"rank": 4, "side": "output"},
    "output gram-schmidt": {"rank": 2, "side": "output", "gram_schmidt": True},
    "soft": {"rank": 4, "eps": 0.1},
}


@pytest.mark.parametrize("form", FORMS)
def test_our_hra_folder_in_peft_and_back(tmp_path: Path, form: str) -> None:
    ours = shaken(ortho.add_adapter(net(), targets=["q", "v", "conv"], **FORMS[form]))
    ortho.save_adapter(ours, tmp_path / "ours")
    x = pictures()
    wanted = ours(x)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    assert gap(theirs(x), wanted) < 1e-5
    again = ortho.load_adapter(net(), tmp_path / "ours")
    assert gap(again(x), wanted) < (1e-6 if "gram" in form or form == "reflection" else 1e-12)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    bound = form in ("output", "output gram-schmidt", "soft")
    assert (config["peft_type"], config.get("apply_GS")) == (("LORA", None) if bound else ("HRA", form == "reflection"))
    assert (tmp_path / "ours" / "hra.safetensors").is_file() == bound
    # Back in the form it trains in: the same parameters, the same names.
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in ours.named_parameters() if p.requires_grad
    ]
    assert ortho.read_adapter(tmp_path / "ours").metadata.keys() >= {"ortho.base_fingerprint", "ortho.method"}


def test_a_gram_schmidt_folder_is_a_plain_chain_of_twice_the_rank(tmp_path: Path) -> None:
    ours = shaken(ortho.add_adapter(net().double(), targets=["q"], rank=3, gram_schmidt=True))
    folder = ortho.save_adapter(ours, tmp_path / "ours")
    adapter = ortho.read_adapter(folder)
    assert adapter.layers["block.q"].rank == 6 and adapter.config["apply_GS"] is False
    again = ortho.load_adapter(net().double(), folder)
    again.block["q"].form = ours.block["q"].form  # type: ignore[index,union-attr]
    x = pictures().double()
    assert gap(again(x), ours(x)) < 1e-12


@pytest.mark.parametrize("form", ["plain", "output", "gram-schmidt", "lora"])
def test_conv1d_folders(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    base = Transposed()
    ours = copy.deepcopy(base)
    if form == "lora":
        insert_lora(ours, 2, ["c_attn", "c_proj"])
    else:
        ortho.add_adapter(ours, targets=["c_attn", "c_proj"], **FORMS[form])
    shaken(ours)
    folder = ortho.save_adapter(ours, tmp_path / "ours")
    x = torch.randn(3, 12)
    wanted = ours(x)
    assert gap(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)(x), wanted) < 1e-5
    again = ortho.load_adapter(copy.deepcopy(base), folder)
    assert gap(again(x), wanted) < 1e-6
    assert {type(m).__name__ for m in again.children()} == {type(m).__name__ for m in ours.children()}
    assert getattr(again.c_proj, "side", None) == getattr(ours.c_proj, "side", None)


def test_our_lora_folder_in_peft_and_back(tmp_path: Path) -> None:
    ours = net()
    insert_lora(ours, 4, ["q", "conv"], alpha=6.0, rslora=True)
    insert_lora(ours, 2, ["v"])
    shaken(ours)
    folder = ortho.save_adapter(ours, tmp_path / "ours")
    x = pictures()
    assert gap(peft.PeftModel.from_pretrained(net(), folder)(x), ours(x)) < 1e-5
    assert gap(ortho.load_adapter(net(), folder)(x), ours(x)) < 1e-6


@pytest.mark.parametrize("bias", ["none", "hra_only", "all"])
def test_what_trains_beside_the_adapter_is_saved(tmp_path: Path, bias: str) -> None:
    ours = ortho.add_adapter(net(), 4, ["q", "v"])
    set_biases(ours, bias)
    for name, parameter in ours.named_parameters():
        if name.startswith("head.") or parameter.requires_grad:
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape))
    folder = ortho.save_adapter(ours, tmp_path / "ours")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == (bias, ["head"])
    x = pictures()
    assert gap(peft.PeftModel.from_pretrained(net(), folder)(x), ours(x)) < 1e-5
    again = ortho.load_adapter(net(), folder)
    assert gap(again(x), ours(x)) < 1e-6
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("form", ["plain", "output", "gram-schmidt"])
def test_a_folder_merges_into_the_file_as_the_model_merges(tmp_path: Path, form: str) -> None:
    from safetensors.torch import load_file, save_file

    ours = shaken(ortho.add_adapter(net(), targets=["q", "conv"], **FORMS[form]))
    folder = ortho.save_adapter(ours, tmp_path / "ours")
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    ortho.merge(tmp_path / "base.safetensors", [folder], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    for name in ("block.q", "conv"):
        assert torch.equal(merged[f"{name}.weight"], ours.get_submodule(name).merged_weight())  # type: ignore[operator]


def test_adapters_of_different_ranks_are_padded_for_peft(tmp_path: Path) -> None:
    ours = ortho.add_adapter(ortho.add_adapter(net(), 2, ["q"]), 6, ["v"])
    shaken(ours)
    folder = ortho.save_adapter(ours, tmp_path / "ours")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 6
    x = pictures()
    assert gap(peft.PeftModel.from_pretrained(net(), folder)(x), ours(x)) < 1e-5
