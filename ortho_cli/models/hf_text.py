"""Any text classifier of `transformers`, by hub id or folder, with a head for the task's classes or its one score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ortho_cli.errors import RecipeError

from .hf_base import Family, Pretrained, load_pretrained, read_config

if TYPE_CHECKING:
    from ortho_cli.recipe.models_text import HFText

__all__ = ["HFTextClassifier", "build"]

FAMILY = Family(
    "AutoModelForSequenceClassification", "a text classifier", "hf-text", "text", "microsoft/deberta-v3-base"
)
POOLER = ".pooler."


def build(config: HFText, outputs: int, max_length: int, *, frozen_head: bool = False) -> nn.Module:
    """The pretrained model of a recipe's `model.base`, or, on the meta device, its architecture alone; in float32.

    Args:
        config: the recipe's `model` section.
        outputs: classes; 1 for a score.
        max_length: tokens of the longest sample.
        frozen_head: the head stays as it is, new or not.

    Raises:
        UsageError: transformers is not installed.
        CheckpointError: the base is not found, is no text classifier, or lacks more than its head.
        RecipeError: samples are longer than the model has positions for.
    """
    found = read_config(FAMILY, config.base)
    if found.num_labels != outputs:
        found.num_labels = outputs
    filler = getattr(found, "pad_token_id", None)
    if filler is None:  # a causal model finds a sample's last token by what it is filled up with
        end = getattr(found, "eos_token_id", None)
        filler = end[0] if isinstance(end, list) else end or 0
        found.pad_token_id = filler
    model, notes = load_pretrained(FAMILY, config.base, found, new_head=True)
    _check_length(model, config.base, max_length)
    new = [note.removeprefix("new head: ").rpartition(".")[0] for note in notes if POOLER in note]
    head = list(dict.fromkeys([*_head(model), *new]))
    made = HFTextClassifier(model, head, filler=filler, notes=notes)
    if frozen_head:
        made.freeze_head()
    return made


class HFTextClassifier(Pretrained):
    """A transformers model of texts that is called like every other one here.

    Args:
        model: what `AutoModelForSequenceClassification` gives.
        head: names of its modules that are the task's own and train beside any adapter.
        filler: the token that shorter samples are filled up with.
        notes: what the user should know about how it was loaded.

    Shapes: `(B, T)` token numbers to `(B, num_labels)`.
    """

    def __init__(self, model: nn.Module, head: list[str], *, filler: int = 0, notes: list[str] | None = None) -> None:
        super().__init__(model, notes)
        self.task_head = tuple(head)
        self.filler = filler

    def freeze_head(self) -> None:
        """Keep the head as it is, whatever trains."""
        for name in self.task_head:
            self.model.get_submodule(name).requires_grad_(False)
        self.notes.append(f"compat frozen-head: {', '.join(self.task_head)} stays as it is")
        self.task_head = ()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **segments).logits
        return logits


def _head(model: Any) -> list[str]:
    """The modules beside the body that hold weights."""
    return [
        name for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]  # fmt: skip


def _check_length(model: nn.Module, base: str, max_length: int) -> None:
    """Refuse samples for which a table of positions has no row; models that turn their states take any length."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
            first = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from behind its filler
            if max_length > module.num_embeddings - first:
                raise RecipeError(
                    f"task.max_length is {max_length}, and model.base {base!r} has "
                    f"{module.num_embeddings - first} positions"
                )
