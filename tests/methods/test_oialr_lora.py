"""What OIALR changed, as a LoRA on its base: PEFT loads it, it is as wrong as it says, and bound to that base."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ortho_cli as ortho
from ortho_cli.checkpoints.adapters import base_bound, read_adapter
from ortho_cli.errors import CheckpointError, RecipeError, TargetError
from ortho_cli.methods.factorized_export import dense_state
from ortho_cli.methods.method import Context
from ortho_cli.methods.oialr import OIALRMethod
from ortho_cli.recipe.methods import OIALR

ONCE: dict[str, Any] = {"name": "oialr", "when": "step", "delay": 4, "every": 4, "order": "all", "beta": 0.2}


class Net(nn.Module):
    """Layers of each kind, biases with and without, a norm, a head, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(1))
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.body = nn.ModuleDict({"up": nn.Linear(54, 40), "down": nn.Linear(40, 24, bias=False)})
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = self.body["up"](self.stem(pictures).flatten(1)).tanh()
        out: Tensor = self.head(self.norm(self.body["down"](hidden))) * self.scale
        return out


def pictures(step: int) -> Tensor:
    return torch.randn(16, 1, 3, 3, generator=torch.Generator().manual_seed(step))


def trained(model: nn.Module, inputs: Any = pictures, steps: int = 8, **settings: Any) -> OIALRMethod:
    method = OIALRMethod(OIALR.model_validate({**ONCE, **settings}))
    method.prepare(model, Context(0, steps, "classify", "base"))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    for step in range(steps):
        optimizer.zero_grad()
        given = inputs(step)
        (model(given) - given.flatten(1)[:, :3]).square().mean().backward()
        optimizer.step()
        method.after_step(model, optimizer, step, "train")
    return method


def table(folder: Path) -> dict[str, dict[str, float]]:
    with (folder / "layers.csv").open(encoding="utf-8") as file:
        return {row.pop("layer"): {key: float(value) for key, value in row.items()} for row in csv.DictReader(file)}


def through_peft(folder: Path) -> nn.Module:
    found: nn.Module = peft.PeftModel.from_pretrained(Net(), folder).eval()
    found.base_model.model.load_state_dict(load_file(folder / "rest.safetensors"), strict=False)  # type: ignore[union-attr]
    return found


def test_at_full_rank_peft_computes_what_the_run_left(tmp_path: Path) -> None:
    model = Net()
    method = trained(model, lora_energy=1.0)
    assert sorted(method.run.converted) == ["body.down", "body.up", "stem"]
    method.export(model.eval(), tmp_path / "oialr")
    folder = tmp_path / "oialr" / "lora"
    torch.testing.assert_close(through_peft(folder)(pictures(9)), model(pictures(9)), rtol=1e-4, atol=1e-4)
    assert list(load_file(folder / "rest.safetensors")) == ["scale"]
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert sorted(config["modules_to_save"]) == ["head", "norm"]
    assert all(row["relative_error"] < 1e-4 for row in table(folder).values())
    assert {path.name for path in (tmp_path / "oialr").iterdir()} >= {"dense", "factors", "layers.csv", "lora"}


@pytest.mark.parametrize("rule", [{"lora_rank": 3}, {"lora_energy": 0.8}])
def test_it_is_as_wrong_as_it_says(rule: dict[str, Any], tmp_path: Path) -> None:
    model, before = Net(), Net()
    method = trained(model, **rule)
    method.export(model.eval(), tmp_path / "oialr")
    folder = tmp_path / "oialr" / "lora"
    merged = peft.PeftModel.from_pretrained(Net(), folder).merge_and_unload()
    rows, norms = table(folder), torch.zeros(2)
    for name, row in rows.items():
        now, base, said = (each.get_submodule(name).weight.detach().flatten(1) for each in (model, before, merged))
        change = now - base
        values = torch.linalg.svdvals(change)
        left_out = (now - said).norm()
        assert row["change"] == pytest.approx(float(change.norm()), rel=1e-4)
        assert row["left_out"] == pytest.approx(float(left_out), rel=1e-3)
        assert left_out <= values[int(row["rank"]) :].norm() * 1.01  # no LoRA of that rank is nearer
        norms += torch.stack([change.norm(), left_out]).square()
        if "lora_rank" in rule:
            assert row["rank"] == 3
        else:
            assert (
                row["relative_error"] ** 2 <= 0.2
                and values[int(row["rank"]) - 1 :].norm() ** 2 > 0.2 * change.norm() ** 2
            )
    overall = float((norms[1] / norms[0]).sqrt())
    adapter = read_adapter(folder)
    assert (
        base_bound(adapter) and adapter.method["relative_error"] == pytest.approx(overall, abs=1e-5) and overall > 0.1
    )
    for text in ((folder / "README.md").read_text("utf-8"), *method.closing_notes()[1:2]):
        assert f"it leaves out {overall:.1%} of what training changed" in text


def test_ortho_merges_it_into_its_base_and_no_other(tmp_path: Path) -> None:
    model, other = Net(), Net()
    method = trained(model, lora_energy=1.0)
    method.export(model, tmp_path / "oialr")
    with torch.no_grad():
        other.body["up"].weight.mul_(1.5)
    for name, net in (("base", Net()), ("other", other)):
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
    ortho.merge(tmp_path / "base.safetensors", [tmp_path / "oialr/lora"], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    for name, value in dense_state(model).items():
        if name != "scale":
            torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="base"):
        ortho.merge(tmp_path / "other.safetensors", [tmp_path / "oialr/lora"], tmp_path / "wrong.safetensors")


def test_what_converts_at_once_is_compared_with_the_very_base(tmp_path: Path) -> None:
    """Not with the product of its decomposition, which rounds."""
    model = Net()
    trained(model, delay=0, lora_energy=1.0).export(model.eval(), tmp_path / "oialr")
    torch.testing.assert_close(
        through_peft(tmp_path / "oialr/lora")(pictures(9)), model(pictures(9)), rtol=1e-3, atol=1e-3
    )
    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    ortho.merge(tmp_path / "base.safetensors", [tmp_path / "oialr/lora"], tmp_path / "merged.safetensors")


def test_layers_that_did_not_convert_are_in_it_too(tmp_path: Path) -> None:
    model = Net()
    method = trained(model, steps=2, lora_energy=1.0)
    assert not method.run.converted
    method.export(model.eval(), tmp_path / "oialr")
    torch.testing.assert_close(
        through_peft(tmp_path / "oialr/lora")(pictures(9)), model(pictures(9)), rtol=1e-3, atol=1e-3
    )
    assert "nothing converted" in method.closing_notes()[0] and "leaves out" in method.closing_notes()[1]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT asks transformers for it
def test_a_model_of_transformers(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")

    def made() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=30, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        found: nn.Module = transformers.GPT2Model(config)
        return found

    model = made()
    method = OIALRMethod(
        OIALR.model_validate({**ONCE, "delay": 2, "targets": ("**.c_attn", "**.c_proj"), "lora_energy": 1.0})
    )
    method.prepare(model, Context(0, 4, "classify", "base"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = torch.arange(12).view(2, 6)
    for step in range(4):
        optimizer.zero_grad()
        model(tokens).last_hidden_state.square().mean().backward()
        optimizer.step()
        method.after_step(model, optimizer, step, "train")
    method.export(model, tmp_path / "oialr")
    again = peft.PeftModel.from_pretrained(made(), tmp_path / "oialr/lora")
    expected = model(tokens).last_hidden_state
    torch.testing.assert_close(again(tokens).last_hidden_state, expected, rtol=1e-3, atol=1e-3)


def test_what_has_no_lora_is_refused_before_training() -> None:
    method = OIALRMethod(OIALR.model_validate({**ONCE, "lora_rank": 2}))
    with pytest.raises(RecipeError, match=r"model.base names none"):
        method.prepare(Net(), Context(0, 4, "classify", None))
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 8))
    with pytest.raises(TargetError, match="no LoRA for layer 0: a grouped convolution"):
        method.prepare(grouped, Context(0, 4, "classify", "base"))
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8))
    with pytest.raises(TargetError, match=r"projections of 0.self_attn"):
        method.prepare(attention, Context(0, 4, "classify", "base"))
    with pytest.raises(ValueError, match="another rule for the same rank"):
        OIALR.model_validate({**ONCE, "lora_rank": 2, "lora_energy": 0.5})
