"""Every set in its local layout gives its pixels and labels; what is missing is explained; splits never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from picture_sets import Pixels, pixels, save_cifar_binary, save_cifar_python2, save_mnist, save_picture, section

from ortho_cli.errors import RecipeError
from ortho_cli.tasks.bundled_images import BUNDLED
from ortho_cli.tasks.image_data import load_images
from ortho_cli.tasks.image_set import ImageSet, stratified
from ortho_cli.tasks.image_specs import SPECS
from ortho_cli.tasks.pictures import to_tensor


def opened(images: ImageSet, size: int) -> torch.Tensor:
    """The pixels of a split, wherever they are."""
    stored = images.images
    if isinstance(stored, torch.Tensor):
        return stored
    return torch.stack([to_tensor(stored.open(place), size, 3) for place in range(len(stored))])


def test_digits_are_split_once_for_all_and_every_class_alike() -> None:
    from sklearn.datasets import load_digits

    train, judged = load_images(section("digits"), "train"), load_images(section("digits"), "eval")
    assert (len(train), len(judged)) == (1438, 359)
    shares = torch.bincount(judged.labels) / torch.bincount(torch.cat([train.labels, judged.labels]))
    assert ((shares - 0.2).abs() < 0.003).all()
    digits = load_digits()
    everything = torch.cat([opened(train, 8), opened(judged, 8)]).flatten(1)
    whole = torch.from_numpy(digits.data).to(torch.uint8)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, whole.tolist()))
    assert train.white == whole.max() == 16
    assert opened(train, 8).shape == (1438, 1, 8, 8)
    values = whole.float() / 16
    assert (float(values.mean()), float(values.std())) == pytest.approx(
        (SPECS["digits"].mean[0], SPECS["digits"].std[0]), abs=1e-4
    )


def test_a_stratified_split_depends_on_the_labels_alone() -> None:
    labels = [0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    judged, train = stratified(labels, "eval"), stratified(labels, "train")
    assert sorted(judged + train) == list(range(13))
    assert sorted(labels[place] for place in judged) == [1, 2, 2]  # a class of one keeps its one for training
    assert judged == stratified(labels, "eval")


def save_set(folder: Path, name: str, split: str, images: Pixels, labels: list[int]) -> None:
    train = split == "train"
    if name == "mnist":
        save_mnist(folder, "train" if train else "t10k", images, labels, zipped=train)
    elif name == "cifar10" and train:
        for number in range(5):
            part = slice(number * 2, number * 2 + 2)
            save_cifar_python2(
                folder / f"cifar-10-batches-py/data_batch_{number + 1}", images[part], labels[part], "labels"
            )
    elif name == "cifar10":
        save_cifar_python2(folder / "cifar-10-batches-py/test_batch", images, labels, "labels")
    elif name == "cifar100":
        path = folder / "cifar-100-binary" / ("train.bin" if train else "test.bin")
        save_cifar_binary(path, images, labels, coarse=[0] * len(labels))
    else:
        below = {"tiny-imagenet": "tiny-imagenet-200/", "imagenet": "", "image-folder": ""}[name]
        inner = "images/" if name == "tiny-imagenet" and train else ""
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            save_picture(folder / f"{below}{'train' if train else 'val'}/n{label:04d}/{inner}{number:03d}.png", image)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.has_classes and name not in BUNDLED])
def test_each_local_layout(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    spec = SPECS[name]
    if spec.num_classes and spec.num_classes >= 200:  # a full set of class folders would be all this test does
        monkeypatch.setitem(SPECS, name, replace(spec, num_classes=3))
    folder, size, labels = tmp_path / "data", min(spec.size, 64), [0, 1, 2, 2, 1, 0, 1, 2, 0, 1]
    for split in ("train", "eval"):
        with pytest.raises(
            RecipeError, match="there is no folder" if not folder.exists() else "does not hold"
        ) as caught:
            load_images(section(name, path=str(folder)), split)  # type: ignore[arg-type]
        assert all(line in str(caught.value.hint) for line in (*spec.tree, *spec.fetch))
        images = pixels(10, spec.channels, size, seed=len(split))
        save_set(folder, name, split, images, labels)
        found = load_images(section(name, path=str(folder)), split)  # type: ignore[arg-type]
        order = sorted(range(10), key=lambda place: labels[place]) if spec.size >= 64 else list(range(10))
        assert found.labels.tolist() == [labels[place] for place in order]
        assert torch.equal(opened(found, size), torch.from_numpy(images[order]))
        assert len(found.classes) == (SPECS[name].num_classes or 3)


def image_folder(root: Path, split: str, count: int, *classes: str) -> None:
    for number in range(count):
        for name in classes:
            save_picture(root / split / name / f"{number}.png", pixels(1, 3, 4, number)[0])


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "eval"])
def test_an_image_folder_with_an_evaluation_split_of_any_name(tmp_path: Path, name: str) -> None:
    image_folder(tmp_path, "train", 2, "cat", "dog")
    image_folder(tmp_path, name, 1, "dog")
    found = load_images(section("image-folder", path=str(tmp_path)), "eval")
    assert (found.labels.tolist(), found.classes) == ([1], ("cat", "dog"))


def test_an_image_folder_without_splits_holds_every_fifth_out(tmp_path: Path) -> None:
    image_folder(tmp_path, "", 10, "cat", "dog")
    train, judged = (load_images(section("image-folder", path=str(tmp_path)), split) for split in ("train", "eval"))
    assert torch.bincount(train.labels).tolist() == [8, 8]
    assert torch.bincount(judged.labels).tolist() == [2, 2]


def test_an_image_folder_with_training_pictures_alone(tmp_path: Path) -> None:
    image_folder(tmp_path, "train", 2, "cat", "dog")
    with pytest.raises(RecipeError, match=r"does not hold image-folder \(eval\)"):
        load_images(section("image-folder", path=str(tmp_path)), "eval")


def test_an_image_folder_with_metadata(tmp_path: Path) -> None:
    for split, labels in (("train", ["dog", "cat"]), ("val", ["dog"])):
        for number in range(len(labels)):
            save_picture(tmp_path / split / f"{number}.png", pixels(1, 3, 4, number)[0])
        rows = [f'{{"file_name": "{number}.png", "label": "{label}"}}' for number, label in enumerate(labels)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(rows))
    train, judged = (load_images(section("image-folder", path=str(tmp_path)), split) for split in ("train", "eval"))
    assert (train.labels.tolist(), judged.labels.tolist(), train.classes) == ([1, 0], [1], ("cat", "dog"))
    assert torch.equal(opened(train, 4)[1], torch.from_numpy(pixels(1, 3, 4, 1)[0]))


def test_classes_are_filtered_in_training_and_keep_their_numbers() -> None:
    train = load_images(section("digits", classes=(7, 2)), "train")
    whole = load_images(section("digits"), "train")
    kept = (whole.labels == 2) | (whole.labels == 7)
    assert torch.equal(train.labels, whole.labels[kept])
    assert torch.equal(opened(train, 8), opened(whole, 8)[kept])
    assert len(train.classes) == 10
    assert len(load_images(section("digits", classes=(7, 2)), "eval")) == 359


def test_a_filter_on_pictures_on_disk(tmp_path: Path) -> None:
    image_folder(tmp_path, "train", 2, "a", "b", "c")
    image_folder(tmp_path, "val", 1, "a", "b", "c")
    found = load_images(section("image-folder", path=str(tmp_path), classes=(2,)), "train")
    assert (len(found), found.labels.tolist()) == (2, [2, 2])
    assert torch.equal(opened(found, 4)[1], torch.from_numpy(pixels(1, 3, 4, 1)[0]))


@pytest.mark.parametrize(
    ("classes", "reason"), [((10,), "data.classes 10: digits has classes 0 to 9"), ((0, 99), "data.classes 99")]
)
def test_a_class_that_does_not_exist(classes: tuple[int, ...], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_images(section("digits", classes=classes), "train")


def test_a_class_without_training_samples(tmp_path: Path) -> None:
    save_set(tmp_path, "mnist", "train", pixels(2, 1, 28), [0, 1])
    with pytest.raises(RecipeError, match=r"data.classes \[7\] leave no training sample of mnist"):
        load_images(section("mnist", path=str(tmp_path), classes=(7,)), "train")


def broken(name: str) -> tuple[Pixels, list[int]]:
    return {
        "label": (pixels(2, 1, 28), [0, 10]),
        "size": (pixels(2, 1, 27), [0, 1]),
        "count": (pixels(2, 1, 28), [0, 1, 2]),
    }[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("label", "labels outside 0 to 9"),
        ("size", "2 labels for pictures \\(2, 1, 27, 27\\), expected 28x28"),
        ("count", "3 labels for pictures \\(2, 1, 28, 28\\)"),
    ],
)
def test_a_set_that_does_not_fit_together(tmp_path: Path, name: str, reason: str) -> None:
    images, labels = broken(name)
    save_mnist(tmp_path, "train", images, labels, zipped=False)
    with pytest.raises(RecipeError, match=reason):
        load_images(section("mnist", path=str(tmp_path)), "train")


def test_a_part_of_imagenet_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    image_folder(tmp_path, "train", 1, "n01440764", "n01443537")
    with pytest.raises(RecipeError, match="2 classes found, imagenet has 1000") as caught:
        load_images(section("imagenet", path=str(tmp_path)), "train")
    assert "image-folder" in str(caught.value.hint)


def test_a_set_without_a_path_or_source() -> None:
    settings: dict[str, Any] = {"name": "image-folder", "path": None, "source": None}
    from ortho_cli.recipe.data import Images

    with pytest.raises(RecipeError, match="needs a path or a source"):  # a recipe is stopped earlier, a call is not
        load_images(Images.model_construct(**settings), "train")
