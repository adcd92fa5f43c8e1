"""Scores of a subject's pictures against a loop over all pairs, and the choice of an epoch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ortho_cli.analysis.subject_metrics import (
    halves,
    pair_similarity,
    prompt_similarity,
    select_epoch,
    select_epoch_as_published,
)


def test_pair_similarity_is_the_mean_over_all_pairs() -> None:
    first, second = torch.randn(5, 7), torch.randn(3, 7)
    pairs = [float(F.cosine_similarity(a, b, dim=0)) for a in first for b in second]
    assert pair_similarity(first, second) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_prompt_similarity_pairs_row_with_row() -> None:
    images, texts = torch.randn(4, 6), torch.randn(4, 6)
    pairs = [float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(images, texts, strict=True)]
    assert prompt_similarity(images, texts) == pytest.approx(sum(pairs) / 4, abs=1e-6)


def test_nothing_that_chooses_is_reported_where_there_are_two() -> None:
    for count in range(2, 7):
        chooses, reported = halves(range(count))
        assert chooses
        assert reported
        assert not set(chooses) & set(reported)
    assert halves(["only"]) == (["only"], ["only"])


def test_the_epoch_does_not_depend_on_the_scale_of_a_score() -> None:
    scores = {"dino": [0.1, 0.6, 0.4], "clip-t": [0.30, 0.29, 0.28], "lpips": [0.7, 0.8, 0.6]}
    assert select_epoch(scores) == 1
    assert select_epoch({**scores, "clip-t": [100 * value for value in scores["clip-t"]]}) == 1


def test_the_published_choice_takes_no_number_for_zero_and_survives_what_never_changes() -> None:
    nan = float("nan")
    assert select_epoch_as_published({"dino": [0.1, nan, 0.3], "clip-t": [0.2, 0.2, 0.2]}) == 2
    assert select_epoch_as_published({"dino": [0.5]}) == 0
