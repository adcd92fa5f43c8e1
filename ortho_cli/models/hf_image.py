"""Any picture classifier of `transformers`, by hub id or folder, with a head for the task's classes.

The wrapper only translates: pictures in, logits out, grey pictures repeated where the model wants colour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ortho_cli.errors import RecipeError

from .hf_base import Family, Pretrained, load_pretrained, read_config

if TYPE_CHECKING:
    from ortho_cli.recipe.models import HFImage

__all__ = ["HFImageClassifier", "build"]

FAMILY = Family(
    "AutoModelForImageClassification", "a picture classifier", "hf-image", "diffusion", "google/vit-base-patch16-224"
)


def build(config: HFImage, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The pretrained model of a recipe's `model.base`, or, on the meta device, its architecture alone; in float32.

    A head of another size is made anew (its seed is torch's global one) and listed in the model's `notes`; anything
    else that is missing or does not fit is refused.

    Raises:
        UsageError: transformers is not installed.
        CheckpointError: the base is not found, is no picture classifier, or lacks more than its head.
        RecipeError: the pictures have a size or channels that the model has no weights for.
    """
    found = read_config(FAMILY, config.base)
    if found.num_labels != num_classes:
        found.num_labels = num_classes
    model, notes = load_pretrained(FAMILY, config.base, found, new_head=True)
    _check_size(found, [name for name, _ in model.named_parameters()], image_size)
    wanted = getattr(found, "num_channels", in_channels)
    if in_channels not in (1, wanted):
        raise RecipeError(f"the pictures have {in_channels} channels, model.base {config.base!r} takes {wanted}")
    return HFImageClassifier(model, repeat=wanted // in_channels, notes=notes)


class HFImageClassifier(Pretrained):
    """A transformers model of pictures that is called like every other one here.

    Args:
        model: what `AutoModelForImageClassification` gives.
        repeat: how often grey pictures are repeated along their channels; 1 leaves pictures as they are.
        notes: what the user should know about how it was loaded.

    Shapes: `(B, C, H, W)` to `(B, num_labels)`.
    """

    def __init__(self, model: nn.Module, *, repeat: int = 1, notes: list[str] | None = None) -> None:
        super().__init__(model, notes)
        self.repeat = repeat

    def forward(self, images: Tensor) -> Tensor:
        if self.repeat > 1:
            images = images.expand(-1, self.repeat, -1, -1)
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def _check_size(config: Any, names: list[str], image_size: int) -> None:
    """Refuse pictures for which a table of positions has no row; models without such a table take any size."""
    expected = getattr(config, "image_size", None)
    positions = [name for name in names if "position_emb" in name]
    if positions and isinstance(expected, int) and expected != image_size:
        raise RecipeError(
            f"the pictures are {image_size} pixels wide, the base was made for {expected}",
            hint=f"add size: {expected} to the data section",
        )
