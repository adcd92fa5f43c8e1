"""The schema of training recipes: its keys and defaults, its JSON Schema, and that it changes nothing it is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from training_recipes import FORECAST, written

from ortho_cli.recipe.catalog import any_schema
from ortho_cli.recipe.methods import Method
from ortho_cli.recipe.models import Model
from ortho_cli.recipe.tasks import Task
from ortho_cli.recipe.train import TrainRecipe, load_train, recipe_data
from ortho_cli.registry import TABLES

# Section by section the defaults that people and papers' recipes rely on (CONTRACTS.md 4).
TASK = {"name": "classify", "label_smoothing": 0.0, "mixup": 0.0, "compat": None}
RESNET = {"norm": "batch", "groups": 32, "shortcut": "A", "compat": None, "base": None}
VIT = {"dim": 768, "mlp_ratio": 4.0, "dropout": 0.0, "base": None}
MODELS: dict[str, dict[str, Any]] = {
    "resnet20": RESNET, "resnet32": RESNET, "resnet44": RESNET, "resnet56": RESNET, "resnet110": RESNET,
    "resnet32x2": {"width": 1.0, "base": None},
    **{f"resnet{depth}": {"width": 1.0, "base": None} for depth in (18, 34, 50)},
    "vgg19": {"width": 1.0, "base": None},
    "wrn": {"depth": 28, "width": 10, "base": None},
    "vit-mini": {"patch": 8, "depth": 6, "heads": 6, "qkv_bias": False, **VIT},
    "vit-b16": {"patch": 16, "depth": 12, "heads": 12, "qkv_bias": True, **VIT},
    "mlp": {"hidden": [64, 64], "base": None},
    "hf-image": {"base": "org/name"},
    "timm": {"architecture": "resnetrs101", "drop_rate": 0.0, "base": None},
    "forecaster": {
        "patch": 8, "depth": 2, "heads": 8, "dim": 512, "mlp_ratio": 4.0, "moving_average": 25, "dropout": 0.0,
        "base": None,
    },
    "eigengan": {"basis": 6, "noise": 512, "base_channels": 16, "max_channels": 512, "base": None},
    "gan64": {"noise": 30, "width": 1.0, "base": None},
    "gan128": {"noise": 30, "width": 1.0, "base": None},
}  # fmt: skip
DATA = {
    "path": None, "source": None, "batch": 64, "augment": [], "classes": None, "workers": 0, "eval_batch": None,
    "size": None,
}  # fmt: skip
SERIES = {
    "path": None, "source": None, "columns": None, "shares": None, "judge": "test", "batch": 32, "eval_batch": None,
    "workers": 0,
}  # fmt: skip
DATA_SETS = ["digits", "mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet", "image-folder"]
METHODS: dict[str, dict[str, Any]] = {
    "hra": {
        "rank": 8, "targets": "auto", "exclude": [], "side": "input", "gram_schmidt": False, "start": "identity",
        "penalty": 0.0, "penalty_form": "squared", "bias": "none", "adapter": None, "eps": 0.0, "lr": None, "rates": {},
        "modules_to_save": [], "compat": None,
    },
    "lora": {
        "rank": 8, "alpha": None, "rslora": False, "targets": "auto", "exclude": [], "dropout": 0.0, "adapter": None,
        "lr": None, "rates": {}, "modules_to_save": [],
    },
    "gor": {
        "mode": "inter", "groups": 32, "min_filters": 4, "penalty": 0.01, "targets": "auto", "normalize": False,
    },
    "peft": {"config": {"peft_type": "OFT"}},
    "factorized": {
        "rank": None, "rank_scale": 0.1, "target_ratio": None, "targets": "auto", "exclude": [], "spectral": True,
        "attention": False, "square": False, "form": "factors", "plain_start": None, "compat": None,
    },
    "normalize": {"mode": "record", "source": None},
    "oialr": {
        "targets": "auto", "when": "stable", "every": 200, "threshold": 0.95, "patience": 2, "start_after": 0,
        "delay": 1000, "cut": "relative", "beta": 0.1, "keep_first": False, "keep_last": True, "order": "back",
        "share": 0.1, "moments": "rotate", "lora_rank": None, "lora_energy": None,
    },
    "track_stability": {"every": 200, "lag": 1, "targets": "auto"},
    "whiten": {
        "targets": "auto", "exclude": [], "groups": 1, "ridge": 0.01, "momentum": 0.1, "solver": "eigh", "compat": None,
    },
    "hessian": {"targets": ["x"], "exclude": [], "penalty": 1e-5, "directions": 2, "step": 0.1},
    "orojar": {"targets": ["x"], "exclude": [], "penalty": 1e-5, "directions": 2, "step": 0.1},
    "vp": {"penalty": 1e-5, "width": 4},
    "track_conditioning": {"targets": "auto", "exclude": [], "every": 10, "of": "auto", "ridge": None},
    "distill": {
        "teacher": "there", "model": None, "temperature": 4.0, "alpha": 0.9, "attention": [], "beta": 1000.0,
    },
    "nog": {"targets": ["conv1"], "exclude": [], "order": "before", "polar": "auto"},
    "olr": {"targets": ["conv1"], "exclude": [], "floor": 0.0},
    "soc": {"targets": ["conv1"], "exclude": [], "terms": 5, "eval_terms": 10},
    "spectral_norm": {"targets": ["conv1"], "exclude": [], "iterations": 1},
    "orthogonal_loss": {"targets": ["conv1"], "exclude": [], "penalty": 1.0, "penalty_form": "norm"},
    "frobenius_decay": {
        "penalty": 1e-4, "targets": ["**"], "exclude": [], "attention": False, "of": "product", "form": "auto",
    },
}  # fmt: skip
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0, "weight_decay": 0.0},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.0},
    "nag": {"momentum": 0.99, "weight_decay": 0.0},
    "adam": {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True},
    "adamw": {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    "muon": {"momentum": 0.95, "weight_decay": 0.1},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {}, "linear": {"hold": 0.0}, "cosine": {"floor": 0.0, "k_decay": 1.0},
    "multistep": {"at": [1], "factor": 0.1}, "inverse-sqrt": {"hold": 0}, "one-cycle": {},
}  # fmt: skip
TRAIN = {
    "epochs": 2, "steps": None, "seed": 0, "precision": "fp32", "accumulate": 1, "clip": None, "ema": None,
    "compile": False, "checkpoint_gradients": False, "limit_batches": None, "eval_every": 1, "eval_every_steps": None,
    "threads": None,
}  # fmt: skip
RUN = {
    "dir": "runs/x", "save_every": None, "save_every_steps": None, "keep": None, "best": None, "trackers": [],
    "log_every": 10, "samples_every": None, "samples_every_steps": None, "export": [],
}  # fmt: skip
REQUIRED = {
    "hf-image": "base: org/name", "timm": "architecture: resnetrs101", "peft": "config: {peft_type: OFT}",
    "factorized": "rank_scale: 0.1",
    **dict.fromkeys(("nog", "olr", "soc", "spectral_norm", "orthogonal_loss"), "targets: [conv1]"),
    **dict.fromkeys(("hessian", "orojar"), "targets: [x]"),
    "normalize": "mode: record", "distill": "teacher: there", "multistep": "at: [1]",
}  # fmt: skip


def given(name: str, more: str = "") -> str:
    return "{" + ", ".join(part for part in (f"name: {name}", more, REQUIRED.get(name, "")) if part) + "}"


def section(path: Path, key: str) -> Any:
    return recipe_data(load_train(path))[key]


def test_the_least_recipe(tmp_path: Path) -> None:
    recipe = load_train(written(tmp_path))
    assert recipe_data(recipe) == {
        "version": 1, "task": TASK, "model": {"name": "mlp", **MODELS["mlp"]}, "data": {"name": "digits", **DATA},
        "methods": [], "optimizer": {"name": "sgd", "lr": 0.1, "decay_norms": False, **OPTIMIZERS["sgd"]},
        "schedule": {"name": "constant", "warmup": 0, "warmup_ratio": None}, "train": TRAIN, "run": RUN, "matrix": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path: Path, name: str) -> None:
    others = FORECAST if name == "forecaster" else {"task": "{name: gan}"} if "gan" in name else {}
    assert section(written(tmp_path, **{**others, "model": given(name)}), "model") == {"name": name, **MODELS[name]}


@pytest.mark.parametrize("name", DATA_SETS)
def test_data(tmp_path: Path, name: str) -> None:
    where = "path: here" if name == "image-folder" else ""
    expected = {"name": name, **DATA} | ({"path": "here"} if where else {})
    assert section(written(tmp_path, data=given(name, where)), "data") == expected


def test_series(tmp_path: Path) -> None:
    for name in ("etth1", "etth2", "ettm1", "ettm2", "eeg", "series-csv"):
        where = {"path": "here.csv"} if name == "series-csv" else {}
        data = given(name, "path: here.csv" if where else "")
        assert section(written(tmp_path, **{**FORECAST, "data": data}), "data") == {"name": name, **SERIES, **where}
    assert section(written(tmp_path, **FORECAST), "task") == {
        "name": "forecast", "input": 96, "horizon": 96, "compat": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, f"methods: [{given(name)}]\n")
    assert section(path, "methods") == [{"name": name, **METHODS[name]}]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, optimizer=given(name, "lr: 1"))
    assert section(path, "optimizer") == {"name": name, "lr": 1.0, "decay_norms": False, **OPTIMIZERS[name]}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, f"schedule: {given(name, 'warmup_ratio: 0.5')}\n")
    assert section(path, "schedule") == {"name": name, "warmup": 0, "warmup_ratio": 0.5, **SCHEDULES[name]}


def test_best(tmp_path: Path) -> None:
    best = load_train(written(tmp_path, run="{dir: x, best: {}, keep: all}")).run.best
    assert best is not None
    assert best.model_dump() == {"metric": "eval/accuracy", "mode": "max", "patience": None}


def test_the_registry_and_the_schema_know_the_same_names() -> None:
    for table, union in (("models", Model), ("tasks", Task), ("methods", Method)):
        fields = [section.model_fields["name"] for section in get_args(get_args(union)[0])]
        assert set(TABLES[table]) == {name for field in fields for name in get_args(field.annotation)}
    assert set(TABLES["methods"]) <= set(METHODS)


def test_recipes_are_frozen_to_the_bottom(tmp_path: Path) -> None:
    recipe = load_train(written(tmp_path, "methods: [{name: gor}]\n"))
    for part, key in ((recipe, "version"), (recipe.train, "seed"), (recipe.methods[0], "penalty")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, 2)
    assert isinstance(recipe.methods, tuple)
    assert isinstance(recipe.model.hidden, tuple)


def test_an_adapter_shapes_itself(tmp_path: Path) -> None:
    """What an adapter brings along is not filled in with defaults that would contradict it, and odd ranks may go on."""
    path = written(tmp_path, "methods: [{name: hra, adapter: a, bias: all}, {name: lora, adapter: b, rank: 4}]\n")
    hra, lora = load_train(path).methods
    assert hra.model_dump() == {
        "name": "hra", "adapter": "a", "bias": "all", "lr": None, "rates": {}, "penalty": 0.0,
        "penalty_form": "squared", "modules_to_save": (), "compat": None,
    }  # fmt: skip
    own = {"lr": None, "rates": {}, "modules_to_save": ()}
    assert lora.model_dump() == {"name": "lora", "adapter": "b", "rank": 4, "dropout": 0.0, **own}
    assert load_train(written(tmp_path, "methods: [{name: hra, adapter: a, rank: 7}]\n")).methods[0].rank == 7


def test_gram_schmidt_takes_any_rank(tmp_path: Path) -> None:
    path = written(tmp_path, "methods: [{name: hra, rank: 7, gram_schmidt: true, start: reflection}]\n")
    assert load_train(path).methods[0].rank == 7


def properties(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        for key, inner in node.get("properties", {}).items():
            yield f"{where}.{key}", inner
        for key, inner in node.items():
            yield from properties(inner, f"{where}.{key}")


def test_every_key_is_described_in_one_line() -> None:
    found = dict(properties(json.loads(json.dumps(any_schema("train")))))
    assert len(found) > 100
    bare = [name for name, node in found.items() if not node.get("description", "").endswith(".")]
    assert bare == []
    assert not any("\n" in node["description"] for node in found.values())


def test_every_section_is_closed_and_described() -> None:
    for node in any_schema("train")["$defs"].values():
        assert node["additionalProperties"] is False
        assert node["description"]


def test_compat_names_are_in_the_schema() -> None:
    """`compat` is a named string a section; the names are listed by `ortho recipe schema`."""
    assert "paper-head" in json.dumps(any_schema("train")["$defs"]["ResNet"]["properties"]["compat"])


def test_built_in_python(tmp_path: Path) -> None:
    recipe = load_train(written(tmp_path, "methods: [{name: hra}]\n"))
    again = TrainRecipe(**{key: getattr(recipe, key) for key in TrainRecipe.model_fields})
    assert again == recipe
