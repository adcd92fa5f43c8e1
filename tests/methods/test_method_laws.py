"""Laws of every method that puts an adapter into a model, over the registry: start, gradients, state, files, PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import gap
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli import registry
from ortho_cli.errors import CheckpointError
from ortho_cli.methods.adapter_layer import adapter_layers
from ortho_cli.methods.method import Context, Method
from ortho_cli.recipe.methods import HRA, PEFT, LoRA

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own imports warn about packages it looks for
    peft = pytest.importorskip("peft")

TARGETS = ("block.q", "block.v", "conv")
SUFFIXES = ["q", "v"]

HRAS: dict[str, dict[str, Any]] = {
    "hra": {"rank": 4, "penalty": 1e-2},
    "hra unsquared": {"rank": 4, "penalty": 1e-2, "penalty_form": "norm"},
    "hra all biases": {"rank": 4, "bias": "all"},
    "hra own biases": {"rank": 2, "bias": "hra_only"},
    "hra output": {"rank": 4, "side": "output"},
    "hra gram-schmidt": {"rank": 3, "gram_schmidt": True},
    "hra gram-schmidt output": {"rank": 3, "gram_schmidt": True, "side": "output"},
    "hra reflection": {"rank": 2, "gram_schmidt": True, "start": "reflection"},
    "hra soft": {"rank": 4, "eps": 1e-4},
}
LORAS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 6},
    "lora rslora": {"rank": 4, "alpha": 6, "rslora": True},
}
PEFTS: dict[str, dict[str, Any]] = {
    "oft": {"peft_type": "OFT", "oft_block_size": 4, "target_modules": SUFFIXES},
    "boft": {"peft_type": "BOFT", "boft_block_size": 4, "target_modules": SUFFIXES},
    "peft hra": {"peft_type": "HRA", "r": 4, "target_modules": SUFFIXES},
    "peft lora": {"peft_type": "LORA", "r": 4, "target_modules": SUFFIXES},
}
CONFIGS: dict[str, Any] = {
    **{name: HRA(name="hra", targets=TARGETS, **keys) for name, keys in HRAS.items()},
    **{name: LoRA(name="lora", targets=TARGETS, **keys) for name, keys in LORAS.items()},
    **{name: PEFT(name="peft", config=keys) for name, keys in PEFTS.items()},
}
OURS = [*HRAS, *LORAS]
NOT_THE_IDENTITY = {"hra reflection"}  # the paper's start; soft reflections are near it, not at it
NEAR = {"hra soft": 1e-4}


class Net(nn.Module):
    """A convolution, a block of Linear layers, a head: layers of several kinds, some of them not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.block = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("q", "k", "v")})
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x).flatten(2).flatten(1)[:, :24])
        return self.head(torch.tanh(self.block["q"](h)) * self.block["k"](h) + self.block["v"](h))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def pictures() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def made(name: str, seed: int = 0) -> tuple[Net, Method]:
    model, config = net(), CONFIGS[name]
    method: Method = registry.resolve("methods", config.name)(config)
    method.prepare(model, Context(seed, 10, "classify", None))
    return model, method


def trained(name: str, steps: int = 4) -> tuple[Net, Method]:
    model, method = made(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05, weight_decay=0.0)
    target = torch.randn(16, 5, generator=torch.Generator().manual_seed(2))
    for step in range(steps):
        optimizer.zero_grad()
        outputs = model(pictures())
        loss = (outputs - target).square().mean()
        penalty = method.penalty(model, {}, outputs, "train")
        (loss if penalty is None else loss + penalty).backward()
        method.after_backward(model, optimizer, "train")
        optimizer.step()
        assert not method.after_step(model, optimizer, step, "train")
    return model, method


def test_every_adapter_of_the_registry_is_under_these_laws() -> None:
    adapters = {name for name in registry.names("methods") if hasattr(registry.resolve("methods", name), "export")}
    own = {name for name in adapters if registry.resolve("methods", name).export is not Method.export}
    assert {"hra", "lora", "peft"} <= own
    assert {config.name for config in CONFIGS.values()} == {"hra", "lora", "peft"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_start_is_the_identity(name: str) -> None:
    model, method = made(name)
    difference = gap(model(pictures()), net()(pictures()))
    if name in NOT_THE_IDENTITY:
        assert difference > 0.1
        assert any("does not start at the identity" in note for note in getattr(method, "notes", []))
    else:
        assert difference < NEAR.get(name, 2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_its_own_parameters_train(name: str) -> None:
    before = net().state_dict()
    model, _ = trained(name)
    moved = {key for key, value in model.named_parameters() if value.grad is not None}
    assert moved == {key for key, value in model.named_parameters() if value.requires_grad} != set()
    biases = {"hra all biases": 5, "hra own biases": 3}.get(name, 0)
    kept = dict(_without_wrappers(model))
    changed = {key for key, value in before.items() if not torch.equal(kept[key], value)}
    assert len(changed) == biases and all(key.endswith("bias") for key in changed)
    assert gap(model(pictures()), net()(pictures())) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_state_goes_round_bit_for_bit(name: str) -> None:
    model, method = trained(name)
    again, restored = made(name, seed=7)
    restored.load_state(copy.deepcopy(method.state()))
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(pictures()), model(pictures()))
    assert restored.state() == method.state() and restored.scalars() == method.scalars()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_seed_decides_the_start_and_nothing_else_does(name: str) -> None:
    first, _ = made(name)
    torch.manual_seed(123)
    second, _ = made(name)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    if name in OURS:
        third, _ = made(name, seed=1)
        assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


@pytest.mark.parametrize("name", OURS)
def test_another_adapters_state_is_refused(name: str) -> None:
    _, method = made(name)
    state = method.state()
    state["ranks"]["block.k"] = 4
    with pytest.raises(CheckpointError, match=r"adapt different layers.*block\.k"):
        method.load_state(state)


@pytest.mark.parametrize("name", OURS)
def test_merged_equals_forward(name: str) -> None:
    model, _ = trained(name)
    plain = net()
    for key, layer in adapter_layers(model).items():
        owner: Any = plain.get_submodule(key)
        with torch.no_grad():
            owner.weight.copy_(layer.merged_weight())
    with torch.no_grad():
        for key, value in plain.named_parameters():
            if key.endswith("bias"):
                value.copy_(dict(_without_wrappers(model))[key])
    assert gap(plain(pictures()), model(pictures())) < 1e-5


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")  # PEFT's BOFT says so on every CPU,
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")  # and what it then does
@pytest.mark.parametrize("name", CONFIGS)
def test_the_export_is_the_model_in_peft_and_here(name: str, tmp_path: Path) -> None:
    model, method = trained(name)
    wanted = model.eval()(pictures())
    method.export(model, tmp_path / "export")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "export").eval()
    assert gap(theirs(pictures()), wanted) < 1e-5
    if name not in ("oft", "boft"):
        ours = ortho.load_adapter(net(), tmp_path / "export")
        assert gap(ours(pictures()), wanted) < 1e-5


@pytest.mark.parametrize("name", OURS)
def test_an_export_goes_on_training_as_if_never_left(name: str, tmp_path: Path) -> None:
    model, method = trained(name)
    method.export(model, tmp_path / "export")
    config = CONFIGS[name].model_copy(update={"adapter": str(tmp_path / "export")})
    unsaid = type(config).model_validate(
        {key: value for key, value in config.model_dump().items() if key in ("name", "adapter", "bias", "penalty")}
    )
    again = net()
    resumed: Method = registry.resolve("methods", config.name)(unsaid)
    resumed.prepare(again, Context(5, 10, "classify", None))
    assert gap(again(pictures()), model(pictures())) < 1e-5
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert resumed.state() == method.state()
    assert any("goes on with adapter export" in note for note in resumed.notes)  # type: ignore[attr-defined]
    assert all(not hasattr(layer.fixed_linear, "fixed_linear") for layer in adapter_layers(again).values())


def _without_wrappers(model: nn.Module) -> list[tuple[str, Tensor]]:
    plain = {name: name.replace(".fixed_linear", "").replace(".base_layer", "") for name, _ in model.named_parameters()}
    return [(plain[name], value) for name, value in model.named_parameters()]
