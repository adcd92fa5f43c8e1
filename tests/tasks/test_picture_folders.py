"""Class folders, Tiny-ImageNet's layout and metadata.jsonl: which picture shows what."""

from __future__ import annotations

from pathlib import Path

import pytest
from picture_sets import pixels, save_picture

from ortho_cli.errors import RecipeError
from ortho_cli.tasks.picture_folders import class_folders, metadata_listing, tiny_imagenet

ONE = pixels(1, 3, 4)[0]


def fill(root: Path, *names: str) -> Path:
    for name in names:
        save_picture(root / name, ONE)
    return root


def test_classes_are_numbered_by_their_sorted_names(tmp_path: Path) -> None:
    fill(tmp_path, "b/2.png", "a/1.JPEG", "b/10.png", ".hidden/x.png", "b/.thumb.png")
    (tmp_path / "b/notes.txt").write_text("no picture")
    (tmp_path / "README").write_text("no class")
    found = class_folders(tmp_path)
    assert found.classes == ("a", "b")
    assert list(zip(found.files, found.labels, strict=True)) == [("a/1.JPEG", 0), ("b/10.png", 1), ("b/2.png", 1)]


def test_another_split_has_the_numbers_of_training(tmp_path: Path) -> None:
    found = class_folders(fill(tmp_path, "c/1.png"), ("a", "b", "c"))
    assert (found.labels, found.classes) == ([2], ("a", "b", "c"))
    with pytest.raises(RecipeError, match="class folder 'c' is not among the 2 training classes"):
        class_folders(tmp_path, ("a", "b"))


def test_folders_without_classes_or_pictures(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no class folders"):
        class_folders(tmp_path)
    fill(tmp_path, "a/1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(RecipeError, match="class folder 'b' holds no pictures"):
        class_folders(tmp_path)


def tiny(root: Path) -> Path:
    fill(root / "train", "n02/images/n02_0.JPEG", "n01/images/n01_0.JPEG", "n01/images/n01_1.JPEG")
    (root / "train/n01/n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t63\t63\n")
    fill(root / "val/images", "val_0.JPEG", "val_1.JPEG")
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t63\t63\nval_1.JPEG\tn01\t0\t0\t63\t63\n")
    return root


def test_tiny_imagenet_as_it_is_packed(tmp_path: Path) -> None:
    root = tiny(tmp_path)
    train, judged = tiny_imagenet(root, "train"), tiny_imagenet(root, "eval")
    assert train.files == ["n01/images/n01_0.JPEG", "n01/images/n01_1.JPEG", "n02/images/n02_0.JPEG"]
    assert train.labels == [0, 0, 1]
    assert (judged.files, judged.labels) == (["images/val_0.JPEG", "images/val_1.JPEG"], [1, 0])
    assert train.classes == judged.classes == ("n01", "n02")
    assert all((judged.root / name).is_file() for name in judged.files)


def test_tiny_imagenet_with_a_sorted_val(tmp_path: Path) -> None:
    root = tiny(tmp_path)
    (root / "val/val_annotations.txt").unlink()
    for name in ("val_0.JPEG", "val_1.JPEG"):
        (root / "val/images" / name).unlink()
    (root / "val/images").rmdir()
    fill(root / "val", "n02/val_0.JPEG")
    assert (tiny_imagenet(root, "eval").files, tiny_imagenet(root, "eval").labels) == (["n02/val_0.JPEG"], [1])


@pytest.mark.parametrize("line", ["val_0.JPEG\tn09\t0", "gone.JPEG\tn01\t0", "nonsense"])
def test_a_line_of_the_table_that_names_nothing(tmp_path: Path, line: str) -> None:
    table = tiny(tmp_path) / "val/val_annotations.txt"
    table.write_text(f"val_1.JPEG\tn01\t0\n{line}\n")
    with pytest.raises(RecipeError, match="names no picture of a training class") as caught:
        tiny_imagenet(tmp_path, "eval")
    assert caught.value.where == f"{table}:2"


def metadata(root: Path, *lines: str) -> Path:
    root.mkdir(exist_ok=True)
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def test_metadata_with_names_and_with_numbers(tmp_path: Path) -> None:
    named = metadata(
        tmp_path / "a", '{"file_name": "x.png", "label": "dog"}', "", '{"file_name": "y/z.png", "label": "cat"}'
    )
    found = metadata_listing(named)
    assert (found.files, found.labels, found.classes) == (["x.png", "y/z.png"], [1, 0], ("cat", "dog"))
    numbered = metadata_listing(metadata(tmp_path / "b", '{"file_name": "x.png", "label": 2}'))
    assert (numbered.labels, numbered.classes) == ([2], ("0", "1", "2"))
    assert metadata_listing(tmp_path / "b", ("0", "1", "2", "3")).classes == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "no JSON"),
        ("[1]", "has no file_name or no label"),
        ('{"label": 1}', "has no file_name or no label"),
        ('{"file_name": "x.png"}', "has no file_name or no label"),
        ('{"file_name": "x.png", "label": true}', "has no file_name or no label"),
        ('{"file_name": "x.png", "label": -1}', "marks a picture without a class"),
        ('{"file_name": "../x.png", "label": 1}', "leaves the folder"),
        ('{"file_name": "/x.png", "label": 1}', "leaves the folder"),
    ],
)
def test_a_line_of_metadata_that_is_refused(tmp_path: Path, line: str, reason: str) -> None:
    metadata(tmp_path, '{"file_name": "a.png", "label": 0}', line)
    with pytest.raises(RecipeError, match=reason) as caught:
        metadata_listing(tmp_path)
    assert caught.value.where == f"{tmp_path / 'metadata.jsonl'}:2"


def test_metadata_that_mixes_or_lacks_labels(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names no picture"):
        metadata_listing(metadata(tmp_path, ""))
    rows = ('{"file_name": "a.png", "label": 0}', '{"file_name": "b.png", "label": "0"}')
    with pytest.raises(RecipeError, match="some labels are names and some are numbers"):
        metadata_listing(metadata(tmp_path, *rows))
    with pytest.raises(RecipeError, match="label 'dog' is not among the 1 training classes"):
        metadata_listing(metadata(tmp_path, '{"file_name": "a.png", "label": "dog"}'), ("cat",))
