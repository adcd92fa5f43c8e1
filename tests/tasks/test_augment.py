"""Augmentations against their plain definitions, and the same for a sample whatever batch it stands in."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ortho_cli.errors import UsageError
from ortho_cli.tasks import augment
from ortho_cli.tasks.augment import Augmentation, cut_out, mirror, rand_augment, shift

OWN = ("crop", "flip", "cutout")


def pictures(count: int, channels: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offset", [-4, -1, 0, 3, 4])
def test_a_shift_is_pad_and_crop(offset: int) -> None:
    images, pad, size = pictures(5), 4, 16
    down, right = [offset, 0, 4, -4, 2], [1, offset, -4, 4, offset]
    padded = F.pad(images, (pad,) * 4)
    expected = [
        image[:, pad + y : pad + y + size, pad + x : pad + x + size]
        for image, y, x in zip(padded, down, right, strict=True)
    ]
    assert torch.equal(shift(images, down, right), torch.stack(expected))


def test_mirror_and_cutout_touch_what_they_should() -> None:
    images = pictures(3)
    which = torch.tensor([True, False, True])
    mirrored = mirror(images, which)
    assert torch.equal(mirrored[0], images[0].flip(-1))
    assert torch.equal(mirrored[1], images[1])
    fill = torch.tensor([0.1, 0.2, 0.3])
    covered = cut_out(images, torch.tensor([8, 0, 15]), torch.tensor([8, 0, 3]), 6, fill)
    for image, before, rows, columns in (
        (covered[0], images[0], slice(5, 11), slice(5, 11)),
        (covered[1], images[1], slice(0, 3), slice(0, 3)),
        (covered[2], images[2], slice(12, 16), slice(0, 6)),
    ):
        assert torch.equal(image[:, rows, columns], fill[:, None, None].expand_as(image[:, rows, columns]))
        expected = before.clone()
        expected[:, rows, columns] = image[:, rows, columns]
        assert torch.equal(image, expected)


@pytest.mark.parametrize("names", [("crop",), ("flip",), ("cutout",), OWN, ("cutout", "flip", "crop")])
def test_a_sample_is_the_same_in_any_batch(names: tuple[str, ...]) -> None:
    images, places = pictures(8), torch.arange(8) * 1000
    change = Augmentation(names, 7, 16, (0.5, 0.5, 0.5))
    together = change(images, 3, places)
    assert torch.equal(together, change(images, 3, places))
    order = torch.tensor([5, 0, 7, 2])
    assert torch.equal(change(images[order], 3, places[order]), together[order])
    assert torch.equal(change(images[2:3], 3, places[2:3]), together[2:3])
    assert not torch.equal(change(images, 4, places), together)
    assert not torch.equal(Augmentation(names, 8, 16, (0.5,) * 3)(images, 3, places), together)


def test_every_offset_and_both_sides_come_up_equally() -> None:
    count, size = 9000, 8
    images = torch.zeros(count, 1, size, size)
    images[:, 0, 3, 4] = 1
    moved = Augmentation(("crop", "flip"), 0, size, (0.0,))(images, 0, torch.arange(count))
    found = moved.flatten(1).argmax(1)
    rows, columns = torch.bincount(found // size, minlength=size), torch.bincount(found % size, minlength=size)
    # One pixel of padding: three rows alike; columns 3, 4, 5, or mirrored 4, 3, 2.
    assert (rows[2:5] / count - 1 / 3).abs().max() < 0.02
    assert (columns[2:6] / count - torch.tensor([1, 2, 2, 1]) / 6).abs().max() < 0.02
    assert rows.sum() == rows[2:5].sum() and columns.sum() == columns[2:6].sum()


def test_padding_and_hole_go_with_the_size() -> None:
    assert [(Augmentation((), 0, size, (0,)).pad, Augmentation((), 0, size, (0,)).hole) for size in (8, 28, 32)] == [
        (1, 4), (3, 14), (4, 16),
    ]  # fmt: skip


def test_the_order_is_the_recipes() -> None:
    images, places = torch.ones(64, 1, 8, 8), torch.arange(64)
    cut_last = Augmentation(("crop", "cutout"), 0, 8, (0.5,))(images, 0, places)
    cut_first = Augmentation(("cutout", "crop"), 0, 8, (0.5,))(images, 0, places)
    assert not torch.equal(cut_first, cut_last)
    step = Augmentation(("crop",), 0, 8, (0.5,))(Augmentation(("cutout",), 0, 8, (0.5,))(images, 0, places), 0, places)
    assert torch.equal(cut_first, step)


def test_randaugment_without_kornia_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation.auto", None)
    augment._operations.cache_clear()
    with pytest.raises(UsageError, match="randaugment needs kornia") as caught:
        Augmentation(("randaugment",), 0, 8, (0.0,))
    assert "ortho-cli[vision]" in str(caught.value.hint)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_the_same_in_any_batch(channels: int) -> None:
    pytest.importorskip("kornia", reason="RandAugment is kornia's ([vision])")
    images = pictures(6, channels)
    state = torch.get_rng_state()
    together = rand_augment(images, range(6))
    assert torch.equal(state, torch.get_rng_state())
    assert together.shape == images.shape
    assert torch.equal(rand_augment(images[[4, 1]], [4, 1]), together[[4, 1]])
    assert not torch.equal(together, images)
    assert together.min() >= 0 and together.max() <= 1
    change = Augmentation(("randaugment", "flip"), 0, 16, (0.5,) * channels)
    assert torch.equal(change(images, 1, torch.arange(6))[3:4], change(images[3:4], 1, torch.tensor([3])))
