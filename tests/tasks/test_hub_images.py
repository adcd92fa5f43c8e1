"""Sets through `datasets`, from parquet files as the hub serves them; and what is said without the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_sets import Pixels, pixels, section
from PIL import Image

from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.tasks.image_data import load_images
from ortho_cli.tasks.pictures import to_tensor


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet"])
def test_without_the_library_the_extra_and_the_local_way_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the datasets library") as caught:
        load_images(section(name), "train")
    assert "ortho-cli[vision]" in str(caught.value.hint) and "data.path" in str(caught.value.hint)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    library = pytest.importorskip("datasets", reason="the hub's sets are read by datasets ([vision])")
    library.disable_progress_bars()
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def save_split(
    datasets: Any, folder: Path, split: str, images: Pixels, columns: dict[str, tuple[int, list[int]]]
) -> None:
    """One parquet file of pictures in the column `img` and class columns `name: (classes, labels)`."""
    folder.mkdir(exist_ok=True)
    features = {"img": datasets.Image()}
    content: dict[str, Any] = {"img": [Image.fromarray(picture.transpose(1, 2, 0)) for picture in images]}
    for name, (classes, labels) in columns.items():
        features[name] = datasets.ClassLabel(names=[f"class {number}" for number in range(classes)])
        content[name] = labels
    rows = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_small_pictures_come_whole_by_their_usual_columns(datasets: Any, tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("test", 1)):
        columns = {"coarse_label": (20, [1, 2, 3]), "fine_label": (100, [99, 0, 50 + seed])}
        save_split(datasets, tmp_path / "set", split, pixels(3, 3, 32, seed), columns)
    for split, seed in (("train", 0), ("eval", 1)):
        found = load_images(section("cifar100", source=str(tmp_path / "set")), split)  # type: ignore[arg-type]
        assert isinstance(found.images, torch.Tensor)
        assert torch.equal(found.images, torch.from_numpy(pixels(3, 3, 32, seed)))
        assert found.labels.tolist() == [99, 0, 50 + seed]


def test_a_set_of_ones_own_is_opened_when_asked_for(datasets: Any, tmp_path: Path) -> None:
    save_split(datasets, tmp_path / "set", "train", pixels(10, 3, 6), {"kind": (2, [0, 1] * 5)})
    train, judged = (
        load_images(section("image-folder", source=str(tmp_path / "set")), split) for split in ("train", "eval")
    )
    assert (len(train), len(judged)) == (8, 2)
    assert train.classes == ("class 0", "class 1")
    assert not isinstance(judged.images, torch.Tensor)
    opened = to_tensor(judged.images.open(1), 6, 3)
    place = [place for place in range(10) if torch.equal(opened, torch.from_numpy(pixels(10, 3, 6)[place]))]
    assert len(place) == 1 and place[0] % 2 == judged.labels[1]


def test_a_label_of_minus_one_is_refused(datasets: Any, tmp_path: Path) -> None:
    save_split(datasets, tmp_path / "set", "train", pixels(2, 3, 6), {"label": (2, [0, 1])})
    save_split(datasets, tmp_path / "set", "test", pixels(2, 3, 6), {"label": (2, [-1, -1])})
    with pytest.raises(RecipeError, match=r"labels outside 0 to 1 \(test sets have -1\)"):
        load_images(section("image-folder", source=str(tmp_path / "set")), "eval")


def test_two_columns_of_classes_are_not_guessed_between(datasets: Any, tmp_path: Path) -> None:
    save_split(datasets, tmp_path / "set", "train", pixels(2, 3, 6), {"a": (2, [0, 1]), "b": (2, [0, 1])})
    with pytest.raises(RecipeError, match="has 2 columns of ClassLabel, expected one") as caught:
        load_images(section("image-folder", source=str(tmp_path / "set")), "train")
    assert caught.value.hint == "its columns: img, a, b"


def test_a_set_that_cannot_be_had_is_explained(datasets: Any) -> None:
    with pytest.raises(RecipeError, match="'uoft-cs/cifar10' does not open") as caught:
        load_images(section("cifar10"), "train")
    assert "cifar-10-batches-py" in str(caught.value.hint)
