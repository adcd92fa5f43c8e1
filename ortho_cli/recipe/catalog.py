"""Any recipe, whatever it is for: a file with `verb: NAME` is that verb's, one without is for `ortho train`."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from ortho_cli.errors import UsageError
from ortho_cli.recipe.explain import listed, nearest
from ortho_cli.recipe.load import read_recipe
from ortho_cli.recipe.section import Section
from ortho_cli.recipe.shipped import find
from ortho_cli.recipe.train import TrainRecipe, check_train, resolved_yaml
from ortho_cli.recipe.verbs import VERBS, VerbRecipe, check_verb, command, is_training
from ortho_cli.recipe.write import to_yaml

__all__ = ["any_schema", "command_of", "load_any", "shown"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def load_any(name_or_path: str) -> TrainRecipe | VerbRecipe:
    """Read and check a recipe, with every default filled in.

    Raises:
        RecipeError: no such recipe, or all that is wrong with it.
    """
    path = find(name_or_path)
    data, positions = read_recipe(path)
    return (check_train if is_training(data) else check_verb)(data, positions, path)


def command_of(recipe: TrainRecipe | VerbRecipe, name: str) -> str:
    """The command line that runs a recipe."""
    return command("train" if isinstance(recipe, TrainRecipe) else recipe.verb, name)


def shown(recipe: TrainRecipe | VerbRecipe) -> str:
    """A recipe as YAML with every default; it loads to the same recipe again."""
    return resolved_yaml(recipe) if isinstance(recipe, TrainRecipe) else to_yaml(recipe.model_dump(by_alias=True))


def any_schema(verb: str | None = None) -> dict[str, Any]:
    """The JSON Schema of one verb's recipes (`train` is one), or of all, for editors.

    Raises:
        UsageError: no such verb.
    """
    classes: dict[str, type[Section]] = {"train": TrainRecipe, **VERBS}
    if verb is None:
        references, found = models_json_schema([(model, "validation") for model in classes.values()])
        by_verb = {verb: references[(model, "validation")]["$ref"] for verb, model in VERBS.items()}
        # `if` first: an editor then explains a file by the one schema that is meant, not by all at once.
        return {
            "$schema": DIALECT,
            **found,
            "if": {"required": ["verb"]},
            "then": {
                "discriminator": {"propertyName": "verb", "mapping": by_verb},
                "oneOf": [{"$ref": reference} for reference in by_verb.values()],
            },
            "else": references[(TrainRecipe, "validation")],
        }
    if verb not in classes:
        raise UsageError(f"no verb '{verb}' has recipes{nearest(verb, classes)}", hint=f"one of {listed(classes)}")
    return {"$schema": DIALECT, **classes[verb].model_json_schema()}
