"""What a recipe needs is told in full, without opening it; and what is there is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from picture_sets import pixels, save_mnist, save_picture, section

from ortho_cli.errors import RecipeError
from ortho_cli.tasks.bundled_images import BUNDLED
from ortho_cli.tasks.data_check import check_data, describe_data, found_text
from ortho_cli.tasks.image_specs import SPECS


@pytest.mark.parametrize("name", list(SPECS))
def test_every_set_says_how_it_looks_and_where_it_is(name: str) -> None:
    path = {} if name in BUNDLED else {"path": "no/such/folder"}
    text = describe_data(section(name, **path))
    spec = SPECS[name]
    assert text.startswith(f"{name}: {spec.title}")
    assert all(line in text for line in (*spec.tree, *spec.fetch))
    assert name in BUNDLED or "read from: no/such/folder" in text
    assert spec.hub is None or spec.hub.id in text


def test_the_hub_is_named_where_there_is_no_path() -> None:
    assert "read from: the hub, uoft-cs/cifar10" in describe_data(section("cifar10"))
    assert "read from: the hub, org/mine@v1" in describe_data(section("cifar10", source="org/mine@v1"))
    assert "read from" not in describe_data(section("digits"))


def test_what_is_there_is_counted(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("t10k", 3)):
        save_mnist(tmp_path, split, pixels(count, 1, 28), [0] * count, zipped=True)
    assert check_data(section("mnist", path=str(tmp_path), classes=(0, 1))) == {
        "name": "mnist", "train": 5, "eval": 3, "classes": 10, "kept": 2,
    }  # fmt: skip
    assert check_data(section("digits"))["kept"] == 10


def test_pictures_without_classes_are_said_to_have_none() -> None:
    pytest.importorskip("skimage", reason="the faces come with scikit-image")
    faces = section("faces")
    assert found_text(faces, check_data(faces)) == "found: 80 samples to train on, 20 to judge by; no classes"


def test_what_is_missing_is_an_error_that_helps(tmp_path: Path) -> None:
    save_mnist(tmp_path, "train", pixels(5, 1, 28), [0] * 5, zipped=True)
    with pytest.raises(RecipeError, match=r"does not hold mnist \(eval\)") as caught:
        check_data(section("mnist", path=str(tmp_path)))
    assert "t10k-images-idx3-ubyte" in str(caught.value.hint)
    assert caught.value.exit_code == 3


def test_a_picture_of_each_split_is_opened(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            save_picture(tmp_path / split / name / "0.png", pixels(1, 3, 4)[0])
    assert check_data(section("image-folder", path=str(tmp_path)))["eval"] == 2
    (tmp_path / "val/a/0.png").write_bytes(b"broken")
    with pytest.raises(RecipeError, match="no picture"):
        check_data(section("image-folder", path=str(tmp_path)))
