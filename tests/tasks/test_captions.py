"""Captioned pictures: every layout, every fault with its file and line, and draws that belong to samples."""

from __future__ import annotations

import doctest
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ortho_cli.errors import RecipeError
from ortho_cli.recipe.data_captions import CaptionedPictures
from ortho_cli.tasks.caption_buckets import bucket_batches, bucket_shapes, eval_batches, nearest_shapes
from ortho_cli.tasks.caption_data import check_captions, found_captions, load_captions
from ortho_cli.tasks.caption_samples import CaptionSamples
from ortho_cli.tasks.data_check import describe_data

Image = pytest.importorskip("PIL.Image")


def picture(path: Path, size: tuple[int, int] = (20, 10), level: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.tile(np.linspace(0, level, size[0]).astype(np.uint8)[None, :, None], (size[1], 1, 3))
    Image.fromarray(ramp).save(path)


def section(folder: Path, **keys: Any) -> CaptionedPictures:
    return CaptionedPictures.model_validate(
        {"name": "caption-folder", "path": str(folder), "size": 8, "held_out": 0.0, **keys}
    )


def metadata(folder: Path, *lines: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, "utf-8")


def test_metadata_jsonl(tmp_path: Path) -> None:
    for name in ("a.png", "in/b.png"):
        picture(tmp_path / name)
    metadata(
        tmp_path, '{"file_name": "a.png", "text": "a\u2028"}', {"file_name": "in/b.png", "captions": ["b one", "b two"]}
    )
    found = load_captions(section(tmp_path), "train")
    assert found.captions == (("a",), ("b one", "b two"))
    assert (found.sizes, len(load_captions(section(tmp_path), "eval"))) == (((20, 10), (20, 10)), 0)


def test_text_files_and_kohyas_folders(tmp_path: Path) -> None:
    picture(tmp_path / "plain" / "a.png")
    (tmp_path / "plain" / "a.txt").write_text("one\n\ntwo\n")
    assert load_captions(section(tmp_path / "plain"), "train").captions == (("one", "two"),)
    for name in ("3_zwx dog/a.png", "3_zwx dog/b.png", "1_dog/c.png"):
        picture(tmp_path / "kohya" / name)
    (tmp_path / "kohya" / "3_zwx dog" / "b.txt").write_text("zwx dog, on grass")
    (tmp_path / "kohya" / "1_dog" / "c.txt").write_bytes("dog".encode("utf-8-sig"))  # as some editors write it
    found = load_captions(section(tmp_path / "kohya"), "train")
    said = Counter(found.captions[place] for place in found.places)
    assert said == {("zwx dog",): 3, ("zwx dog, on grass",): 3, ("dog",): 1}


def test_parts_that_are_set_apart(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for number in range(count):
            picture(tmp_path / part / f"{number}.png")
            (tmp_path / part / f"{number}.txt").write_text(part)
    config = section(tmp_path)
    assert [len(load_captions(config, split)) for split in ("train", "eval")] == [3, 2]
    flat = section(tmp_path / "train", held_out=0.4)
    assert [len(load_captions(flat, split)) for split in ("train", "eval")] == [2, 1]


BAD = {
    "a picture that is missing": ({"file_name": "gone.png", "text": "x"}, ":2", "there is no picture 'gone.png'"),
    "a broken picture": ({"file_name": "broken.png", "text": "x"}, ":2", "picture 'broken.png': no picture that"),
    "no caption": ({"file_name": "a.png"}, ":2", "no caption of 'a.png'"),
    "no name": ({"text": "x"}, ":2", "has no file_name"),
    "wrong JSON": ('{"file_name": "a.png",', ":2", "no JSON"),
    "a list": ("[1]", ":2", "has no file_name"),
    "outside": ({"file_name": "../a.png", "text": "x"}, ":2", "leaves the folder"),
}


@pytest.mark.parametrize("kind", BAD)
def test_faults_stop_with_file_and_line_or_are_left_out(kind: str, tmp_path: Path) -> None:
    line, where, message = BAD[kind]
    picture(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    metadata(tmp_path, {"file_name": "a.png", "text": "fine"}, line)
    with pytest.raises(RecipeError, match=message) as caught:
        load_captions(section(tmp_path), "train")
    assert str(caught.value.where).endswith(f"metadata.jsonl{where}")
    assert "skip_bad" in str(caught.value.hint)
    found = load_captions(section(tmp_path, skip_bad=True), "train")
    assert (len(found), len(found.faults)) == (1, 1)
    assert "metadata.jsonl:2: " in found.faults[0]
    told = found_captions(check_captions(section(tmp_path, skip_bad=True)))
    assert "1 samples to train on" in told
    assert "1 bad samples are left out" in told


def test_captions_without_pictures_and_pictures_without_captions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(RecipeError, match=r"no a\.txt beside it"):
        load_captions(section(tmp_path), "train")
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"a\.txt: it is not UTF-8 text"):
        load_captions(section(tmp_path), "train")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(RecipeError, match="a caption without a picture") as caught:
        load_captions(section(tmp_path), "train")
    assert str(caught.value.where).endswith("b.txt")
    with pytest.raises(RecipeError, match="there is no folder"):
        load_captions(section(tmp_path / "none"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="holds no captioned pictures") as caught:
        load_captions(section(tmp_path / "empty"), "train")
    assert "metadata.jsonl" in str(caught.value.hint)
    assert "metadata.jsonl" in describe_data(section(tmp_path))


def samples(folder: Path, count: int = 6, **keys: Any) -> CaptionSamples:
    for number in range(count):
        picture(folder / f"{number}.png", (20, 10) if number % 2 else (10, 10), 40 + number)
        (folder / f"{number}.txt").write_text(f"first, b{number}, c, d, e")
    config = section(folder, **keys)
    return CaptionSamples(load_captions(config, "train"), config, 0, training=True)


def test_what_is_drawn_belongs_to_sample_and_epoch(tmp_path: Path) -> None:
    found = samples(tmp_path, crop="random", flip=True, caption_shuffle=True, caption_keep=1, caption_dropout=0.3)
    index = torch.arange(6)
    whole = found.fetch(2, index)
    assert whole["image"].shape == (6, 3, 8, 8)
    assert torch.equal(found.fetch(2, torch.tensor([4, 1]))["image"], whole["image"][[4, 1]])
    assert not torch.equal(found.fetch(3, index)["image"], whole["image"])
    said = [found.captions(epoch, index) for epoch in range(30)]
    assert found.captions(2, torch.tensor([4])) == said[2][4:5]
    dropped = sum(text == "" for each in said for text in each)
    assert 0.2 < dropped / 180 < 0.4
    kept = {text for each in said for text in each if text}
    assert all(text.startswith("first, ") and len(text.split(", ")) == 5 for text in kept)
    assert len(kept) > 50


def test_evaluation_draws_nothing(tmp_path: Path) -> None:
    config = samples(tmp_path, flip=True, caption_shuffle=True, caption_dropout=0.5).config
    found = CaptionSamples(load_captions(config, "train"), config, 0, training=False)
    assert torch.equal(found.fetch(0, torch.tensor([0, 1]))["image"], found.fetch(7, torch.tensor([0, 1]))["image"])
    assert found.captions(5, torch.tensor([2])) == ["first, b2, c, d, e"]


def test_mirrored_pictures_are_the_same_the_other_way_round(tmp_path: Path) -> None:
    found = samples(tmp_path, flip=True)
    epochs = {found.mirrored(epoch, 1): found.picture(epoch, 1) for epoch in range(20)}
    assert torch.equal(epochs[True], epochs[False].flip(-1))


def test_buckets_keep_shapes_apart(tmp_path: Path) -> None:
    found = samples(tmp_path, 9, buckets=4)
    assert {found.shape(sample) for sample in range(9)} == {(8, 8), (12, 4)} or len(set(found.buckets)) == 2
    batches = []
    for rank in range(2):
        order, parts = bucket_batches(found.buckets, 2, 0, 1, rank, 2)
        batches.append([order[start:stop].tolist() for start, stop in parts])
    alone, ranges = bucket_batches(found.buckets, 2, 0, 1)
    assert [first + second for first, second in zip(*batches, strict=True)] == [
        alone[start:stop].tolist() for start, stop in ranges
    ]
    assert all(len({found.buckets[place] for place in alone[start:stop].tolist()}) == 1 for start, stop in ranges)
    assert found.fetch(0, alone[: ranges[0][1]])["image"].dim() == 4
    order, ranges = eval_batches(found.buckets, 4)
    assert sorted(place for start, stop in ranges for place in order[start:stop].tolist()) == list(range(9))
    ranks = [eval_batches(found.buckets, 2, rank, 4) for rank in range(4)]
    assert len({len(ranges) for _, ranges in ranks}) == 1  # processes work in step
    counted = [
        place for order, ranges in ranks for start, stop in ranges if stop <= 9 for place in order[start:stop].tolist()
    ]
    assert sorted(counted) == list(range(9))
    assert all(stop > start for _, ranges in ranks for start, stop in ranges)
    with pytest.raises(RecipeError, match="a batch of 6 is more than the 5"):
        bucket_batches(found.buckets, 6, 0, 0)


def test_shapes_of_stable_diffusion() -> None:
    shapes = bucket_shapes(512, 64)
    assert all(width % 64 == height % 64 == 0 and width * height <= 512 * 512 for width, height in shapes)
    assert {(512, 512), (768, 320), (320, 768), (256, 1024), (1024, 256)} <= set(shapes)
    assert [shapes[at] for at in nearest_shapes([(4000, 3000), (1000, 1000)], shapes)] == [(576, 448), (512, 512)]


def test_sets_of_the_hub_by_a_folder_of_it(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for number in range(5):
        picture(tmp_path / "set" / "train" / f"{number}.png")
    metadata(tmp_path / "set" / "train", *({"file_name": f"{n}.png", "text": f"t{n}"} for n in range(5)))
    config = CaptionedPictures.model_validate(
        {"name": "caption-hub", "source": str(tmp_path / "set"), "held_out": 0.2, "size": 8}
    )
    train, judged = load_captions(config, "train"), load_captions(config, "eval")
    assert (len(train), len(judged)) == (4, 1)
    assert set(train.captions) == {(f"t{n}",) for n in range(5)}
    assert train.source.identity(0) != train.source.open(0)
    with pytest.raises(RecipeError, match="no column of captions"):
        load_captions(config.model_copy(update={"caption_column": "words"}), "train")


def test_bad_rows_of_a_hub_set_stop_with_their_number_or_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for number in range(4):
        picture(tmp_path / "set" / "train" / f"{number}.png")
    (tmp_path / "set" / "train" / "1.png").write_bytes(b"no picture")
    metadata(tmp_path / "set" / "train", *({"file_name": f"{n}.png", "text": "" if n == 2 else "t"} for n in range(4)))
    given = {"name": "caption-hub", "source": str(tmp_path / "set"), "held_out": 0.0, "size": 8}
    with pytest.raises(RecipeError, match=r"row 1 .* no picture that Pillow can read.*1 more of train") as caught:
        load_captions(CaptionedPictures.model_validate(given), "train")
    assert str(caught.value.where).endswith(":1")
    found = load_captions(CaptionedPictures.model_validate({**given, "skip_bad": True}), "train")
    assert (found.places, len(found.faults)) == ((0, 3), 2)
    assert found.faults[1].endswith(":2: row 2 has no caption")


@pytest.mark.parametrize(
    "module", ["caption_buckets", "caption_data", "caption_files", "caption_samples", "latent_cache"]
)
def test_examples_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"ortho_cli.tasks.{module}")).failed == 0
