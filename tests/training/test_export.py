"""`run.export`: an adapter for other tools at a run's end; what makes no sense is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import write
from typer.testing import CliRunner

from ortho_cli.checkpoints.adapters import read_adapter
from ortho_cli.cli.app import app
from ortho_cli.errors import RecipeError
from ortho_cli.methods.adapter_layer import adapter_layers
from ortho_cli.recipe.train import load_train
from ortho_cli.training.evaluate import restore_for_judging
from ortho_cli.training.run import train
from ortho_cli.training.session import open_session
from ortho_cli.training.state import last_checkpoint

SHORT = "{steps: 2, limit_batches: 2, threads: 1}"
HRA = "[{name: hra, rank: 2, targets: ['layers.0']}]"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train(load_train(write(folder, "base", train=SHORT, methods="[]", run="{dir: FOLDER}")))
    return folder / "base"


def recipe_of(tmp_path: Path, base: Path | None, export: str, **sections: str) -> Path:
    model = f"{{name: mlp, hidden: [32]{f', base: {base}' if base else ''}}}"
    run = f"{{dir: FOLDER, export: {export}}}"
    return write(tmp_path, "run", **{"model": model, "methods": HRA, "train": SHORT, "run": run, **sections})


def test_the_merged_model_is_the_trained_one(tmp_path: Path, base: Path) -> None:
    recipe = load_train(recipe_of(tmp_path, base, "[merged, peft]"))
    outcome = train(recipe)
    names = [Path(path).name for path in outcome.exports]
    assert names == ["hra", "merged", "peft-adapter"]
    session = open_session(recipe, judging=True)
    state = last_checkpoint(tmp_path / "run")
    assert state is not None
    restore_for_judging(session, state)
    (layer,) = adapter_layers(session.model).values()
    merged = load_file(tmp_path / "run" / "export" / "merged" / "model.safetensors")
    assert torch.allclose(merged["layers.0.weight"], layer.merged_weight(), atol=1e-6)
    base_state = last_checkpoint(base)
    assert base_state is not None
    before = load_file(base_state / "model.safetensors")
    assert not torch.equal(merged["layers.0.weight"], before["layers.0.weight"])
    assert set(merged) == set(before)
    config = json.loads((tmp_path / "run" / "export" / "peft-adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("HRA", None)
    assert list(read_adapter(tmp_path / "run" / "export" / "peft-adapter").layers) == ["layers.0"]


def test_a_finished_run_is_exported_later(tmp_path: Path, base: Path) -> None:
    path = recipe_of(tmp_path, base, "[]")
    assert [Path(each).name for each in train(load_train(path)).exports] == ["hra"]
    again = train(load_train(path, ["run.export=[merged]"]), resume=True)
    assert [Path(each).name for each in again.exports] == ["hra", "merged"]
    assert not list((tmp_path / "run" / "export").glob(".*"))  # nothing is left of what was on the way


@pytest.mark.parametrize(
    ("export", "methods", "said"),
    [
        ("[merged]", "[]", "run.export: is of adapters, and no method is one of hra, lora, peft"),
        ("[merged]", "[{name: gor, targets: linear, groups: 4}]", "is of adapters"),
        ("[kohya-lora]", HRA, "kohya-lora is for Stable Diffusion, and the model is mlp"),
        ("[merged-ldm]", HRA, "merged-ldm is for Stable Diffusion"),
        ("[merged]", HRA, "merged is made of the weights of model.base, and there is none"),
        ("[onnx]", HRA, "run.export"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_recipe(tmp_path: Path, export: str, methods: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_train(recipe_of(tmp_path, None, export, methods=methods))


def test_what_ortho_cannot_fold_is_refused_by_its_type(tmp_path: Path) -> None:
    methods = "[{name: peft, config: {peft_type: VERA, target_modules: [layers.0]}}]"
    with pytest.raises(RecipeError, match=r"methods\.peft is VERA, which ortho cannot fold"):
        load_train(recipe_of(tmp_path, Path("runs/base"), "[merged]", methods=methods))


def test_what_the_adapter_cannot_be_is_refused_before_training(tmp_path: Path, base: Path) -> None:
    both = "[{name: hra, rank: 2, targets: ['layers.0']}, {name: lora, rank: 2, targets: ['head']}]"
    recipe = load_train(recipe_of(tmp_path, base, "[peft]", methods=both))
    with pytest.raises(RecipeError, match=r"run\.export: peft: the recipe trains several adapters"):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_exports_are_uploaded_with_the_run(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    sent: dict[str, Any] = {}

    class Hub:
        """Stands in for the hub's client."""

        def create_repo(self, repo: str, **options: Any) -> None:
            sent["repo"] = repo

        def upload_folder(self, **options: Any) -> str:
            sent.update(options)
            return "https://hub/me/x"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    path = recipe_of(tmp_path, base, "[merged, peft]")
    result = CliRunner().invoke(app, ["train", str(path), "--push-to-hub", "me/x", "-q"])
    assert result.exit_code == 0, result.output
    root = tmp_path / "run"
    files = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    kept = set(filter_repo_objects(files, ignore_patterns=sent["ignore_patterns"]))
    assert {"export/merged/model.safetensors", "export/peft-adapter/adapter_config.json"} <= kept
