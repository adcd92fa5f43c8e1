"""Tell what data a recipe needs, and whether it is there: `ortho recipe check --data`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ortho_cli.recipe.data import Images, Instructions, Series
from ortho_cli.recipe.data_captions import CaptionedPictures
from ortho_cli.recipe.data_hints import HintedPictures
from ortho_cli.recipe.data_text import Sentences
from ortho_cli.recipe.translation import Parallel

from .caption_data import check_captions, describe_captions, found_captions
from .hint_check import check_hints, describe_hints, found_hints
from .image_data import load_images
from .image_specs import SPECS, sources
from .instruct_check import check_pairs, describe_pairs, found_pairs
from .parallel_check import check_parallel, describe_parallel, found_parallel
from .series_check import check_series, describe_series
from .text_check import check_texts, describe_texts, found_texts

__all__ = ["check_data", "describe_data", "found_text"]


def describe_data(
    config: Images | CaptionedPictures | HintedPictures | Series | Sentences | Instructions | Parallel,
) -> str:
    """What the recipe's data is, how a local copy looks, and how to get it; nothing is opened.

    Args:
        config: the recipe's `data` section.

    Returns:
        Lines of text.
    """
    if isinstance(config, Series):
        return describe_series(config)
    if isinstance(config, Parallel):
        return describe_parallel(config)
    if isinstance(config, Instructions):
        return describe_pairs(config)
    if isinstance(config, Sentences):
        return describe_texts(config)
    if isinstance(config, CaptionedPictures):
        return describe_captions(config)
    if isinstance(config, HintedPictures):
        return describe_hints(config)
    spec = SPECS[config.name]
    lines = [f"{spec.name}: {spec.title}"]
    if config.path is not None:
        lines.append(f"read from: {config.path}   (FOLDER below)")
    elif config.source is not None or spec.hub is not None:
        lines.append(f"read from: the hub, {config.source or (spec.hub.id if spec.hub is not None else '')}")
    if spec.tree:
        lines += ["a local copy (data.path: FOLDER) looks like", *(f"  {line}" for line in spec.tree)]
    return "\n".join([*lines, "to get it:", *(f"  {line}" for line in sources(spec))])


def check_data(
    config: Images | CaptionedPictures | HintedPictures | Series | Sentences | Instructions | Parallel,
) -> dict[str, Any]:
    """Open all parts of a recipe's data and count them.

    Args:
        config: the recipe's `data` section.

    Returns:
        `name`, and of pictures `train` and `eval` (samples), `classes` (number of them), `kept` (classes that are
        trained on); of series what `check_series` says.

    Raises:
        RecipeError: the data is missing or not what the recipe says; the hint is how to get it.
        UsageError: a library that is needed is not installed.

    Cost: sets of small pictures are read whole; of others the files are listed, and one picture of each split opened.
    """
    if isinstance(config, Series):
        return check_series(config)
    if isinstance(config, Parallel):
        return check_parallel(config)
    if isinstance(config, Instructions):
        return check_pairs(config)
    if isinstance(config, Sentences):
        return check_texts(config)
    if isinstance(config, CaptionedPictures):
        return check_captions(config)
    if isinstance(config, HintedPictures):
        return check_hints(config)
    train, judged = load_images(config, "train"), load_images(config, "eval")
    for images in (train, judged):
        if not isinstance(images.images, Tensor):
            images.images.open(0)
    return {
        "name": config.name,
        "train": len(train),
        "eval": len(judged),
        "classes": len(train.classes),
        "kept": len(config.classes) if config.classes is not None else len(train.classes),
    }


def found_text(found: dict[str, Any]) -> str:
    """What `check_data` found, in a sentence."""
    if "captions" in found:
        return found_captions(found)
    if "pairs" in found:
        return found_pairs(found)
    if "languages" in found:
        return found_parallel(found)
    if "hint" in found:
        return found_hints(found)
    if "columns" in found:
        columns = f"{len(found['columns'])} columns ({', '.join(found['columns'])})"
        parts = f"{found['train']} rows to train on, {found['val']} to validate, {found['test']} to test"
        return f"found: {columns}; {parts}"
    if "labels" in found:
        return found_texts(found)
    kept = "" if found["kept"] == found["classes"] else f", {found['kept']} of them kept"
    classes = f"{found['classes']} classes{kept}" if found["classes"] > 1 else "no classes"
    return f"found: {found['train']} samples to train on, {found['eval']} to judge by; {classes}"
