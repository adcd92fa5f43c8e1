"""Which folders `--force` may replace: those that hold a checkpoint and nothing else, for replacing is deleting."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ortho_cli.errors import CheckpointError, OutputError

from .header import quoted
from .store import STEMS, WEIGHT_COMPONENTS, WEIGHT_SUFFIXES, read_json

__all__ = ["check_replaceable"]

# By these a folder is known to be a checkpoint: its configuration, or weights or an index under the libraries' names.
_STEM = rf"(?:{'|'.join(map(re.escape, (*STEMS, 'pytorch_model')))})"
_SUFFIX = rf"(?:{'|'.join(map(re.escape, WEIGHT_SUFFIXES))})"
_MARKER = re.compile(
    r"config\.json|model_index\.json|adapter_config\.json"
    rf"|{_STEM}(?:\.[^.-]+)?(?:-\d{{5}}-of-\d{{5}})?{_SUFFIX}"
    rf"|{_STEM}\.(?:safetensors|bin)\.index(?:\.[^.-]+)?\.json"
)
# What else the libraries (and we) put into one: tokenizers, processors, cards. The rest may be somebody's only copy.
_BESIDE = re.compile(
    r"[a-z_]+_config\.json|config_sentence_transformers\.json|(?:tokenizer|vocab|added_tokens|special_tokens_map)\.json"
    r"|(?:modules|chat_template)\.json|chat_template\.jinja|(?:vocab|merges)\.txt|vocab\.bpe|tokenizer\.model"
    r"|(?:spiece|sentencepiece|sentencepiece\.bpe)\.model|hra\.safetensors"
    r"|README\.md|LICENSE(?:\.md|\.txt)?|NOTICE(?:\.md|\.txt)?|\.gitattributes"
)
_COMPONENTS = (
    *WEIGHT_COMPONENTS, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", "feature_extractor", "image_processor",
    "processor", "1_Pooling", "2_Dense", "2_Normalize", "3_Normalize", "base", "adapter",
)  # fmt: skip


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that is somebody's home, work place or photo album, or holds a part of one.

    Args:
        folder: an existing folder; an empty one may go.

    Raises:
        OutputError: nothing marks it as a checkpoint, something in it is no part of one, or we are working in it.
    """
    components = {*_COMPONENTS, *_listed(folder)}
    marked, empty, stranger = False, True, ""
    for path in sorted(folder.iterdir()):
        is_component = path.is_dir() and path.name in components and not path.is_symlink()
        for found in sorted(path.iterdir()) if is_component else [path]:
            empty = False
            is_file = not found.is_dir()
            marked = marked or (is_file and _MARKER.fullmatch(found.name) is not None)
            if not is_file or not (_MARKER.fullmatch(found.name) or _BESIDE.fullmatch(found.name)):
                stranger = stranger or found.relative_to(folder).as_posix() + "/" * (not is_file)
    if Path.cwd().is_relative_to(folder.resolve()) or not (empty or marked):
        raise OutputError(
            f"folder {folder} is no checkpoint, so --force does not replace it", hint="name another with -o"
        )
    if stranger:
        raise OutputError(
            f"folder {folder} also holds {quoted(stranger)}, which is no part of a checkpoint, so --force does not "
            "replace it",
            hint="name another with -o, or remove the folder yourself",
        )


def _listed(folder: Path) -> Iterable[str]:
    """What a folder's `model_index.json` calls its components."""
    path = folder / "model_index.json"
    try:
        return read_json(path) if path.is_file() else ()
    except CheckpointError:
        return ()
