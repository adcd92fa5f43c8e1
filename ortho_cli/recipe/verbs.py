"""The schema of the recipes for checkpoint verbs: `version: 1`, `verb: merge`, then that verb's arguments and options.

One class a verb; its fields are the verb's arguments and long options, with `_` for `-`. A new verb is one class and
one line in `VERBS`; those of `ortho analyze` are in `analyses`. What depends on a checkpoint (does a layer exist, is a
rank too large) is the verb's to say.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.analyses import ANALYSES
from ortho_cli.recipe.explain import listed, nearest
from ortho_cli.recipe.load import read_recipe, validate
from ortho_cli.recipe.parse import Positions, Problem, parse_yaml, refusal
from ortho_cli.recipe.section import VERSION, Count, Positive, Rejection, Section, Text, VerbRecipe
from ortho_cli.recipe.shipped import find
from ortho_cli.recipe.write import plain_data, to_yaml, write_recipe

__all__ = [
    "TRAIN_KEYS", "VERBS", "Adapter", "AddHRA", "Combine", "Convert", "Extract", "Factorize", "Merge", "Unmerge",
    "VerbRecipe", "check_verb", "command", "is_training", "load_verb", "save_verb",
]  # fmt: skip

# What a recipe without `verb` is known by; the schema of these is in `train`, which a verb need not import.
TRAIN_KEYS = frozenset({"task", "model", "data", "methods", "optimizer", "schedule", "train", "run", "matrix"})


def _pattern_rank(text: str) -> str:
    if not re.fullmatch(r".+=[1-9][0-9]*", text):
        raise ValueError(f"expected a rank or 'pattern=rank', found {text!r}")
    return text


def _pattern_strength(text: str) -> str:
    if not re.fullmatch(r".+=[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text):
        raise ValueError(f"expected a number or 'pattern=number', found {text!r}")
    return text


_RANK_RULES = ("rank", "rank_scale", "target_ratio", "energy", "max_error", "budget")
Ratio = Annotated[float, Field(gt=0, le=1)]
PatternRank = Annotated[str, AfterValidator(_pattern_rank)]
Ranks = Count | Annotated[list[Count | PatternRank], Field(min_length=1)]
Strength = Annotated[float, Field(allow_inf_nan=False)]
Strengths = Annotated[
    Strength | list[Strength | Annotated[str, AfterValidator(_pattern_strength)]],
    Field(description="Of all adapters; in a list, 'pattern=number' speaks for some layers and the last wins."),
]
ShardSize = Annotated[Text | None, Field(description="Split larger outputs into files of at most this size, e.g. 5GB.")]
Output = Annotated[Text | None, Field(description="The file or folder to write.")]


class AddHRA(VerbRecipe):
    """Put Householder adapters (HRA) into a checkpoint."""

    verb: Literal["add-hra"]
    checkpoint: Text = Field(description="The checkpoint to adapt: a file, a folder or a hub id.")
    output: Output = None
    rank: Count | Annotated[list[Count | PatternRank], Field(min_length=1)] = Field(
        default=8,
        description="Reflections a layer; in a list, 'pattern=rank' speaks for some layers and the last wins.",
    )
    targets: list[Text] | None = Field(
        default=None, description="Patterns of layer names, or a preset's name; null: the preset of the architecture."
    )
    exclude: list[Text] = Field(default=[], description="Patterns of layers to leave alone.")
    as_: Literal["adapter", "checkpoint"] | None = Field(
        default=None, alias="as", description="A PEFT folder or a whole checkpoint; null: by the output's suffix."
    )
    layout: Literal["keep", "hra-repo"] = Field(
        default="keep", description="hra-repo adds what the HRA authors' strict loader wants (SD1.5 LDM files only)."
    )
    gram_schmidt: bool = Field(default=False, description="Orthonormalise the reflections (the paper's variant).")
    ema: Literal["use", "keep", "drop"] | None = Field(
        default=None, description="What happens to model_ema.*; null: drop with hra-repo, else keep."
    )
    seed: int = Field(default=0, description="Of the adapter's random start.")
    max_shard_size: ShardSize = None


class Adapter(Section):
    """One adapter of a merge."""

    path: Text = Field(description="A PEFT folder or an adapter file of any readable dialect.")
    strength: Strength = Field(default=1.0, description="0 is the base, 1 the adapter as it was trained.")


class Merge(VerbRecipe):
    """Fold adapters into the weights of their base."""

    verb: Literal["merge"]
    base: Text = Field(description="The checkpoint to fold into.")
    adapters: list[Adapter] = Field(default=[], description="Folded in this order; none: the HRA that the base holds.")
    output: Output = None
    strength: Strengths = 1.0
    exact: bool = Field(default=False, description="Compute in float64 instead of float32.")
    dtype: Literal["keep", "fp16", "bf16", "fp32"] = Field(default="keep", description="Type of the written weights.")
    max_shard_size: ShardSize = None
    keep_undo: Text | None = Field(default=None, description="A file to write, from which unmerge restores the base.")


class Unmerge(VerbRecipe):
    """Restore the base of a merged checkpoint."""

    verb: Literal["unmerge"]
    merged: Text = Field(description="The checkpoint that adapters were folded into.")
    adapters: list[Adapter] = Field(default=[], description="Without an undo file: what was folded, in the same order.")
    output: Output = None
    undo: Text | None = Field(default=None, description="What merge's keep_undo wrote: every byte comes back.")
    strength: Strengths = 1.0
    exact: bool = Field(default=False, description="Compute the inverses in float64 instead of float32.")
    max_shard_size: ShardSize = None


class Combine(VerbRecipe):
    """Make one adapter of several."""

    verb: Literal["combine"]
    adapters: list[Adapter] = Field(description="Two or more; a strength is a share for means.", min_length=2)
    output: Output = None
    mode: list[
        Literal["mean", "compose", "log-mean", "orthomerge", "slerp", "grassmann", "linear", "svd", "ties", "dare"]
    ] = Field(default=[], description="Of rotations mean, of low-rank sums linear by default; one of each at most.")
    rank: Count | Annotated[list[Count | PatternRank], Field(min_length=1)] | None = Field(
        default=None,
        description="The most reflections or components; in a list, 'pattern=rank' speaks for some layers.",
    )
    base: Text | None = Field(default=None, description="Their base, where rotations and low-rank sums meet.")
    density: Ratio | None = Field(default=None, description="Share of entries that ties and dare keep; null: half.")
    restore_angles: bool = Field(default=False, description="Turn on until the angles have the parts' mean norm.")
    seed: int | None = Field(default=None, description="Of dare; null: 0.")


class Extract(VerbRecipe):
    """Extract an adapter from a fine-tuned checkpoint."""

    verb: Literal["extract"]
    base: Text = Field(description="The checkpoint that was fine-tuned.")
    tuned: Text = Field(description="What became of it, in any layout.")
    output: Output = None
    kind: Literal["hra", "lora", "both"] = Field(default="hra", description="A rotation, a low-rank sum, or both.")
    rank: Ranks | None = Field(default=None, description="Of a layer, null: 8; in a list, 'pattern=rank' for some.")
    energy: Ratio | None = Field(default=None, description="Instead: share of each layer's squared change to keep.")
    targets: list[Text] | None = Field(default=None, description="Patterns or presets; null: all that differ.")
    exclude: list[Text] = Field(default=[], description="Patterns of layers to leave out.")

    def problems(self) -> Iterator[Rejection]:
        """One of the two says how much is kept."""
        if self.rank is not None and self.energy is not None:
            yield ("energy",), "says how much to keep, as rank does: give one of them"


class Convert(VerbRecipe):
    """Write an adapter or a checkpoint in another format."""

    verb: Literal["convert"]
    input: Text = Field(description="The adapter or checkpoint to convert.")
    output: Output = None
    to: (
        Literal[
            "peft-hra",
            "peft-lora",
            "kohya-lora",
            "diffusers-lora",
            "hra-repo",
            "ldm",
            "diffusers",
            "base",
            "dense",
            "safetensors",
        ]
        | None
    ) = Field(default=None, description="The format to write; null: an adapter's own, at another strength.")
    base: Text | None = Field(default=None, description="The base of the adapter, where the format needs its weights.")
    strength: Strengths = 1.0


class Factorize(VerbRecipe):
    """Replace weights by low-rank factors."""

    verb: Literal["factorize"]
    checkpoint: Text = Field(description="The checkpoint to factor: a file, a folder or a hub id.")
    output: Output = None
    rank: Count | Annotated[list[Count | PatternRank], Field(min_length=1)] | None = Field(
        default=None, description="Rank of a layer; in a list, 'pattern=rank' speaks for some layers and the last wins."
    )
    rank_scale: Positive | None = Field(default=None, description="Rank as a share of the full one, as FNL rounds it.")
    target_ratio: Ratio | None = Field(default=None, description="Parameters of the whole checkpoint, after / before.")
    energy: Ratio | None = Field(default=None, description="Share of each layer's squared norm that is kept.")
    max_error: Ratio | None = Field(default=None, description="Relative Frobenius error of each layer.")
    budget: Ratio | None = Field(default=None, description="Cost of the targeted layers, after / before, shared out.")
    budget_unit: Literal["params", "flops"] | None = Field(default=None, description="What the budget counts.")
    calibrate: Text | None = Field(default=None, description="Text to fit the factors to the inputs of the layers.")
    samples: Count = Field(default=256, description="Lines of it.")
    targets: list[Text] | None = Field(default=None, description="Patterns or presets; null: large Linear and conv.")
    exclude: list[Text] = Field(default=[], description="Patterns of layers to leave alone.")
    as_: Literal["factors", "dense", "lora-residual"] = Field(
        default="factors", alias="as", description="Factors, truncated weights, or a residual base with a LoRA."
    )
    method: Literal["auto", "svd", "randomized"] = Field(default="auto", description="How layers are decomposed.")
    report: Text | None = Field(default=None, description="The report's folder; null: beside the output.")

    def problems(self) -> Iterator[Rejection]:
        """One rule at most: the command line may give it instead."""
        rules = [name for name in _RANK_RULES if getattr(self, name) is not None]
        if len(rules) > 1:
            yield (rules[1],), f"{rules[0]} is a rank rule too, and exactly one is needed"
        if self.budget_unit is not None and self.budget is None:
            yield ("budget_unit",), "is about budget, which is not given"


VERBS: dict[str, type[VerbRecipe]] = {
    "add-hra": AddHRA, "factorize": Factorize, "merge": Merge, "unmerge": Unmerge, "combine": Combine,
    "extract": Extract, "convert": Convert, **ANALYSES,
}  # fmt: skip


def is_training(data: Mapping[str, object]) -> bool:
    """Whether a recipe's data is one for `ortho train`: it names no verb, but something that is trained."""
    return "verb" not in data and not TRAIN_KEYS.isdisjoint(data)


def load_verb(name_or_path: str, verb: str) -> dict[str, object]:
    """Read a recipe for one verb: only the keys that it gives, so that the command line and defaults can fill the rest.

    Returns:
        The verb's options by their recipe keys (`as`, `max_shard_size`), without `version` and `verb`.

    Raises:
        RecipeError: no such recipe, one for another verb, or all that is wrong with it.
    """
    path = find(name_or_path)
    data, positions = read_recipe(path)
    other = "train" if is_training(data) else data.get("verb")
    if (other in VERBS or other == "train") and other != verb:
        raise RecipeError(
            f"this recipe is for `{_words(str(other))}`, not for `{_words(verb)}`",
            hint=command(str(other), shlex.quote(name_or_path)),
            where=f"{path}:{positions.place(('verb',)).value}",
        )
    given = check_verb(data, positions, path).model_dump(by_alias=True, exclude_unset=True)
    return {key: value for key, value in given.items() if key not in VerbRecipe.model_fields}


def save_verb(path: str | PathLike[str], verb: str, options: Mapping[str, object], *, force: bool = False) -> Path:
    """Write the recipe that repeats a command; reading it back gives the same options.

    Args:
        path: the YAML file to write.
        verb: a key of `VERBS`.
        options: by recipe keys; paths are written as text, tuples as lists.
        force: replace an existing file.

    Raises:
        OutputError: the file exists or cannot be written.
        RecipeError: the options do not fit the verb's schema.
    """
    recipe = Path(path)
    data: dict[str, object] = {"version": VERSION, "verb": verb, **{key: plain_data(options[key]) for key in options}}
    text = f"# The same again:     {command(verb, shlex.quote(recipe.name))}\n{to_yaml(data)}"
    # Read before it is written: what YAML or the schema cannot carry is refused now, not when it is needed.
    check_verb(*parse_yaml(text, str(recipe)), recipe)
    return write_recipe(recipe, text.encode(), force=force)


def command(verb: str, name: str) -> str:
    """The command line that runs a recipe."""
    return f"ortho train {name}" if verb == "train" else f"{_words(verb)} --recipe {name}"


def _words(verb: str) -> str:
    """A verb as it is typed: `analyze-spectrum` is one of `ortho analyze`."""
    return f"ortho {verb.replace('analyze-', 'analyze ')}"


def check_verb(data: dict[str, object], positions: Positions, path: Path) -> VerbRecipe:
    """A verb's recipe as an instance of the class that its key `verb` names.

    Raises:
        RecipeError: all that is wrong with it.
    """
    verb = data.get("verb")
    if not isinstance(verb, str) or verb not in VERBS:
        here = positions.place(("verb",))
        found = f"'{verb}' is none of" if "verb" in data else "missing; one of"
        reason = f"{found} {listed(VERBS)}{nearest(str(verb), VERBS)}"
        hint = None if "verb" in data else "a training recipe has no verb, but task, model, data, ..."
        raise refusal(str(path), [*positions.problems, Problem(here.value, "verb", reason)], hint)
    hint = f"all keys: ortho recipe schema --verb {verb}"
    return validate(VERBS[verb], data, positions, path, hint=hint)
