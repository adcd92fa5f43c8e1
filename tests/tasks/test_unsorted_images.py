"""Sets without classes, for generators: each in the layout in which it is handed out, written by hand."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_sets import Pixels, pixels, save_picture, section
from PIL import Image
from torch.utils.data import DataLoader

from ortho_cli.errors import RecipeError, UsageError
from ortho_cli.recipe.tasks import Classify
from ortho_cli.tasks.classify import ClassifyTask
from ortho_cli.tasks.image_data import load_images
from ortho_cli.tasks.image_samples import ImageSamples
from ortho_cli.tasks.image_set import ImageSet
from ortho_cli.tasks.image_specs import SPECS
from ortho_cli.tasks.lmdb_pictures import LmdbPictures
from ortho_cli.tasks.pictures import to_tensor

UNSORTED = [name for name, spec in SPECS.items() if not spec.has_classes]


def both(name: str, folder: Path) -> tuple[ImageSet, ImageSet]:
    train, judged = (load_images(section(name, path=str(folder)), split) for split in ("train", "eval"))
    assert train.classes == judged.classes and len(train.classes) == 1
    assert not train.labels.any() and not judged.labels.any()
    return train, judged


def opened(images: ImageSet, size: int, channels: int = 3) -> list[bytes]:
    """The pixels of each picture."""
    assert not isinstance(images.images, torch.Tensor)
    return [to_tensor(images.images.open(place), size, channels).numpy().tobytes() for place in range(len(images))]


# Faces.


def test_the_faces_of_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.data", reason="the faces come with scikit-image")
    train, judged = (load_images(section("faces"), split) for split in ("train", "eval"))
    assert (len(train), len(judged)) == (80, 20)
    assert isinstance(train.images, torch.Tensor) and isinstance(judged.images, torch.Tensor)
    whole = torch.from_numpy(skimage.lfw_subset()[:100]).float()
    values = torch.cat([train.images, judged.images])[:, 0].float() / 255
    assert sorted(values.mean((1, 2)).tolist()) == pytest.approx(sorted(whole.mean((1, 2)).tolist()), abs=2e-3)
    assert (float(whole.mean()), float(whole.std())) == pytest.approx(
        (SPECS["faces"].mean[0], SPECS["faces"].std[0]), abs=1e-4
    )


def test_faces_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UsageError, match="comes with scikit-image") as caught:
        load_images(section("faces"), "train")
    assert caught.value.hint == "pip install scikit-image"


# dSprites.


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("the metadata was unpickled",)


def save_sprites(folder: Path, images: np.ndarray[Any, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    metadata = np.array(Trap(), dtype=object)
    np.savez_compressed(path, metadata=metadata, imgs=images, latents_values=np.zeros((len(images), 6)))
    return path


def test_dsprites_pixel_by_pixel_and_its_metadata_is_left_alone(tmp_path: Path) -> None:
    images = (pixels(10, 1, 64)[:, 0] > 127).astype(np.uint8)
    path = save_sprites(tmp_path, images)
    with np.load(path, allow_pickle=True) as content, pytest.raises(pytest.fail.Exception, match="was unpickled"):
        _ = content["metadata"]  # the trap works
    train, judged = both("dsprites", tmp_path)
    assert (len(train), len(judged)) == (8, 2)
    assert sorted(opened(train, 64, 1) + opened(judged, 64, 1)) == sorted((255 * image).tobytes() for image in images)
    task = ImageSamples(train, SPECS["dsprites"], 64, (), 0)
    assert task.fetch(0, torch.tensor([0]))["image"].unique().tolist() == [-1.0, 1.0]  # as generators make them


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.full((2, 64, 64), 255, np.uint8), "holds 255, expected 0 and 1"),
        (np.zeros((2, 32, 32), np.uint8), r"uint8 \(2, 32, 32\), expected uint8"),
        (np.zeros((2, 64, 64)), "is float64"),
    ],
)
def test_other_arrays_are_not_taken_for_dsprites(tmp_path: Path, images: np.ndarray[Any, Any], reason: str) -> None:
    save_sprites(tmp_path, images)
    with pytest.raises(RecipeError, match=reason):
        load_images(section("dsprites", path=str(tmp_path)), "train")


@pytest.mark.parametrize("broken", ["cut", "text", "other"])
def test_a_damaged_dsprites_file(tmp_path: Path, broken: str) -> None:
    path = save_sprites(tmp_path, np.zeros((9, 64, 64), np.uint8))
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-200], "text": b"<html>", "other": pickle.dumps([])}[broken])
    with pytest.raises(RecipeError, match="no dSprites file"):
        load_images(section("dsprites", path=str(tmp_path)), "train")


# LSUN.


def encoded(picture: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(file, format="WEBP", lossless=True)
    return file.getvalue()


def save_lmdb(folder: Path, values: dict[bytes, bytes]) -> None:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


@pytest.fixture
def churches(tmp_path: Path) -> Path:
    pytest.importorskip("lmdb", reason="LSUN's databases are read by lmdb")
    for split, seed in (("train", 0), ("val", 1)):
        values = {f"{place:x}f".encode(): encoded(image) for place, image in enumerate(pixels(6, 3, 8, seed))}
        save_lmdb(tmp_path / f"church_outdoor_{split}_lmdb", values)
        (tmp_path / f"church_outdoor_{split}_lmdb" / "lock.mdb").unlink()
    return tmp_path


def test_lsun_picture_by_picture_in_the_order_of_its_keys(churches: Path) -> None:
    train, judged = both("lsun-church", churches)
    for found, seed in ((train, 0), (judged, 1)):
        assert opened(found, 8) == [image.tobytes() for image in pixels(6, 3, 8, seed)]
    assert opened(train.select([4, 1]), 8) == [pixels(6, 3, 8)[place].tobytes() for place in (4, 1)]
    assert both("lsun-church", churches)[0].images is not train.images  # LMDB itself allows no second opening
    files = sorted(path.name for path in churches.rglob("*.mdb"))
    assert files == ["data.mdb", "data.mdb"], "a data set may lie where nobody may write"


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_lsun_in_processes_of_a_loader(churches: Path, context: str) -> None:
    train, _ = both("lsun-church", churches)
    here = opened(train, 8)  # the database is open before the processes start
    samples = ImageSamples(train, SPECS["lsun-church"], 8, (), 0)
    loader = DataLoader(samples, None, sampler=[(0, place) for place in range(6)], num_workers=2,
                        multiprocessing_context=context)  # type: ignore[arg-type]  # fmt: skip
    values = [(sample["image"] * 127.5 + 127.5).round().byte().numpy().tobytes() for sample in loader]
    assert values == here


def test_lsun_that_is_damaged_or_lacks_its_library(churches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="no picture") as caught:
        found = LmdbPictures(churches / "church_outdoor_train_lmdb", [b"gone"])
        found.open(0)
    assert str(caught.value.where).endswith("gone")
    (churches / "other" / "church_outdoor_train_lmdb").mkdir(parents=True)
    (churches / "other" / "church_outdoor_train_lmdb" / "data.mdb").write_bytes(b"text")
    with pytest.raises(RecipeError, match="no LMDB database"):
        load_images(section("lsun-church", path=str(churches / "other")), "train")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (churches / "more").mkdir()
    (churches / "church_outdoor_train_lmdb").rename(churches / "more" / "church_outdoor_train_lmdb")
    with pytest.raises(UsageError, match="read by lmdb") as missing:
        load_images(section("lsun-church", path=str(churches / "more")), "train")
    assert missing.value.hint == "pip install lmdb"


# Folders.


def fill(folder: Path, *names: str) -> dict[str, bytes]:
    """Pictures of their own in some files."""
    images = dict(zip(names, pixels(len(names), 3, 8), strict=True))
    for name, image in images.items():
        save_picture(folder / name, image)
    return {name: image.tobytes() for name, image in images.items()}


def test_celeba_with_its_own_parts_and_without(tmp_path: Path) -> None:
    names = [f"{number:06d}.jpg" for number in range(1, 11)]
    saved = fill(tmp_path / "img_align_celeba", *names)
    train, judged = both("celeba", tmp_path)
    assert (len(train), len(judged)) == (8, 2)
    assert sorted(opened(train, 8) + opened(judged, 8)) == sorted(saved.values())
    table = tmp_path / "list_eval_partition.txt"
    table.write_text("".join(f"{name} {min(number // 4, 2)}\n" for number, name in enumerate(names)))
    train, judged = both("celeba", tmp_path)
    assert opened(train, 8) == [saved[name] for name in names[:4]]
    assert opened(judged, 8) == [saved[name] for name in names[4:8]]
    table.write_text("000001.jpg 0\n000002.jpg 3\n")
    with pytest.raises(RecipeError, match="expected a file name and 0, 1 or 2") as caught:
        load_images(section("celeba", path=str(tmp_path)), "train")
    assert caught.value.where == f"{table}:2"


def test_celeba_is_cut_as_published(tmp_path: Path) -> None:
    """Rows 24 to 194 and columns 4 to 174 of 218 x 178."""
    picture = np.full((3, 218, 178), 255, np.uint8)
    picture[:, 24:194, 4:174] = 0
    save_picture(tmp_path / "000001.jpg", picture)
    samples = ImageSamples(load_images(section("celeba", path=str(tmp_path)), "train"), SPECS["celeba"], 170, (), 0)
    assert samples.fetch(0, torch.tensor([0]))["image"].unique().tolist() == [-1.0]


@pytest.mark.parametrize("name", ["ffhq", "anime-faces"])
@pytest.mark.parametrize("deep", [False, True])
def test_pictures_anywhere_below_a_folder(tmp_path: Path, name: str, deep: bool) -> None:
    saved = fill(tmp_path, *(f"{number // 5:05d}/{number}.png" if deep else f"{number}.jpg" for number in range(10)))
    save_picture(tmp_path / ".trash" / "0.png", pixels(1, 3, 8)[0])
    (tmp_path / "LICENSE.txt").write_text("none")
    train, judged = both(name, tmp_path)
    assert (len(train), len(judged)) == (8, 2)
    assert sorted(opened(train, 8) + opened(judged, 8)) == sorted(saved.values())


def test_a_flat_folder_of_ones_own(tmp_path: Path) -> None:
    saved = fill(tmp_path / "all", *(f"{number}.png" for number in range(10)))
    train, judged = both("image-folder", tmp_path / "all")
    assert (len(train), len(judged)) == (8, 2)
    assert sorted(opened(train, 8) + opened(judged, 8)) == sorted(saved.values())
    parts = fill(tmp_path / "parts", "train/a.png", "train/b.png", "val/c.png")
    train, judged = both("image-folder", tmp_path / "parts")
    assert opened(train, 8) == [parts["train/a.png"], parts["train/b.png"]]
    assert opened(judged, 8) == [parts["val/c.png"]]
    task = ClassifyTask(Classify(name="classify"), section("image-folder", path=str(tmp_path / "all")), seed=0)
    with pytest.raises(RecipeError, match="one class alone"):
        _ = task.num_classes


# What all have.


@pytest.mark.parametrize("name", UNSORTED)
def test_pictures_without_classes_are_not_classified(name: str) -> None:
    with pytest.raises(RecipeError, match=f"data {name} has no classes to tell"):
        ClassifyTask(Classify(name="classify"), section(name), seed=0)


@pytest.mark.parametrize("name", [name for name in UNSORTED if name != "faces"])
def test_what_is_not_there_is_explained(tmp_path: Path, name: str) -> None:
    for path, reason in ((tmp_path / "gone", "there is no folder"), (tmp_path, f"does not hold {name}")):
        with pytest.raises(RecipeError, match=reason) as caught:
            load_images(section(name, path=str(path)), "train")
        assert all(line in str(caught.value.hint) for line in (*SPECS[name].tree, *SPECS[name].fetch))


@pytest.mark.parametrize("name", ["celeba", "image-folder"])
def test_a_hub_set_without_a_column_of_classes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the hub's sets are read by datasets ([vision])")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = pixels(10, 3, 8)
    content = {"image": [Image.fromarray(image.transpose(1, 2, 0)) for image in images], "celeb_id": list(range(10))}
    features = datasets.Features({"image": datasets.Image(), "celeb_id": datasets.Value("int64")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    train, judged = (load_images(section(name, source=str(tmp_path / "set")), split) for split in ("train", "eval"))
    assert (len(train), len(judged), train.classes) == (8, 2, (name,))
    assert sorted(opened(train, 8) + opened(judged, 8)) == sorted(image.tobytes() for image in images)
