"""Any picture classifier of `transformers`, by hub id or folder, with a head for the task's classes.

The wrapper only translates: pictures in, logits out, grey pictures repeated where the model wants colour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ortho_cli.errors import CheckpointError, RecipeError, UsageError

if TYPE_CHECKING:
    from ortho_cli.recipe.models import HFImage

__all__ = ["HFImageClassifier", "build"]

# In a base that holds an adapter, the adapted layers' own weights; the adapter is put on by who reads the base.
ADAPTED = {r"\.fixed_linear\.": "."}


def build(config: HFImage, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The pretrained model of a recipe's `model.base`, or, on the meta device, its architecture alone; in float32.

    Weights are kept in float32 whatever the base is stored in: in bfloat16 most updates would be rounded away.
    A head of another size is made anew (its seed is torch's global one) and listed in the model's `notes`; anything
    else that is missing or does not fit is refused.

    Raises:
        UsageError: transformers is not installed.
        CheckpointError: the base is not found, is no picture classifier, or lacks more than its head.
        RecipeError: the pictures have a size or channels that the model has no weights for.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError("model hf-image needs transformers", hint="pip install 'ortho-cli[diffusion]'") from error
    family: Any = transformers.AutoModelForImageClassification
    try:
        found = transformers.AutoConfig.from_pretrained(config.base)
        if found.num_labels != num_classes:
            found.id2label = {
                label: f"LABEL_{label}" for label in range(num_classes)
            }  # what transformers would name them
            found.label2id = {name: label for label, name in found.id2label.items()}
        if torch.get_default_device().type == "meta":
            model, fresh = family.from_config(found), set[str]()
        else:
            model, loading = family.from_pretrained(
                config.base, config=found, ignore_mismatched_sizes=True, output_loading_info=True, key_mapping=ADAPTED
            )
            fresh = _fresh_names(loading)
    except (OSError, ValueError) as error:  # not found, offline, gated; or of a kind that classifies no pictures
        raise CheckpointError(
            f"model.base {config.base!r} does not open as a picture classifier: {str(error).splitlines()[0][:200]}",
            hint="a folder or hub id that AutoModelForImageClassification reads, e.g. google/vit-base-patch16-224",
        ) from error
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    body = sorted(name for name in fresh if sizes.get(name, (num_classes,))[0] != num_classes)
    if body:
        raise CheckpointError(
            f"model.base {config.base!r} lacks more than its head: {len(body)} tensors, first {body[0]!r}",
            hint="is the folder complete? list it with: ortho inspect BASE",
        )
    _check_size(found, sizes, image_size)
    wanted = getattr(found, "num_channels", in_channels)
    if in_channels not in (1, wanted):
        raise RecipeError(f"the pictures have {in_channels} channels, model.base {config.base!r} takes {wanted}")
    notes = [f"new head: {name}" for name in sorted(fresh)]
    stored = sorted({str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"})
    if stored:
        notes.append(f"from {', '.join(stored).replace('torch.', '')} to float32, to train in")
    return HFImageClassifier(model.float(), repeat=wanted // in_channels, notes=notes)


class HFImageClassifier(nn.Module):
    """A transformers model that is called like every other model here.

    Args:
        model: what `AutoModelForImageClassification` gives.
        repeat: how often grey pictures are repeated along their channels; 1 leaves pictures as they are.
        notes: what the user should know about how it was loaded.

    Shapes: `(B, C, H, W)` to `(B, num_labels)`.
    """

    wraps = "model"  # whose names of layers adapters on disk have

    def __init__(self, model: nn.Module, *, repeat: int = 1, notes: list[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.repeat = repeat
        self.notes = notes or []

    def gradient_checkpointing_enable(self) -> None:
        """Let the wrapped model trade time for memory, where it can."""
        new: Any = getattr(self.model, "activation_checkpointing_enable", None)  # its name from transformers 5 on
        enable: Any = new or self.model.gradient_checkpointing_enable
        try:
            enable()
        except ValueError as error:  # transformers: "... does not support gradient checkpointing"
            raise UsageError(str(error), hint="leave out train.checkpoint_gradients") from error

    def forward(self, images: Tensor) -> Tensor:
        if self.repeat > 1:
            images = images.expand(-1, self.repeat, -1, -1)
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def _fresh_names(loading: dict[str, Any]) -> set[str]:
    """The parameters that did not come from the checkpoint; transformers lists names, or (name, shape, shape)."""
    entries = [*loading["missing_keys"], *loading["mismatched_keys"]]
    return {entry if isinstance(entry, str) else entry[0] for entry in entries}


def _check_size(config: Any, sizes: dict[str, tuple[int, ...]], image_size: int) -> None:
    """Refuse pictures for which a table of positions has no row; models without such a table take any size."""
    expected = getattr(config, "image_size", None)
    positions = [name for name in sizes if "position_emb" in name]
    if positions and isinstance(expected, int) and expected != image_size:
        raise RecipeError(
            f"the pictures are {image_size} pixels wide, the base was made for {expected}",
            hint=f"add size: {expected} to the data section",
        )
