"""Sentences into classes or a score, judged by GLUE's metrics, exact over processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli import registry
from ortho_cli.recipe.data_text import GLUE

from .glue_specs import SPECS
from .image_specs import Split
from .task import Batch, Losses, Reduce, Task
from .text_data import TextSet, classes_of, load_texts
from .text_metrics import METRICS
from .text_tokens import INPUTS, TokenSamples, open_tokenizer

if TYPE_CHECKING:
    from ortho_cli.recipe.data_text import Sentences
    from ortho_cli.recipe.tasks_text import Glue

__all__ = ["GlueTask"]

MISMATCHED = "_mismatched"  # the end of a metric's name: over the second evaluation part


class GlueTask(Task):
    """Train and judge a classifier of sentences, or a model that scores them.

    `score` is the mean of the metrics that the task is reported by: one number to compare runs and to keep the best by.

    Args:
        task: lengths, and whether the head trains.
        data: the sentences.
        seed: of the run.
    """

    def __init__(self, task: Glue, data: Sentences, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: Glue = task
        self.data: Sentences = data
        self._opened: dict[Split, TextSet] = {}
        self._splits: dict[Split, TokenSamples] = {}
        self._tokenizer: str | None = None
        self._filler = 0
        own = SPECS[data.task].metrics if isinstance(data, GLUE) else None
        self.reported = own or (("pearson", "spearman") if classes_of(data) == () else ("accuracy", "macro_f1"))
        self.metrics = ("loss", *self.reported, "score")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, none for scores; of a table of one's own they are counted, which opens it."""
        known = classes_of(self.data)
        return self.texts("train").classes if known is None else known

    def texts(self, split: Split) -> TextSet:
        """A split as it is stored.

        Raises:
            RecipeError: the data is not there, or not what the recipe says.
        """
        if split not in self._opened:
            self._opened[split] = load_texts(self.data, split)
        return self._opened[split]

    def size(self, split: Split) -> int:
        """Samples in a split; they need not be cut into tokens for that."""
        return len(self.texts(split))

    def build_model(self, config: Any) -> nn.Module:
        """The model of a recipe's `model` section, for these classes; the first one's tokenizer is the task's."""
        frozen = self.config.compat == "frozen-head"
        model: nn.Module = registry.resolve("models", config.name)(
            config, len(self.classes) or 1, self.config.max_length, frozen_head=frozen
        )
        if self._tokenizer is None:
            self._tokenizer, self._filler = config.tokenizer or config.base, int(model.filler)  # type: ignore[arg-type]
        return model

    def dataset(self, split: Split) -> TokenSamples:
        """A split as tokens of the model's tokenizer."""
        if self._tokenizer is None:
            raise ValueError("the tokenizer is the model's: build the model first")
        if split not in self._splits:
            self._splits[split] = TokenSamples(
                self.texts(split),
                open_tokenizer(self._tokenizer),
                self.config.max_length,
                self._filler,
                self.config.pad,
            )
        return self._splits[split]

    def example(self, batch: int) -> Batch:
        """Samples of full length, all of the first token and class."""
        tokens = torch.zeros(batch, self.config.max_length, dtype=torch.long)
        label = torch.zeros(batch, dtype=torch.long if self.classes else torch.float32)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "label": label}

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """Cross-entropy with the accuracy beside it; of scores the mean squared error."""
        logits = _outputs(model, batch)
        loss = _losses(logits, batch["label"]).mean()
        if not self.classes:
            return loss, logits, {}
        return loss, logits, {"accuracy": (logits.detach().argmax(-1) == batch["label"]).float().mean()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        """Mean loss, the task's metrics, and their mean, the score.

        Rank correlations are no sums over samples, so every process fills in its rows of one table, and the tables are
        added up: the result does not depend on how the split was shared out.
        """
        was_training = model.training
        model.eval()
        rows = max(self.size("train"), self.size("eval"))  # either may be judged
        table: Tensor | None = None
        for batch in batches:
            logits, label = _outputs(model, batch), batch["label"]
            predicted = logits.argmax(-1) if self.classes else logits[:, 0]
            columns = (torch.ones_like(label), label, predicted, _losses(logits, label), batch["part"])
            if table is None:
                table = torch.zeros(rows, len(columns), dtype=torch.float64, device=logits.device)
            table[batch["index"]] = torch.stack([column.double() for column in columns], 1)
        model.train(was_training)
        if table is None:
            raise ValueError("no batches to evaluate on")
        judged = (table if reduce is None else reduce(table)).cpu()
        judged = judged[judged[:, 0] > 0]
        found = {"loss": float(judged[:, 3].mean())}
        for name in self.reported:
            part = judged[judged[:, 4] == int(name.endswith(MISMATCHED))]
            if len(part):  # a limited evaluation may have seen one part only
                labels, predictions = part[:, 1].numpy(), part[:, 2].numpy()
                found[name] = METRICS[name.removesuffix(MISMATCHED)](labels, predictions)
        values = [found[name] for name in self.reported if name in found]
        return {**found, "score": sum(values) / len(values)}


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**{name: batch[name] for name in INPUTS if name in batch})
    return logits.float()


def _losses(logits: Tensor, label: Tensor) -> Tensor:
    """Of each sample."""
    if label.is_floating_point():
        return F.mse_loss(logits[:, 0], label, reduction="none")
    return F.cross_entropy(logits, label, reduction="none")
