"""Modules that train whole beside an adapter: chosen by pattern, saved in the folder, read by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from ortho_cli import registry
from ortho_cli.errors import TargetError
from ortho_cli.methods.method import Context
from ortho_cli.recipe.methods import HRA, LoRA

METHODS = {"hra": HRA, "lora": LoRA}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).relu())
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def prepared(name: str, **keys: object) -> tuple[Net, object]:
    model = net()
    section = METHODS[name].model_validate({"name": name, "rank": 2, "targets": ("body.1",), **keys})
    method = registry.resolve("methods", name)(section)
    method.prepare(model, Context(0, 1, "classify", None))
    return model, method


@pytest.mark.parametrize("name", METHODS)
def test_they_train_and_go_into_the_folder_that_peft_reads(name: str, tmp_path: Path) -> None:
    model, method = prepared(name, modules_to_save=("head",))
    training = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in training if not key.startswith("body.1.")} == {"head.weight", "head.bias"}
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if key in training:
            parameter.data.add_(torch.randn(parameter.shape))
    method.export(model, tmp_path / "adapter")  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    x = torch.randn(5, 6)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path / "adapter")(x), model(x))
    again, _ = prepared(name, adapter=str(tmp_path / "adapter"), modules_to_save=("head",))
    torch.testing.assert_close(again(x), model(x))
    assert {key for key, parameter in again.named_parameters() if parameter.requires_grad} == training


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        (("haed",), "pattern 'haed' matched 0"), (("head", "tail"), "pattern 'tail' matched 0"),
        (("body",), "module 'body' holds an adapter"), (("body.1",), "module 'body.1' holds an adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_whole_is_refused(name: str, patterns: tuple[str, ...], reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        prepared(name, modules_to_save=patterns)
