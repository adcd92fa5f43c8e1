"""Sentences into another language: smoothed cross-entropy a piece; judged by BLEU of what beam search finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ortho_cli import registry

from .beam_search import Translation, beam_search
from .image_specs import Split
from .parallel_corpus import SIDES, ParallelCorpus
from .parallel_samples import ParallelSamples
from .task import EVAL_SEED, Batch, Losses, Reduce, Task
from .tokenization import END, PADDING
from .translate_bleu import bleu_counts, bleu_of_counts

if TYPE_CHECKING:
    from ortho_cli.recipe.translation import Parallel, Translate

__all__ = ["TranslateTask"]

EXAMPLE_LENGTH = 32  # pieces of a sentence, to tell memory by
DECODED = 128  # sentences that are translated at a time
SHOWN = "translations.txt"


class TranslateTask(Task):
    """Train and judge a translator.

    A batch is counted in pieces. Its loss is the mean over the pieces of the whole batch: each process weighs its own
    by how many all have, so that the number of processes changes nothing.

    Args:
        task: smoothing and search.
        data: the pairs, and which part evaluation is on.
        seed: of the run.
    """

    metrics = ("loss", "bleu")

    def __init__(self, task: Translate, data: Parallel, *, seed: int) -> None:
        super().__init__(task, data, seed=seed)
        self.config: Translate = task
        self.data: Parallel = data
        self.corpus = ParallelCorpus(data)

    def keep(self, folder: Path) -> None:
        """Write both vocabularies into a run's folder."""
        self.corpus.keep(folder)

    def recall(self, folder: Path) -> None:
        """Take the vocabularies that a run kept, where it did; its text is then needed for training only."""
        self.corpus.recall(folder)

    def dataset(self, split: Split) -> ParallelSamples:
        """The pairs of a split as pieces."""
        return self.corpus.samples(split)

    def build_model(self, config: Any) -> nn.Module:
        """The model of a recipe's `model` section, for both vocabularies."""
        size = self.data.vocabulary
        model: nn.Module = registry.resolve("models", config.name)(config, size, size, PADDING)
        return model

    def example(self, batch: int) -> Batch:
        """Sentences of one length, which fill a batch of so many pieces."""
        rows = torch.ones(max(1, batch // EXAMPLE_LENGTH), EXAMPLE_LENGTH, dtype=torch.long)
        return {"source": rows, "target": rows, "pieces": torch.tensor(float(rows.numel()))}

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.corpus.steps_per_epoch

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`, with `batch` in pieces; see `ParallelCorpus`.

        Raises:
            RecipeError: processes that cannot share a batch evenly, a sentence that fits none, or other text than the
                run began with.
        """
        if split == "eval":
            return self.corpus.eval_batches(EVAL_SEED, batch, rank, world, skip, workers)
        return self.corpus.train_batches(self.seed, epoch, batch, rank, world, skip, workers)

    def loss(self, model: nn.Module, batch: Batch, phase: str) -> Losses:
        """Smoothed cross-entropy over the batch's pieces; beside it the plain one."""
        target = batch["target"]
        scores = model(batch["source"], shifted(target))
        logs = F.log_softmax(scores.float(), -1)
        plain = F.nll_loss(logs.flatten(0, 1), target.flatten(), ignore_index=PADDING, reduction="sum")
        smoothing = self.config.label_smoothing
        spread = -(logs.mean(-1) * (target != PADDING)).sum() if smoothing else plain
        loss = ((1 - smoothing) * plain + smoothing * spread) / batch["pieces"]
        return loss, scores, {"nll": plain.detach() / batch["pieces"]}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
        """Cross-entropy a piece, without smoothing, and BLEU.

        Sums over pieces and counts of n-grams are added up over processes, so the result does not depend on how the
        part was shared out.
        """
        if isinstance(model, DistributedDataParallel):
            model = model.module  # processes decode batches of their own, in as many steps as each takes
        was_training = model.training
        model.eval()
        sums: Tensor | None = None
        for batch in batches:
            found = self._sums(model, batch).to(batch["source"].device)
            sums = found if sums is None else sums + found
        model.train(was_training)
        if sums is None:
            raise ValueError("no batches to evaluate on")
        sums = sums if reduce is None else reduce(sums)
        return {"loss": float(sums[0] / sums[1]), "bleu": bleu_of_counts(sums[2:].cpu(), self.config.compat)}

    def _sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums of one batch: the losses of its pieces, how many there are, and BLEU's counts."""
        total = torch.zeros(2, dtype=torch.float64)
        translations: list[str] = []
        references: list[str] = []
        parts = (torch.split(batch[side], DECODED) for side in SIDES)
        for source, target in zip(*parts, strict=True):
            if not len(source):
                continue
            logits = model(source, shifted(target)).float()
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PADDING, reduction="sum")
            total += torch.stack([losses.double().cpu(), (target != PADDING).sum().double().cpu()])
            translations += self.translate(model, source)
            references += [self.corpus.pieces("target").decode(row) for row in target.tolist()]
        return torch.cat([total, bleu_counts(translations, references, self.config.compat)])

    def search(self, model: nn.Module, source: Tensor) -> list[Translation]:
        """What beam search finds for sources `(B, S)`, as the recipe says."""
        config: Translate = self.config
        decoder: Any = model.module if isinstance(model, DistributedDataParallel) else model
        return beam_search(
            decoder, source, beam=config.beam, end=END, padding=PADDING, limit=config.max_length,
            length_penalty=config.length_penalty,
        )  # fmt: skip

    def translate(self, model: nn.Module, source: Tensor) -> list[str]:
        """The translations of sources `(B, S)` as text."""
        return [self.corpus.pieces("target").decode(found.pieces) for found in self.search(model, source)]

    def translate_text(self, model: nn.Module, sentences: Sequence[str]) -> list[str]:
        """Translations of sentences, as one batch."""
        return self.translate(model, self.corpus.encoded(sentences).to(next(model.parameters()).device))

    def samples(self, model: nn.Module, generator: torch.Generator, folder: Path) -> None:
        """Write some sentences that are judged, with their translations and references, into a text file."""
        samples, pairs = self.dataset("eval"), self.corpus.pairs("eval")
        chosen = torch.randperm(len(samples), generator=generator)[: self.config.samples]
        source = samples.fetch(0, chosen)["source"].to(next(model.parameters()).device)
        lines = [
            f"source     {pairs[place][0]}\nreference  {pairs[place][1]}\nfound      {found}\n"
            for place, found in zip(chosen.tolist(), self.translate(model, source), strict=True)
        ]
        (folder / SHOWN).write_text("\n".join(lines), "utf-8")


def shifted(target: Tensor) -> Tensor:
    """What the decoder has read before each piece of a target: the end, then the target without its last piece.

    >>> shifted(torch.tensor([[5, 6, END]])).tolist()
    [[1, 5, 6]]
    """
    return torch.cat([target.new_full((len(target), 1), END), target[:, :-1]], 1)
