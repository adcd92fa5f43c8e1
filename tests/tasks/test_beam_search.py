"""Beam search against one that keeps hypotheses in lists and reads every one of them anew."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ortho_cli.models.translator import Translator
from ortho_cli.tasks.beam_search import beam_search

PADDING, END, PIECES = 0, 1, 9


def model(seed: int, scale: float = 4.0) -> Translator:
    torch.manual_seed(seed)
    made = Translator(12, PIECES, PADDING, dim=8, hidden=8, heads=2, depth=1).eval()
    with torch.no_grad():
        made.out_embed.weight.mul_(scale)  # decided enough for lengths and ranks to differ
    return made


def follows(net: Translator, source: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """Log-probabilities of what follows a translation, without any cache."""
    with torch.no_grad():
        return net(source[None], torch.tensor([[END, *pieces]])).log_softmax(-1)[0, -1]


def naive(net: Translator, source: Tensor, beam: int, limit: int, penalty: float) -> tuple[list[int], float]:
    """The rule of `beam_search`, one hypothesis after the other."""
    going: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, limit + 1):
        found = []
        for score, pieces in going:
            logs = follows(net, source, pieces)
            allowed = [END] if length == limit else [piece for piece in range(PIECES) if piece != PADDING]
            found += [(score + float(logs[piece]), pieces, piece) for piece in allowed]
        found = sorted(found, key=lambda each: -each[0])[: 2 * beam]
        for score, pieces, piece in found[:beam]:
            if piece == END and len(done) < beam:
                done.append((score / length**penalty, pieces))
        going = [(score, (*pieces, piece)) for score, pieces, piece in found if piece != END][:beam]
        if len(done) >= beam or not going:
            break
    score, pieces = max(done, key=lambda each: each[0])
    return list(pieces), score


@pytest.mark.parametrize(("beam", "penalty"), [(1, 1.0), (2, 0.0), (3, 1.0), (4, 2.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_what_the_naive_search_finds(seed: int, beam: int, penalty: float) -> None:
    net = model(seed)
    source = torch.randint(2, 12, (5, 6), generator=torch.Generator().manual_seed(seed))
    source[1, 3:] = PADDING
    found = beam_search(net, source, beam=beam, end=END, padding=PADDING, limit=7, length_penalty=penalty)
    for row, each in zip(source, found, strict=True):
        pieces, score = naive(net, row, beam, 7, penalty)
        assert each.pieces == pieces
        assert each.score == pytest.approx(score, rel=1e-4)


def test_a_beam_as_wide_as_everything_finds_the_best_of_all() -> None:
    net, source, limit = model(3), torch.tensor([[3, 5, 7]]), 3
    scores = {}
    for length in range(limit):
        for pieces in itertools.product(range(2, PIECES), repeat=length):
            path = [*pieces, END]
            logs = [float(follows(net, source[0], tuple(path[:place]))[piece]) for place, piece in enumerate(path)]
            scores[pieces] = sum(logs) / len(path)
    (found,) = beam_search(net, source, beam=64, end=END, padding=PADDING, limit=limit)
    best = max(scores, key=lambda pieces: scores[pieces])
    assert tuple(found.pieces) == best
    assert found.score == pytest.approx(scores[best], rel=1e-4)


def test_limits_and_neighbours_change_nothing_else() -> None:
    net = model(4, scale=1.0)
    source = torch.randint(2, 12, (6, 5), generator=torch.Generator().manual_seed(0))
    together = beam_search(net, source, beam=3, end=END, padding=PADDING, limit=12)
    alone = [beam_search(net, row[None], beam=3, end=END, padding=PADDING, limit=12)[0] for row in source]
    assert [each.pieces for each in together] == [each.pieces for each in alone]
    assert all(PADDING not in each.pieces and END not in each.pieces for each in together)
    (short,) = beam_search(net, source[:1], beam=3, end=END, padding=PADDING, limit=1)
    assert short.pieces == []
    assert short.score == pytest.approx(float(follows(net, source[0], ())[END]), rel=1e-5)
