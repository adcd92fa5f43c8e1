"""The text of a translation run: its pairs, the pieces learnt from them, samples of pieces, and batches of samples.

Pieces, and how much text there was, are kept in the run's folder: what the run learnt can be used without the text, and
other text than it began with is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ortho_cli.errors import CheckpointError, RecipeError
from ortho_cli.recipe.translation import ROWS

from .batching import eval_parts, load_batches
from .image_specs import Split
from .parallel_samples import ParallelSamples
from .parallel_text import Pair, Part, read_pairs
from .token_batches import batch_order, flatten, ragged_rows, token_cuts, token_order
from .tokenization import PADDING, Pieces

if TYPE_CHECKING:
    from ortho_cli.recipe.translation import Parallel

__all__ = ["SIDES", "VOCABULARIES", "ParallelCorpus"]

VOCABULARIES, TOLD = "vocabulary", "text.json"  # a run's folder of them, and of how much text there was
SIDES = ("source", "target")

Batch = dict[str, Tensor]
Told = dict[str, Any]


class ParallelCorpus:
    """Pairs of sentences as pieces; opened when they are first asked for.

    Args:
        data: the recipe's section.
    """

    def __init__(self, data: Parallel) -> None:
        self.data = data
        self._pairs: dict[Part, list[Pair]] = {}
        self._splits: dict[Split, ParallelSamples] = {}
        self._pieces: dict[str, Pieces] = {}
        self._cuts: dict[tuple[Split, int], list[tuple[int, int]]] = {}
        self._told: Told = {}

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
        """Write both vocabularies into a run's folder, and how much text there was."""
        place = folder / VOCABULARIES
        place.mkdir(exist_ok=True)
        for side in SIDES:
            self.pieces(side).save(place / f"{side}.json")
        (place / TOLD).write_text(json.dumps(self._told_now()) + "\n", "utf-8")

    def recall(self, folder: Path) -> None:
        """Take the vocabularies that a run kept, where it did.

        Raises:
            CheckpointError: one of the files is missing or damaged.
        """
        place = folder / VOCABULARIES
        if not place.is_dir():
            return
        self._pieces = {side: Pieces.load(place / f"{side}.json") for side in SIDES}
        try:
            self._told = json.loads((place / TOLD).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{place / TOLD} cannot be read: {error}") from error

    def samples(self, split: Split) -> ParallelSamples:
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

    def encoded(self, sentences: Sequence[str]) -> Tensor:
        """Sentences to translate, `(B, S)` pieces."""
        rows = self.pieces("source").encode([sentence.strip() for sentence in sentences])
        return ragged_rows(*flatten(rows), torch.arange(len(rows)), PADDING)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch. Sentences beyond the last multiple of eight are left out, the longest ones."""
        return int((self._told or self._told_now())["steps_per_epoch"])

    def cuts(self, split: Split, batch: int) -> list[tuple[int, int]]:
        """Where a split, sorted by length, is cut into batches of at most so many pieces."""
        if (split, batch) not in self._cuts:
            lengths = self.samples(split).lengths.sort().values
            self._cuts[split, batch] = token_cuts(lengths, batch, ROWS if split == "train" else 1)
        return self._cuts[split, batch]

    def eval_batches(self, seed: int, batch: int, rank: int, world: int, skip: int, workers: int) -> Iterator[Batch]:
        """One rank's share of every batch of the part that is judged."""
        samples, cuts = self.samples("eval"), self.cuts("eval", batch)
        order = token_order(samples.lengths, seed, 0)
        parts = []
        for start, stop in (cuts[number] for number in batch_order(len(cuts), seed, 0)):
            first, last = eval_parts(stop - start, stop - start, rank, world)[0]
            parts.append((start + first, start + last))
        return load_batches(samples, order, parts[skip:], 0, workers)

    def train_batches(
        self, seed: int, epoch: int, batch: int, rank: int, world: int, skip: int, workers: int
    ) -> Iterator[Batch]:
        """One rank's batches of an epoch, each with `pieces`, its share of those to predict.

        A batch smaller than the recipe's is one of several parts of it, which have as many sentences each.

        Raises:
            RecipeError: eight sentences that cannot be shared evenly, a sentence that fits no batch, or other text than
                the run began with.
        """
        samples = self.samples("train")
        self._check_text()
        cuts, order = self.cuts("train", self.data.batch), token_order(samples.lengths, seed, epoch)
        pieces = self.data.batch // batch
        shares = pieces * world
        if ROWS % shares:
            raise RecipeError(
                f"{ROWS} sentences cannot be shared evenly by {world} processes in {pieces} parts",
                hint="processes times train.accumulate: 1, 2, 4 or 8",
            )
        parts: list[tuple[int, int]] = []
        totals: list[Tensor] = []
        for start, stop in (cuts[number] for number in batch_order(len(cuts), seed, epoch)):
            count = (stop - start) // shares
            firsts = [start + count * (piece * world + rank) for piece in range(pieces)]
            parts += [(first, first + count) for first in firsts]
            totals += [samples.target_lengths[order[start:stop]].sum() / shares] * pieces
        found = load_batches(samples, order, parts[skip:], epoch, workers)
        return ({**made, "pieces": total} for made, total in zip(found, totals[skip:], strict=True))

    def _told_now(self) -> Told:
        """How much text there is to train on, and which."""
        samples = self.samples("train")
        digest = hashlib.sha256()
        for part in (*samples.sources, *samples.targets):
            digest.update(part.numpy().tobytes())
        steps = len(self.cuts("train", self.data.batch))
        return {"steps_per_epoch": steps, "pairs": len(samples), "pieces_sha256": digest.hexdigest()}

    def _check_text(self) -> None:
        if self._told and self._told != (now := self._told_now()):
            raise RecipeError(
                f"the training text is not that of the run: {now['pairs']:,} pairs, when it began "
                f"{self._told['pairs']:,}; or others",
                hint="begin another run, or restore the text (of catalogues: the versions of the packages)",
            )
