"""What is to be drawn: prompts from words and files, hints, numbers, seeds, shares; and the hints as tensors."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ortho_cli.errors import UsageError
from ortho_cli.training import generate_pictures
from ortho_cli.training.generate_hints import FileHint, HintKind, hint_batch, middle
from ortho_cli.training.generate_pictures import Prompt, prompts_of, read_prompts, shard_of, share
from ortho_cli.training.generate_sheet import SHEET, write_sheet


def test_prompts_are_lines_or_objects(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    assert read_prompts(tmp_path / "p.txt") == [Prompt("a cat"), Prompt("a dog")]
    lines = [{"prompt": "a cat", "negative": "blur", "control": "h.png"}, {"text": "a dog"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "p.json").write_text(json.dumps(lines))
    expected = [Prompt("a cat", "blur", FileHint(tmp_path / "h.png")), Prompt("a dog")]
    assert read_prompts(tmp_path / "p.jsonl") == read_prompts(tmp_path / "p.json") == expected


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n\n", "holds none"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "p.jsonl:2: .* has no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]', "p.jsonl:2: .* is no object"),
        ("p.jsonl", '{"prompt": "a"', "p.jsonl:1: no JSON"),
    ],
)
def test_a_file_of_prompts_is_refused_by_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        read_prompts(tmp_path / name)
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "no.txt")


def test_one_hint_goes_with_all_prompts_and_one_prompt_with_all_hints() -> None:
    def pairs(prompts: list[str], hints: list[str]) -> list[tuple[str, str | None]]:
        return [
            (each.text, each.hint.name if each.hint else None)
            for each in prompts_of({"prompt": prompts, "control": hints})
        ]

    assert pairs(["a", "b"], ["h"]) == [("a", "h"), ("b", "h")]
    assert pairs(["a"], ["h", "i"]) == [("a", "h"), ("a", "i")]
    assert pairs(["a", "b"], ["h", "i"]) == [("a", "h"), ("b", "i")]
    with pytest.raises(UsageError, match="3 prompts and 2 hints"):
        pairs(["a", "b", "c"], ["h", "i"])
    with pytest.raises(UsageError, match="both say what to draw"):
        prompts_of({"prompt": ["a"], "prompts": "p.txt"})


def test_shares_part_a_job_and_change_no_seed() -> None:
    prompts = [Prompt(word) for word in "abcde"]
    every, whole = share(prompts, num=2, seed=3, shard=None)
    assert whole == every
    shares = [share(prompts, num=2, seed=3, shard=(index, 3))[1] for index in range(3)]
    assert sorted((p for own in shares for p in own), key=every.index) == every
    assert len({picture.seed for picture in every}) == 10
    more = share(prompts, num=3, seed=3, shard=None)[0]
    assert more[:10] == every  # asking for more changes nothing that is there


def test_a_share_is_named_or_is_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shard_of(None) is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert (shard_of(None), shard_of("0/2")) == ((2, 4), (0, 2))
    for wrong in ("4/4", "1", "a/b", "-1/2"):
        with pytest.raises(UsageError, match="is no share"):
            shard_of(wrong)


def test_hints_have_eight_pixels_a_latent(tmp_path: Path) -> None:
    photograph = np.zeros((40, 40, 3), np.uint8)
    photograph[10:30, 10:30] = (200, 90, 30)
    Image.fromarray(photograph).save(tmp_path / "photo.png")
    edges = np.zeros((64, 64), np.uint8)
    edges[8:16, 8:16] = 255
    Image.fromarray(edges).save(tmp_path / "edges.png")
    photo, drawn = FileHint(tmp_path / "photo.png"), FileHint(tmp_path / "edges.png")

    def batch(hint: FileHint | None, kind: str, width: int = 16) -> torch.Tensor:
        return hint_batch([hint], HintKind(kind), SimpleNamespace(latent_factor=2), width, 16)

    found = batch(photo, "canny")
    assert found.shape == (1, 3, 64, 64)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert 0 < float(found.mean()) < 0.2  # lines, not the square
    assert torch.equal(batch(drawn, "canny")[0, 0], torch.from_numpy(edges).float() / 255)  # edges stay what they are
    segments = batch(photo, "segm", 32)
    assert segments.shape == (1, 3, 64, 128)
    assert len(segments[0].flatten(1).T.unique(dim=0)) == 2  # no colours between two that mean something
    with pytest.raises(UsageError, match="some prompts have a hint"):
        batch(None, "segm")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match="is no picture that can be read"):
        batch(FileHint(tmp_path / "text.png"), "segm")


def test_the_middle_of_a_picture_has_the_shape_that_is_asked_for() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    assert bool((np.asarray(middle(Image.fromarray(pixels), (10, 10), exact=True)) == 255).all())
    assert middle(Image.fromarray(pixels), (60, 10)).size == (60, 10)


def test_the_sheet_shows_every_picture_and_runs_nothing(tmp_path: Path) -> None:
    line = {"file": "000000_0.png", "prompt": '<script>alert("a")</script>', "seed": 7}
    write_sheet(tmp_path, {"scheduler": "ddim", "adapters": ["hra=0.5"]}, [line])
    text = (tmp_path / SHEET).read_text()
    assert '<img src="000000_0.png"' in text
    assert "adapters hra=0.5" in text
    assert "<script" not in text


def test_examples_run() -> None:
    found = doctest.testmod(generate_pictures)
    assert found.attempted > 0
    assert found.failed == 0
