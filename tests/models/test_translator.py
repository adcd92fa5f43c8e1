"""The translation models: sizes of the paper, no look at padding or what follows, a cache that changes nothing."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from ortho_cli.errors import UsageError
from ortho_cli.models import translator
from ortho_cli.models.translator import Translator
from ortho_cli.recipe.models import Model
from ortho_cli.registry import resolve

SIZES = {"dim": 16, "hidden": 24, "heads": 4, "depth": 2}


def small(**changes: Any) -> Translator:
    torch.manual_seed(0)
    return Translator(20, 24, 0, **{**SIZES, **changes})


def sentences(rows: int, length: int, pieces: int, seed: int = 0) -> Tensor:
    return torch.randint(1, pieces, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "count"), [("transformer-small", 11_890_448), ("transformer-base", 60_491_536)])
def test_sizes_with_vocabularies_of_ten_thousand(name: str, count: int) -> None:
    config: Any = TypeAdapter(Model).validate_python({"name": name})
    with torch.device("meta"):
        model = resolve("models", name)(config, 10_000, 10_000, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    biases = [key for key, _ in model.named_parameters() if key.endswith("bias") and "norm" not in key]
    assert biases == ["out_embed.bias"]


def test_token_by_token_is_the_whole_at_once() -> None:
    model = small().eval()
    source, target = sentences(3, 7, 20), sentences(3, 5, 24)
    source[1, 4:] = 0
    whole = model(source, target).log_softmax(-1)
    decoding = model.start(source)
    steps = [model.step(target[:, place : place + 1], decoding)[:, 0] for place in range(5)]
    torch.testing.assert_close(torch.stack(steps, 1), whole)


def test_rows_of_a_sentence_are_apart_and_follow_their_order() -> None:
    """Three beams of two sentences, reordered and one sentence dropped, against each row decoded alone."""
    model = small().eval()
    source = sentences(2, 6, 20)
    first, second = sentences(6, 1, 24, seed=1), sentences(3, 1, 24, seed=2)
    decoding = model.start(source)
    model.step(first.view(2, 3), decoding)
    parents = torch.tensor([5, 3, 3])  # of the second sentence: its third row, and its first one twice
    decoding.select(torch.tensor([1]), parents)
    found = model.step(second.view(1, 3), decoding)[0]
    alone = model(source[[1, 1, 1]], torch.cat([first[parents], second], 1)).log_softmax(-1)[:, -1]
    torch.testing.assert_close(found, alone)


def test_padding_and_what_follows_change_nothing() -> None:
    model = small().eval()
    source, target = sentences(2, 6, 20), sentences(2, 5, 24)
    plain = model(source, target)
    padded = torch.cat([source, torch.zeros(2, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded, target), plain)
    changed = target.clone()
    changed[:, 3:] = 7
    torch.testing.assert_close(model(source, changed)[:, :3], plain[:, :3])
    assert not torch.allclose(model(source, changed)[:, 3:], plain[:, 3:])


def test_every_parameter_takes_part_and_a_seed_decides_it() -> None:
    model = small(positions=8)
    model(sentences(4, 8, 20), sentences(4, 8, 24)).square().sum().backward()
    silent = [key for key, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    assert silent == []
    other, same = Translator(20, 24, 0, **SIZES), small()
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), small().parameters(), strict=True))
    assert not torch.equal(other.out_embed.weight, same.out_embed.weight)


def test_a_sentence_longer_than_the_table_of_positions() -> None:
    model = small(positions=4).eval()
    with pytest.raises(UsageError, match="a sentence has 5 pieces, and the model 4 positions"):
        model(sentences(1, 5, 20), sentences(1, 2, 24))
    decoding = model.start(sentences(1, 4, 20))
    for _ in range(4):
        model.step(torch.ones(1, 1, dtype=torch.long), decoding)
    with pytest.raises(UsageError, match="at most 4 pieces"):
        model.step(torch.ones(1, 1, dtype=torch.long), decoding)


def test_examples_run() -> None:
    found = doctest.testmod(translator)
    assert (found.failed, found.attempted > 0) == (0, True)
