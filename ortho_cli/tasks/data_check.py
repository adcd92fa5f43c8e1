"""Tell what data a recipe needs, and whether it is there: `ortho recipe check --data`.

Each kind of data has three functions in a file of its own: what it is, what is there, and that in words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .caption_data import check_captions, describe_captions, found_captions
from .hint_check import check_hints, describe_hints, found_hints
from .image_check import check_images, describe_images, found_images
from .instruct_check import check_pairs, describe_pairs, found_pairs
from .parallel_check import check_parallel, describe_parallel, found_parallel
from .series_check import check_series, describe_series, found_series
from .subject_check import check_subject, describe_subject, found_subject
from .text_check import check_texts, describe_texts, found_texts

__all__ = ["check_data", "describe_data", "found_text"]

Found = dict[str, Any]
# By the kind of a `data` section.
CHECKS: dict[str, tuple[Callable[[Any], str], Callable[[Any], Found], Callable[[Found], str]]] = {
    "pictures": (describe_images, check_images, found_images),
    "captioned pictures": (describe_captions, check_captions, found_captions),
    "pictures with hints": (describe_hints, check_hints, found_hints),
    "pictures of a subject": (describe_subject, check_subject, found_subject),
    "series": (describe_series, check_series, found_series),
    "sentences": (describe_texts, check_texts, found_texts),
    "instructions": (describe_pairs, check_pairs, found_pairs),
    "pairs of sentences": (describe_parallel, check_parallel, found_parallel),
}


def describe_data(config: Any) -> str:
    """What the recipe's data is, how a local copy looks, and how to get it, in lines; nothing is opened.

    Args:
        config: the recipe's `data` section.
    """
    return CHECKS[config.kind][0](config)


def check_data(config: Any) -> Found:
    """Open all parts of a recipe's data and count them.

    Args:
        config: the recipe's `data` section.

    Returns:
        `name`, and what the kind's own function says.

    Raises:
        RecipeError: the data is missing or not what the recipe says; the hint is how to get it.
        UsageError: a library that is needed is not installed.
    """
    return CHECKS[config.kind][1](config)


def found_text(config: Any, found: Found) -> str:
    """What `check_data` found, in words."""
    return CHECKS[config.kind][2](found)
