"""Samples by (epoch, place): normalised, resized, augmented, and the same one by one, in batches and from workers."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from picture_sets import pixels, save_picture, section

from ortho_cli.tasks.batching import load_batches
from ortho_cli.tasks.image_data import load_images
from ortho_cli.tasks.image_samples import ImageSamples
from ortho_cli.tasks.image_set import ImageSet
from ortho_cli.tasks.image_specs import SPECS
from ortho_cli.tasks.pictures import PictureFiles, centre_box, to_tensor

CIFAR, FOLDER = SPECS["cifar10"], SPECS["image-folder"]


def in_memory(count: int = 12) -> ImageSet:
    return ImageSet(torch.from_numpy(pixels(count, 3, 32)), torch.arange(count) % 10, tuple("0123456789"))


def on_disk(root: Path, count: int = 6) -> ImageSet:
    for number in range(count):
        picture = pixels(1, 3, 40 + number, number)[0][:, : 20 + 2 * number]
        save_picture(root / f"{number}.png", picture)
    files = PictureFiles(root, [f"{number}.png" for number in range(count)])
    return ImageSet(files, torch.arange(count) % 2, ("a", "b"))


def test_values_are_normalised_by_channel() -> None:
    images = in_memory()
    batch = ImageSamples(images, CIFAR, 32, (), 0).fetch(0, torch.tensor([3, 1]))
    assert isinstance(images.images, torch.Tensor)
    mean, std = torch.tensor(CIFAR.mean)[:, None, None], torch.tensor(CIFAR.std)[:, None, None]
    torch.testing.assert_close(batch["image"], (images.images[[3, 1]].float() / 255 - mean) / std)
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([3, 1], [3, 1])
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)


def test_digits_have_mean_zero_and_deviation_one() -> None:
    samples = ImageSamples(load_images(section("digits"), "train"), SPECS["digits"], 8, (), 0)
    values = samples.fetch(0, torch.arange(len(samples)))["image"]
    assert float(values.mean()) == pytest.approx(0, abs=0.01)
    assert float(values.std()) == pytest.approx(1, abs=0.01)


def test_another_size_is_resized() -> None:
    images = in_memory(2)
    small = ImageSamples(images, CIFAR, 16, (), 0).fetch(0, torch.arange(2))["image"]
    plain = ImageSamples(images, CIFAR, 32, (), 0).fetch(0, torch.arange(2))["image"]
    expected = F.interpolate(plain, (16, 16), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(small, expected, atol=1e-5, rtol=1e-5)


def test_cutout_leaves_the_mean() -> None:
    batch = ImageSamples(in_memory(), CIFAR, 32, ("cutout",), 0).fetch(0, torch.arange(12))["image"]
    zeros = (batch.abs() < 1e-6).sum((2, 3))
    assert ((zeros >= 8 * 8) & (zeros <= 16 * 16)).all()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # how torch starts workers, from Python 3.12 on
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_sample_is_the_same_alone_in_a_batch_and_from_workers(tmp_path: Path, where: str) -> None:
    images, spec, size = (in_memory(6), CIFAR, 32) if where == "memory" else (on_disk(tmp_path), FOLDER, 8)
    samples = ImageSamples(images, spec, size, ("crop", "flip", "cutout"), 5)
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    for epoch in (0, 1):
        whole = samples.fetch(epoch, order)
        for row, place in enumerate(order.tolist()):
            alone = samples[epoch, place]
            assert all(torch.equal(value[row], alone[name]) for name, value in whole.items())
        for workers in (0, 2):
            loaded = list(load_batches(samples, order, [(0, 2), (2, 4), (4, 6)], epoch, workers))
            assert torch.equal(torch.cat([batch["image"] for batch in loaded]), whole["image"])
    assert not torch.equal(samples[0, 0]["image"], samples[1, 0]["image"])
    assert not torch.equal(samples[0, 0]["image"], ImageSamples(images, spec, size, ("crop", "flip"), 6)[0, 0]["image"])


def test_samples_can_be_sent_to_workers_that_share_no_memory(tmp_path: Path) -> None:
    for images, spec in ((in_memory(3), CIFAR), (on_disk(tmp_path, 3), FOLDER)):
        samples = ImageSamples(images, spec, 8, ("crop", "flip"), 0)
        there = pickle.loads(pickle.dumps(samples))  # what spawned workers get
        assert torch.equal(there[2, 1]["image"], samples[2, 1]["image"])


def test_pictures_of_any_size_are_cut_to_the_middle_or_to_a_random_part(tmp_path: Path) -> None:
    images = on_disk(tmp_path)
    assert isinstance(images.images, PictureFiles)
    mean, std = torch.tensor(FOLDER.mean)[:, None, None], torch.tensor(FOLDER.std)[:, None, None]
    picture = images.images.open(2)
    middle = to_tensor(picture, 8, 3, centre_box(*picture.size, FOLDER.share)).float() / 255
    judged = ImageSamples(images, FOLDER, 8, (), 0)
    torch.testing.assert_close(judged[0, 2]["image"], (middle - mean) / std)
    random = ImageSamples(images, FOLDER, 8, ("crop",), 0)
    assert random.augmentation.names == ()
    assert not torch.equal(random[0, 2]["image"], judged[0, 2]["image"])


def test_pictures_of_one_size_on_disk_are_taken_whole(tmp_path: Path) -> None:
    images = on_disk(tmp_path)
    assert isinstance(images.images, PictureFiles)
    samples = ImageSamples(images, replace(FOLDER, sized=True), 8, (), 0)
    mean, std = torch.tensor(FOLDER.mean)[:, None, None], torch.tensor(FOLDER.std)[:, None, None]
    whole = to_tensor(images.images.open(0), 8, 3).float() / 255
    torch.testing.assert_close(samples[0, 0]["image"], (whole - mean) / std)
