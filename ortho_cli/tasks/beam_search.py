"""Beam search: the most probable translations of a batch of sentences, with the keys and values of the past kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Decoder", "Translation", "beam_search"]

IMPOSSIBLE = -torch.inf


class Decoder(Protocol):
    """A model that is decoded token by token."""

    def start(self, source: Tensor) -> Any:
        """Read sources; what comes back has `select(sentences, rows)`."""

    def step(self, tokens: Tensor, decoding: Any) -> Tensor:
        """Log-probabilities `(sentences, beams, pieces)` of what follows `tokens (sentences, beams)`."""


@dataclass(frozen=True)
class Translation:
    """The best translation of a sentence: its pieces without the end, and its score."""

    pieces: list[int]
    score: float


@torch.no_grad()
def beam_search(
    model: Decoder, source: Tensor, *, beam: int, end: int, padding: int, limit: int, length_penalty: float = 1.0
) -> list[Translation]:
    """Translate a batch.

    In each step the best continuations of a sentence's `beam` unfinished translations are taken; one that ends and is
    among the `beam` best is finished, and the best that do not end go on. A sentence is done once `beam` translations
    are finished, or at the limit, where all must end. The best by score wins: its log-probability, end included,
    over its length to the power of the penalty.

    Args:
        model: in evaluation mode.
        source: `(B, S)` pieces.
        beam: translations kept a sentence; 1 is greedy.
        end: the piece that begins a translation and ends it.
        padding: a piece that no translation has.
        limit: pieces of a translation, the end included.
        length_penalty: above 1 prefers long translations.

    Returns:
        The best of each sentence, in order.

    Cost: `limit` steps of `B * beam` rows at most; sentences that are done are left out.
    Reference: fairseq's generator, which FNL's numbers are from (Wu et al. 2016, arXiv:1609.08144, for the penalty).
    """
    device, count = source.device, len(source)
    best = [Translation([], IMPOSSIBLE) for _ in range(count)]
    finished = [0] * count
    open_sentences = list(range(count))
    decoding = model.start(source)
    tokens = torch.full((count, beam), end, device=device)
    scores = torch.zeros(count, beam, device=device)
    scores[:, 1:] = IMPOSSIBLE  # all beams begin alike: only one of them may be continued
    history = torch.empty(count, beam, 0, dtype=torch.long, device=device)
    for length in range(1, limit + 1):
        steps = model.step(tokens, decoding)
        steps[..., padding] = IMPOSSIBLE
        if length == limit:
            steps[..., :end], steps[..., end + 1 :] = IMPOSSIBLE, IMPOSSIBLE
        pieces = steps.shape[-1]
        candidates = (scores[..., None] + steps).flatten(1)
        found, places = candidates.topk(min(2 * beam, candidates.shape[1]), dim=1)  # as many may end as go on
        beams, chosen = places // pieces, places % pieces
        ends = chosen == end
        ended = ends.clone()
        ended[:, beam:] = False
        going: list[int] = []
        for row, sentence in enumerate(open_sentences):
            for rank in ended[row].nonzero().flatten().tolist():
                total = float(found[row, rank])
                if total == IMPOSSIBLE or finished[sentence] >= beam:
                    continue
                finished[sentence] += 1
                score = total / length**length_penalty
                if score > best[sentence].score:
                    best[sentence] = Translation(history[row, beams[row, rank]].tolist(), score)
            if finished[sentence] < beam and length < limit:
                going.append(row)
        if not going:
            break
        rows = torch.tensor(going, device=device)
        # The best candidates that do not end, in their order: a stable sort puts those that end behind them.
        kept = torch.argsort(ends[rows].int(), dim=1, stable=True)[:, :beam]
        beams, chosen = beams[rows].gather(1, kept), chosen[rows].gather(1, kept)
        scores = found[rows].gather(1, kept).masked_fill(chosen == end, IMPOSSIBLE)
        parents = rows[:, None] * beam + beams
        history = torch.cat([history.flatten(0, 1)[parents], chosen[..., None]], dim=2)
        tokens = chosen
        decoding.select(rows, parents.flatten())
        open_sentences = [open_sentences[row] for row in going]
    return best
