"""Sentences into another language: smoothed cross-entropy a piece; judged by BLEU of what beam search finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ortho_cli import registry
from ortho_cli.errors import RecipeError
from ortho_cli.methods.inject import inner_model
from ortho_cli.recipe.translation import ROWS

from .batching import eval_parts, load_batches
from .beam_search import Translation, beam_search
from .image_specs import Split
from .parallel_samples import ParallelSamples
from .parallel_text import Pair, Part, read_pairs
from .task import EVAL_SEED, Batch, Losses, Reduce, Task
from .token_batches import batch_order, token_cuts, token_order
from .tokenization import END, PADDING, Pieces
from .translate_bleu import bleu_counts, bleu_of_counts

if TYPE_CHECKING:
    from ortho_cli.recipe.translation import Parallel, Translate

__all__ = ["VOCABULARIES", "TranslateTask"]

VOCABULARIES = "vocabulary"  # a run's folder of them
SIDES = ("source", "target")
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
        self._pairs: dict[Part, list[Pair]] = {}
        self._splits: dict[Split, ParallelSamples] = {}
        self._pieces: dict[str, Pieces] = {}
        self._cuts: dict[tuple[Split, int], list[tuple[int, int]]] = {}

    def pairs(self, split: Split) -> list[Pair]:
        """The sentences of a split as they are written.

        Raises:
            RecipeError: they are not there.
        """
        part: Part = "train" if split == "train" else self.data.judge
        if part not in self._pairs:
            self._pairs[part] = read_pairs(self.data, part)
        return self._pairs[part]

    def pieces(self, side: str) -> Pieces:
        """The vocabulary of the `source` or the `target` language, learnt from the training text unless it was kept.

        Raises:
            RecipeError: too little text.
        """
        if side not in self._pieces:
            sides = {name: [pair[place] for pair in self.pairs("train")] for place, name in enumerate(SIDES)}
            if self.data.joint:
                sides = dict.fromkeys(SIDES, sides["source"] + sides["target"])
            learnt = Pieces.learn(sides[side], self.data.vocabulary)
            self._pieces |= dict.fromkeys(SIDES, learnt) if self.data.joint else {side: learnt}
        return self._pieces[side]

    def keep(self, folder: Path) -> None:
        """Write both vocabularies into a run's folder."""
        place = folder / VOCABULARIES
        place.mkdir(exist_ok=True)
        for side in SIDES:
            self.pieces(side).save(place / f"{side}.json")

    def recall(self, folder: Path) -> None:
        """Take the vocabularies that a run kept, where it did."""
        if (folder / VOCABULARIES).is_dir():
            self._pieces = {side: Pieces.load(folder / VOCABULARIES / f"{side}.json") for side in SIDES}

    def dataset(self, split: Split) -> ParallelSamples:
        """The pairs of a split as pieces; long ones are left out of training, and of training only."""
        if split not in self._splits:
            pairs = self.pairs(split)
            rows = [self.pieces(side).encode([pair[place] for pair in pairs]) for place, side in enumerate(SIDES)]
            if split == "train":
                longest = self.data.max_length
                kept = [place for place, both in enumerate(zip(*rows, strict=True)) if max(map(len, both)) <= longest]
                rows = [[side[place] for place in kept] for side in rows]
            self._splits[split] = ParallelSamples(rows[0], rows[1])
        return self._splits[split]

    def build_model(self, config: Any) -> nn.Module:
        """The model of a recipe's `model` section, for both vocabularies."""
        size = self.data.vocabulary
        model: nn.Module = registry.resolve("models", config.name)(config, size, size, PADDING)
        return model

    def example(self, batch: int) -> Batch:
        """Sentences of one length, which fill a batch of so many pieces."""
        rows = torch.ones(max(1, batch // EXAMPLE_LENGTH), EXAMPLE_LENGTH, dtype=torch.long)
        return {"source": rows, "target": rows, "pieces": torch.tensor(float(rows.numel()))}

    def cuts(self, split: Split, batch: int) -> list[tuple[int, int]]:
        """Where a split, sorted by length, is cut into batches."""
        if (split, batch) not in self._cuts:
            lengths = self.dataset(split).lengths.sort().values
            self._cuts[split, batch] = token_cuts(lengths, batch, ROWS if split == "train" else 1)
        return self._cuts[split, batch]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch. Sentences beyond the last multiple of eight are left out, the longest ones."""
        return len(self.cuts("train", self.data.batch))

    def batches(
        self, split: Split, epoch: int, *, batch: int, rank: int = 0, world: int = 1, skip: int = 0, workers: int = 0
    ) -> Iterator[Batch]:
        """As `Task.batches`, with `batch` in pieces; training batches carry `pieces`, those to predict a process.

        Raises:
            RecipeError: processes that cannot share eight sentences evenly, or sentences that fit no batch.
        """
        samples, cuts = self.dataset(split), self.cuts(split, batch)
        seed = self.seed if split == "train" else EVAL_SEED
        order = token_order(samples.lengths, seed, epoch)
        chosen = [cuts[number] for number in batch_order(len(cuts), seed, epoch)][skip:]
        if split == "eval":
            shares = [eval_parts(stop - start, stop - start, rank, world)[0] for start, stop in chosen]
            parts = [(cut[0] + share[0], cut[0] + share[1]) for cut, share in zip(chosen, shares, strict=True)]
            return load_batches(samples, order, parts, epoch, workers)
        if ROWS % world:
            raise RecipeError(f"{world} processes cannot share {ROWS} sentences evenly", hint="train on 1, 2, 4 or 8")
        parts = [
            (start + (stop - start) // world * rank, start + (stop - start) // world * (rank + 1))
            for start, stop in chosen
        ]
        totals = [samples.target_lengths[order[start:stop]].sum() for start, stop in chosen]
        found = load_batches(samples, order, parts, epoch, workers)
        return ({**made, "pieces": total / world} for made, total in zip(found, totals, strict=True))

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
            references += [self.pieces("target").decode(row) for row in target.tolist()]
        return torch.cat([total, bleu_counts(translations, references, self.config.compat)])

    def search(self, model: nn.Module, source: Tensor) -> list[Translation]:
        """What beam search finds for sources `(B, S)`, as the recipe says."""
        config: Translate = self.config
        decoder: Any = inner_model(model)
        return beam_search(
            decoder, source, beam=config.beam, end=END, padding=PADDING, limit=config.max_length,
            length_penalty=config.length_penalty,
        )  # fmt: skip

    def translate(self, model: nn.Module, source: Tensor) -> list[str]:
        """The translations of sources `(B, S)` as text."""
        return [self.pieces("target").decode(found.pieces) for found in self.search(model, source)]

    def samples(self, model: nn.Module, generator: torch.Generator, folder: Path) -> None:
        """Write some sentences that are judged, with their translations and references, into a text file."""
        samples, pairs = self.dataset("eval"), self.pairs("eval")
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
