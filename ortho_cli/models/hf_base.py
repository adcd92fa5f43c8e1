"""What all models of `transformers` here share: found or refused with a reason, loaded whole but for a new head.

The architecture and its weights are the base's, so the builders read `model.base` themselves. Each wraps what it loads
in a `Pretrained` of its own, which only translates a batch into the library's arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ortho_cli.errors import CheckpointError, UsageError

from .hf_known import KNOWN

__all__ = [
    "ADAPTED",
    "Family",
    "Pretrained",
    "load_pretrained",
    "on_meta",
    "read_config",
    "silent",
    "transformers_library",
]

# In a base that holds an adapter, the adapted layers' own weights; the adapter is put on by who reads the base.
ADAPTED = {r"\.fixed_linear\.": "."}
SHOWN = 200  # letters of another library's message


@dataclass(frozen=True)
class Family:
    """One of transformers' automatic classes, and how we speak of it.

    Attributes:
        loader: its name there, e.g. `AutoModelForCausalLM`.
        noun: what such a model is, after "opens as".
        section: the name of the recipe's `model` section.
        extra: of `ortho-cli`, that installs what is needed.
        example: a hub id to try.
    """

    loader: str
    noun: str
    section: str
    extra: str
    example: str


class Pretrained(nn.Module):
    """A transformers model that is called like every other model here.

    Args:
        model: what a family's loader gives.
        notes: what the user should know about how it was loaded.
    """

    wraps = "model"  # whose names of layers adapters on disk have

    def __init__(self, model: nn.Module, notes: list[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.notes = notes or []

    def gradient_checkpointing_enable(self) -> None:
        """Let the wrapped model trade time for memory, where it can."""
        new: Any = getattr(self.model, "activation_checkpointing_enable", None)  # its name from transformers 5 on
        enable: Any = new or self.model.gradient_checkpointing_enable
        try:
            enable()
        except ValueError as error:  # transformers: "... does not support gradient checkpointing"
            raise UsageError(str(error), hint="leave out train.checkpoint_gradients") from error


def transformers_library(family: Family) -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"model {family.section} needs transformers", hint=f"pip install 'ortho-cli[{family.extra}]'"
        ) from error
    return transformers


def read_config(family: Family, base: str) -> Any:
    """The configuration of a folder or hub id; on the meta device, of a base that cannot be reached the known one.

    Raises:
        UsageError: transformers is not installed.
        CheckpointError: there is none, or it cannot be reached.
    """
    library = transformers_library(family)
    try:
        return library.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        known = dict(KNOWN.get(base, {}))
        if known and on_meta():
            return library.AutoConfig.for_model(known.pop("model_type"), **known)
        raise _refusal(family, base, error) from error


def on_meta() -> bool:
    """Whether architectures are made without weights: a dry run."""
    return torch.get_default_device().type == "meta"


def load_pretrained(
    family: Family,
    base: str,
    config: Any,
    *,
    new_head: bool = False,
    dtype: torch.dtype | None = torch.float32,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, list[str]]:
    """A family's model with the weights of a base; on the meta device its architecture alone.

    A head of another size is made anew (its seed is torch's global one) where that is allowed; anything else that is
    missing or does not fit is refused.

    Args:
        family: which automatic class.
        base: a folder or hub id.
        config: as `read_config` gives it, perhaps changed.
        new_head: whether what is not the base's body (a classifier, a pooler) may be new.
        dtype: of all weights: float32 to train them, whatever they are stored in, since in bfloat16 most updates would
            be rounded away; None leaves them as they are stored.
        options: further arguments of `from_pretrained`, such as `quantization_config`.

    Returns:
        The model, and notes: what is new, what was cast.

    Raises:
        UsageError: transformers is not installed.
        CheckpointError: the base is of another kind, or lacks weights.
    """
    loader: Any = getattr(transformers_library(family), family.loader)
    fresh, notes = set[str](), []
    try:
        if on_meta():
            model = loader.from_config(config)
            notes += [] if config.name_or_path else [f"{base} is not here; its sizes are those that are known of it"]
        else:
            with silent(transformers_library(family)):  # what is new or missing is ours to say
                model, loading = loader.from_pretrained(
                    base, config=config, ignore_mismatched_sizes=True, output_loading_info=True, key_mapping=ADAPTED,
                    **options or {},
                )  # fmt: skip
            fresh = _fresh_names(loading)
    except (OSError, ValueError) as error:  # not found, offline, gated; or of a kind that has no such model
        raise _refusal(family, base, error) from error
    missing = sorted(name for name in fresh if not (new_head and _in_head(model, name)))
    if missing:
        more = "more than its head" if new_head else "weights"
        raise CheckpointError(
            f"model.base {base!r} lacks {more}: {len(missing)} tensors, first {missing[0]!r}",
            hint="is the folder complete? list it with: ortho inspect BASE",
        )
    notes += [f"new head: {name}" for name in sorted(fresh)]
    if dtype is not None:
        stored = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {str(dtype)})
        if stored:
            notes.append(f"from {', '.join(stored)} to {dtype}, to train in".replace("torch.", ""))
        model = model.to(dtype)
    return model, notes


@contextmanager
def silent(library: Any) -> Iterator[None]:
    """Keep the warnings of transformers, and its progress bars where there is no terminal, from being shown."""
    logs = library.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    if not sys.stderr.isatty():
        logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def _refusal(family: Family, base: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:SHOWN]
    return CheckpointError(
        f"model.base {base!r} does not open as {family.noun}: {reason}",
        hint=f"a folder or hub id that {family.loader} reads, e.g. {family.example}",
    )


def _fresh_names(loading: dict[str, Any]) -> set[str]:
    """The parameters that did not come from the checkpoint; transformers lists names, or (name, shape, shape)."""
    entries = [*loading["missing_keys"], *loading["mismatched_keys"]]
    return {entry if isinstance(entry, str) else entry[0] for entry in entries}


def _in_head(model: Any, name: str) -> bool:
    """Whether a tensor is none of the body: beside it, or a pooler, which checkpoints of language models often lack."""
    body = f"{model.base_model_prefix}."
    return model.base_model is not model and (not name.startswith(body) or ".pooler." in name)
