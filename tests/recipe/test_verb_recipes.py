"""The schema of the verbs' recipes: what fits, what does not, and the way there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ortho_cli.errors import OutputError, RecipeError, UsageError
from ortho_cli.recipe.catalog import any_schema, load_any
from ortho_cli.recipe.parse import parse_yaml
from ortho_cli.recipe.verbs import TRAIN_KEYS, VERBS, VerbRecipe, load_verb, save_verb

FULL: dict[str, dict[str, Any]] = {
    "add-hra": {
        "checkpoint": "a b.safetensors", "output": "out", "rank": [8, "**.attn2.**=16"], "targets": ["**.{to_q,to_k}"],
        "exclude": ["mid.*"], "as": "checkpoint", "layout": "hra-repo", "gram_schmidt": True, "ema": "drop", "seed": 7,
        "max_shard_size": "5GB",
    },
    "factorize": {
        "checkpoint": "x", "output": "out", "rank": None, "rank_scale": None, "target_ratio": None,
        "energy": None, "max_error": None, "budget": 0.5, "budget_unit": "flops", "calibrate": "t.txt", "samples": 64,
        "targets": ["**"], "exclude": ["mid.*"], "as": "dense", "method": "svd", "report": "pictures",
    },
    "merge": {
        "base": "org/name@rev:file", "adapters": [{"path": "1e-4"}, {"path": "b=0.3", "strength": -0.5}],
        "output": "out.safetensors", "strength": [0.7, "up_blocks.**=.3", "a=b=-1.5e-2"], "exact": True,
        "dtype": "bf16", "max_shard_size": "500MB", "keep_undo": "undo.safetensors",
    },
    "unmerge": {
        "merged": "m", "adapters": [{"path": "b", "strength": 2.0}], "output": "out", "undo": None, "strength": 0.5,
        "exact": True, "max_shard_size": "500MB",
    },
    "combine": {
        "adapters": [{"path": "a", "strength": 0.3}, {"path": "b"}], "output": "out", "mode": ["slerp", "ties"],
        "rank": [8, "**.attn2.**=16"], "base": "x", "density": 0.2, "restore_angles": True, "seed": 7,
    },
    "extract": {
        "base": "x", "tuned": "y", "output": "out", "kind": "both", "rank": [8, "**.attn2.**=16"], "energy": None,
        "targets": ["**"], "exclude": ["mid.*"],
    },
    "convert": {"input": "x", "output": "y.safetensors", "to": "kohya-lora", "base": "z", "strength": [0.5]},
    "analyze-stability": {
        "series": ["run", "step*.safetensors"], "output": "out", "revisions": "step*", "lag": [1, 5],
        "reference": None, "top_rank": 8, "threshold": 0.9, "patience": 3, "targets": ["**.attn.**"],
        "exclude": ["mid.*"], "split_qkv": True, "split_heads": 12, "fail_below": 0.5, "fail_above": 1.0,
        "device": "cuda:0", "format": ["svg", "pdf"],
    },
    "analyze-orthogonality": {
        "checkpoint": "x", "output": "out", "groups": 4, "targets": ["**"], "exclude": ["mid.*"], "metric": "coherence",
        "fail_above": 0.5, "fail_below": 0.0, "format": ["json"],
    },
    "analyze-adapter": {
        "base": "x", "adapter": "1e-4", "output": "out", "targets": ["**"], "top": 5, "threshold": 0.25,
        "metric": "defect", "fail_above": 1e-6, "fail_below": None, "format": ["html"],
    },
    "analyze-spectrum": {
        "checkpoint": "x", "output": "out", "targets": ["**"], "exclude": ["mid.*"], "format": ["csv"],
    },
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "add-hra": {
        "output": None, "rank": 8, "targets": None, "exclude": [], "as": None, "layout": "keep",
        "gram_schmidt": False, "ema": None, "seed": 0, "max_shard_size": None,
    },
    "factorize": {
        "output": None, "rank": None, "rank_scale": None, "target_ratio": None, "energy": None, "max_error": None,
        "budget": None, "budget_unit": None, "calibrate": None, "samples": 256, "targets": None, "exclude": [],
        "as": "factors", "method": "auto", "report": None,
    },
    "merge": {
        "adapters": [], "output": None, "strength": 1.0, "exact": False, "dtype": "keep", "max_shard_size": None,
        "keep_undo": None,
    },
    "unmerge": {
        "adapters": [], "output": None, "undo": None, "strength": 1.0, "exact": False, "max_shard_size": None,
    },
    "combine": {
        "output": None, "mode": [], "rank": None, "base": None, "density": None, "restore_angles": False, "seed": None,
    },
    "extract": {
        "output": None, "kind": "hra", "rank": None, "energy": None, "targets": None, "exclude": [],
    },
    "convert": {"output": None, "to": None, "base": None, "strength": 1.0},
    "analyze-stability": {
        "output": "stability-report", "revisions": None, "lag": None, "reference": None, "top_rank": None,
        "threshold": 0.95, "patience": 2, "targets": None, "exclude": [], "split_qkv": False, "split_heads": None,
        "fail_below": None, "fail_above": None, "device": "cpu", "format": ["html", "png", "svg", "csv", "json"],
    },
    "analyze-orthogonality": {
        "output": "orthogonality-report", "groups": 32, "targets": None, "exclude": [], "metric": "scale_free",
        "fail_above": None, "fail_below": None, "format": ["html", "png", "csv"],
    },
    "analyze-adapter": {
        "output": "adapter-report", "targets": None, "top": 10, "threshold": 0.5, "metric": "relative_change",
        "fail_above": None, "fail_below": None, "format": ["html", "png", "csv"],
    },
    "analyze-spectrum": {
        "output": "spectrum-report", "targets": None, "exclude": [], "format": ["html", "png", "csv"],
    },
}  # fmt: skip
LEAST = {
    "add-hra": "checkpoint: x\n",
    "factorize": "checkpoint: x\n",
    "merge": "base: x\n",
    "unmerge": "merged: x\n",
    "combine": "adapters: [{path: a, strength: 1.0}, {path: b, strength: 0.5}]\n",
    "extract": "base: x\ntuned: y\n",
    "convert": "input: x\n",
    "analyze-stability": "series: [x]\n",
    "analyze-orthogonality": "checkpoint: x\n",
    "analyze-adapter": "base: x\nadapter: y\n",
    "analyze-spectrum": "checkpoint: x\n",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "r.yaml"


def written(path: Path, verb: str, body: str) -> str:
    path.write_text(f"version: 1\nverb: {verb}\n{body}", encoding="utf-8")
    return str(path)


def test_the_verbs() -> None:
    assert set(VERBS) == set(FULL) == set(LEAST)
    for verb, model in VERBS.items():
        keys = {field.alias or name for name, field in model.model_fields.items()} - {"version", "verb"}
        assert keys == set(FULL[verb])  # so that the tests below speak of every key


@pytest.mark.parametrize("verb", VERBS)
def test_defaults(path: Path, verb: str) -> None:
    recipe = load_any(written(path, verb, LEAST[verb]))
    assert isinstance(recipe, VERBS[verb])
    assert recipe.verb == verb
    required = parse_yaml(LEAST[verb], "r.yaml")[0]
    assert recipe.model_dump(by_alias=True) == {"version": 1, "verb": verb, **required, **DEFAULTS[verb]}
    assert load_verb(str(path), verb) == required  # only what the file gives


@pytest.mark.parametrize("verb", VERBS)
def test_recipes_are_frozen(path: Path, verb: str) -> None:
    recipe = load_any(written(path, verb, LEAST[verb]))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.version = 2


@pytest.mark.parametrize("verb", VERBS)
def test_saved_and_loaded_is_the_same(path: Path, verb: str) -> None:
    assert save_verb(path, verb, FULL[verb]) == path
    assert load_verb(str(path), verb) == FULL[verb]
    assert path.read_text(encoding="utf-8").startswith(
        f"# The same again:     ortho {verb.replace('analyze-', 'analyze ')} --recipe r.yaml\nversion: 1\n"
    )


def test_every_value_of_every_choice_survives(path: Path) -> None:
    formats = any_schema("convert")["properties"]["to"]["anyOf"][0]["enum"]
    assert len(formats) == 10
    for to in formats:
        save_verb(path, "convert", {"input": "x", "to": to}, force=True)
        assert load_verb(str(path), "convert") == {"input": "x", "to": to}


def test_saving_takes_paths_and_tuples(path: Path) -> None:
    save_verb(path, "merge", {"base": Path("b"), "adapters": ({"path": Path("a")},), "output": None})
    assert load_verb(str(path), "merge") == {"base": "b", "adapters": [{"path": "a"}], "output": None}


def test_saving_never_overwrites_unasked(path: Path) -> None:
    save_verb(path, "merge", {"base": "b"})
    with pytest.raises(OutputError, match="exists already"):
        save_verb(path, "merge", {"base": "c"})
    assert load_verb(str(path), "merge") == {"base": "b"}
    save_verb(path, "merge", {"base": "c"}, force=True)
    assert load_verb(str(path), "merge") == {"base": "c"}


@pytest.mark.parametrize(
    "options", [{"base": "b", "force": True}, {"base": "b\udc80"}, {"base": 8}, {}, {"base": "b", "dtype": "fp8"}]
)
def test_saving_refuses_what_would_not_load(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        save_verb(path, "merge", options)
    assert not path.exists()


def test_same_command_same_bytes(path: Path, tmp_path: Path) -> None:
    save_verb(path, "add-hra", FULL["add-hra"])
    (tmp_path / "other").mkdir()
    save_verb(tmp_path / "other" / "r.yaml", "add-hra", FULL["add-hra"])
    assert path.read_bytes() == (tmp_path / "other" / "r.yaml").read_bytes()


def test_the_wrong_verb_names_the_right_command(path: Path) -> None:
    name = written(path, "merge", LEAST["merge"])
    with pytest.raises(RecipeError, match="this recipe is for `ortho merge`, not for `ortho convert`") as caught:
        load_verb(name, "convert")
    assert caught.value.hint == f"ortho merge --recipe {path}"
    assert caught.value.where == f"{path}:2"


def test_an_analysis_is_named_as_it_is_typed(path: Path) -> None:
    name = written(path, "analyze-spectrum", LEAST["analyze-spectrum"])
    with pytest.raises(
        RecipeError, match="is for `ortho analyze spectrum`, not for `ortho analyze stability`"
    ) as caught:
        load_verb(name, "analyze-stability")
    assert caught.value.hint == f"ortho analyze spectrum --recipe {path}"


def test_a_training_recipe_is_no_verb(path: Path) -> None:
    path.write_text("version: 1\ntask: {name: classify}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="this recipe is for `ortho train`, not for `ortho merge`") as caught:
        load_verb(str(path), "merge")
    assert caught.value.hint == f"ortho train {path}"


def test_what_a_training_recipe_is_known_by() -> None:
    assert set(any_schema("train")["properties"]) == TRAIN_KEYS | {"version"}


def test_the_hint_leads_to_all_keys(path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_verb(written(path, "merge", "bas: x\n"), "merge")
    assert caught.value.hint == "all keys: ortho recipe schema --verb merge"
    assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize("verb", VERBS)
def test_schema_of_a_verb(verb: str) -> None:
    found = json.loads(json.dumps(any_schema(verb)))
    assert set(found["properties"]) == {"version", "verb", *FULL[verb]}
    assert found["additionalProperties"] is False
    own = {key: node for key, node in found["properties"].items() if key != "verb"}
    assert all(node.get("description") for node in own.values())


def test_schema_of_all() -> None:
    found = json.loads(json.dumps(any_schema()))
    assert found["if"] == {"required": ["verb"]}
    assert set(found["then"]["discriminator"]["mapping"]) == set(VERBS)
    assert len(found["then"]["oneOf"]) == len(VERBS)
    assert found["else"] == {"$ref": "#/$defs/TrainRecipe"}
    for verb, model in VERBS.items():
        assert set(found["$defs"][model.__name__]["properties"]) == {"version", "verb", *FULL[verb]}


def test_schema_of_an_unknown_verb() -> None:
    with pytest.raises(UsageError, match="did you mean 'merge'"):
        any_schema("mergee")


def test_base_class_has_only_what_is_not_an_option() -> None:
    assert set(VerbRecipe.model_fields) == {"version", "verb"}
